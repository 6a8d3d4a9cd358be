// SPDX-License-Identifier: GPL-2.0

//! Reporting free pages to whoever can use their memory.
//!
//! The kernel collects blocks of pages that are free, takes them out of the free lists, and hands
//! them to one [`ReportPages`] in all the system, as [`FreePages`]. When that value is dropped the
//! pages go back to the free lists, and not before: so a device that has been shown them is done
//! with them, if the value travelled through a [`Virtqueue`](crate::virtio::Virtqueue).
//!
//! C header: `include/linux/page_reporting.h`.

use core::ffi::c_void;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::container_of;
use kernel::error::to_result;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::atomic::{AtomicFlag, Relaxed};
use kernel::sync::Arc;
use kernel::time::msecs_to_jiffies;
use kernel::types::Opaque;
use pin_init::stack_pin_init;

use crate::bindings as helpers;
use crate::virtio::{Buffer, Segments};

/// Takes reports of free pages.
///
/// Both methods are called from a work item, one call at a time, and may sleep. They must not
/// allocate memory in a way that waits for memory: pages that are being reported are missing from
/// the free lists meanwhile.
pub trait ReportPages: Send + Sync + 'static {
    /// These pages are free.
    ///
    /// No more are reported until `pages` is dropped or [acknowledged](FreePages::acknowledge),
    /// which may happen after this has returned, in any context.
    fn report(&self, pages: FreePages);

    /// The pages of the last report are still out, after so many seconds. Called every second.
    fn overdue(&self, seconds: u32) {
        let _ = seconds;
    }
}

/// Pages that are free, out of the free lists for as long as this lives.
///
/// As a [`Buffer`] it has one segment for each block of pages. Between being reported and being
/// dropped the pages are never touched by the kernel.
///
/// # Invariants
///
/// The batch is valid until [`Batch::end`] is called for it, and this is the one value for it.
pub struct FreePages(NonNull<Batch>);

// SAFETY: The batch does not care about threads, and has one `FreePages`.
unsafe impl Send for FreePages {}

impl FreePages {
    fn batch(&self) -> &Batch {
        // SAFETY: By the invariants it is valid.
        unsafe { self.0.as_ref() }
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.batch().count
    }

    /// How many pages the blocks have together.
    pub fn pages(&self) -> usize {
        let bytes = self.batch().entries().map(|(_, length)| length as usize);
        bytes.sum::<usize>() / PAGE_SIZE
    }

    /// Gives the pages back, as reported: they are not reported again until they have been in use.
    ///
    /// Any context but NMI. To drop the value gives them back as not reported.
    pub fn acknowledge(self) {
        self.batch().acknowledged.store(true, Relaxed);
    }
}

impl Drop for FreePages {
    fn drop(&mut self) {
        // SAFETY: By the invariants the batch is valid, and this is the end of it.
        unsafe { Batch::end(self.0) };
    }
}

// SAFETY: The memory is that of the blocks, which the kernel keeps out of the free lists, hence
// from everybody, until the batch ends; the token is the batch, aligned as a pointer is.
unsafe impl Buffer for FreePages {
    const TOKEN_TAG_BITS: u32 = 2;

    fn describe(&self, segments: &mut Segments) {
        for (page, length) in self.batch().entries() {
            segments.writable_pages(page, length);
        }
    }

    fn into_token(self) -> NonNull<c_void> {
        core::mem::ManuallyDrop::new(self).0.cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // INVARIANT: The token is from `into_token`, where they held.
        Self(token.cast())
    }
}

/// One report, on the stack of the callback that waits for its end.
#[pin_data]
struct Batch {
    list: NonNull<bindings::scatterlist>,
    count: usize,
    acknowledged: AtomicFlag,
    #[pin]
    ended: Opaque<bindings::completion>,
}

impl Batch {
    /// # Safety
    ///
    /// `list` must be an array of `count` entries, with pages, that stays as it is until the batch
    /// has ended.
    unsafe fn new(list: NonNull<bindings::scatterlist>, count: usize) -> impl PinInit<Self> {
        pin_init!(Self {
            list,
            count,
            acknowledged: AtomicFlag::new(false),
            // SAFETY: The slot is room for a completion, and pinned.
            ended <- Opaque::ffi_init(|slot| unsafe { bindings::init_completion(slot) }),
        })
    }

    /// First page and bytes of each block.
    fn entries(&self) -> impl Iterator<Item = (NonNull<bindings::page>, u32)> + '_ {
        (0..self.count).filter_map(|index| {
            // SAFETY: By the requirement of `new` there are so many entries, each with a page.
            unsafe {
                let entry = self.list.as_ptr().add(index);
                let page = NonNull::new(helpers::vbrs_sg_page(entry))?;
                Some((page, (*entry).length))
            }
        })
    }

    /// Lets the callback go on. The batch may be gone when this returns.
    ///
    /// # Safety
    ///
    /// The batch must be valid, and nobody may use it any more.
    unsafe fn end(batch: NonNull<Self>) {
        // SAFETY: The batch is valid until the one who waits has seen the completion, and that
        // looks at it under the lock under which it is completed.
        unsafe { bindings::complete_all((*batch.as_ptr()).ended.get()) };
    }

    /// Waits for the end, at most a second. Returns whether it has come.
    fn wait_a_second(&self) -> bool {
        // Interruptible, for a device may take its time: such a wait is not a hung task, nor load.
        // (There is nobody to interrupt a work item.)
        // SAFETY: The completion is initialised, and pinned.
        let left = unsafe {
            bindings::wait_for_completion_interruptible_timeout(
                self.ended.get(),
                msecs_to_jiffies(1000),
            )
        };
        left > 0
    }
}

/// A registration to get all reports of free pages; there can be one in the system.
///
/// Dropping it ends the registration and **waits for the end of the report** that is under way, if
/// one is: for a device's answer, unless the device has been reset before and what came back from
/// its queue is dropped.
#[pin_data(PinnedDrop)]
pub struct PageReporting<T: ReportPages> {
    data: Arc<T>,
    #[pin]
    info: Opaque<helpers::page_reporting_dev_info>,
}

// SAFETY: The registration may be ended by any thread, and `T` is shared by all.
unsafe impl<T: ReportPages> Send for PageReporting<T> {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: ReportPages> Sync for PageReporting<T> {}

impl<T: ReportPages> PageReporting<T> {
    /// Registers `data` for reports of up to `capacity` blocks each (at most 32, the kernel's own
    /// limit).
    ///
    /// How large the blocks are is for the administrator to say (`page_reporting.
    /// page_reporting_order`), and otherwise the size of a page block, as with the kernel's own
    /// driver: 2 MiB on ARM64 with pages of 64 KiB, where a page block would be 512 MiB.
    ///
    /// May sleep. The first report comes some seconds later, if the system does not say otherwise.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if somebody is registered, `EOPNOTSUPP` if the kernel cannot do it, [`EINVAL`]
    /// for a capacity of 0.
    pub fn register(data: Arc<T>, capacity: usize) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            data,
            info <- Opaque::try_ffi_init(|slot: *mut helpers::page_reporting_dev_info| {
                if capacity == 0 {
                    return Err(EINVAL);
                }
                let capacity = capacity.min(Segments::MAX) as u32;
                // SAFETY: `slot` is pinned room, all of which is set before it is registered; the
                // data was put beside it before.
                unsafe {
                    slot.write_bytes(0, 1);
                    (*slot).report = Some(Self::report_callback);
                    (*slot).order = helpers::vbrs_page_reporting_order();
                    (*slot).capacity = capacity;
                    to_result(helpers::vbrs_page_reporting_register(slot))
                }
            }),
        })
    }

    extern "C" fn report_callback(
        info: *mut helpers::page_reporting_dev_info,
        list: *mut bindings::scatterlist,
        count: c_uint,
    ) -> c_int {
        // SAFETY: The kernel calls with what was registered, which is the `info` of a `Self`.
        let data = unsafe {
            let this = container_of!(Opaque::cast_from(info), Self, info);
            &(*this).data
        };
        let Some(list) = NonNull::new(list) else {
            return EINVAL.to_errno();
        };
        // SAFETY: The kernel hands over so many entries for the time of the call.
        unsafe { Self::report(data, list, count as usize) }
    }

    /// # Safety
    ///
    /// As for [`Batch::new`].
    unsafe fn report(data: &T, list: NonNull<bindings::scatterlist>, count: usize) -> c_int {
        // SAFETY: By the requirement of this function.
        stack_pin_init!(let batch = unsafe { Batch::new(list, count) });
        // INVARIANT: The batch is valid until this function returns, which it does after the end.
        data.report(FreePages(NonNull::from(&*batch)));
        let mut seconds = 0u32;
        while !batch.wait_a_second() {
            seconds = seconds.saturating_add(1);
            data.overdue(seconds);
        }
        if batch.acknowledged.load(Relaxed) {
            0
        } else {
            EIO.to_errno()
        }
    }
}

#[pinned_drop]
impl<T: ReportPages> PinnedDrop for PageReporting<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: A value exists only if it was registered, and this is the one place that ends it.
        unsafe { helpers::vbrs_page_reporting_unregister(self.info.get()) };
    }
}

#[kunit_tests(virtio_balloon_rs_mm_reporting)]
mod tests {
    use super::super::PageBlock;
    use super::*;
    use crate::virtio::compat::not_supported;
    use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};
    use crate::virtio::Virtqueue;
    use kernel::sync::atomic::Atomic;
    use kernel::sync::{new_mutex, Mutex};
    use kernel::time::{delay::fsleep, Delta};
    use kernel::workqueue;

    /// What becomes of a report.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Fate {
        Acknowledged,
        Dropped,
        AcknowledgedLater,
        DroppedLater,
    }

    struct Taker {
        fate: Fate,
        blocks: Atomic<usize>,
        pages: Atomic<usize>,
        /// Shortly before the end.
        nearly: Arc<AtomicFlag>,
    }

    impl ReportPages for Taker {
        fn report(&self, pages: FreePages) {
            self.blocks.store(pages.blocks(), Relaxed);
            self.pages.store(pages.pages(), Relaxed);
            let fate = self.fate;
            let end = move |pages: FreePages| match fate {
                Fate::Acknowledged | Fate::AcknowledgedLater => pages.acknowledge(),
                Fate::Dropped | Fate::DroppedLater => drop(pages),
            };
            if matches!(fate, Fate::Acknowledged | Fate::Dropped) {
                self.nearly.store(true, Relaxed);
                return end(pages);
            }
            let nearly = self.nearly.clone();
            let later = move || {
                fsleep(Delta::from_millis(20));
                nearly.store(true, Relaxed);
                end(pages);
            };
            assert!(workqueue::system().try_spawn(GFP_KERNEL, later).is_ok());
        }
    }

    /// Reports two blocks of four pages, as the kernel does.
    fn report_two<T: ReportPages>(taker: &T) -> Result<c_int> {
        let blocks = [
            PageBlock::try_alloc(2).ok_or(ENOMEM)?,
            PageBlock::try_alloc(2).ok_or(ENOMEM)?,
        ];
        let mut list = [bindings::scatterlist::default(); 2];
        // SAFETY: There is room for two entries, and the blocks live until the end of this function.
        unsafe {
            bindings::sg_init_table(list.as_mut_ptr(), 2);
            for (entry, block) in list.iter_mut().zip(&blocks) {
                let length = block.size() as u32;
                helpers::vbrs_sg_set_page(entry, block.as_raw().as_ptr(), length, 0);
            }
        }
        // SAFETY: As above.
        Ok(unsafe { PageReporting::report(taker, NonNull::from(&mut list).cast(), blocks.len()) })
    }

    #[test]
    fn a_report_ends_as_it_was_answered_and_not_before() -> Result {
        for (fate, expected) in [
            (Fate::Acknowledged, 0),
            (Fate::Dropped, EIO.to_errno()),
            (Fate::AcknowledgedLater, 0),
            (Fate::DroppedLater, EIO.to_errno()),
        ] {
            let taker = Taker {
                fate,
                blocks: Atomic::new(0),
                pages: Atomic::new(0),
                nearly: Arc::new(AtomicFlag::new(false), GFP_KERNEL)?,
            };
            assert_eq!(report_two(&taker)?, expected);
            assert!(taker.nearly.load(Relaxed));
            assert_eq!(taker.blocks.load(Relaxed), 2);
            assert_eq!(taker.pages.load(Relaxed), 8);
        }
        Ok(())
    }

    /// A device and its queue of reports. The device is silent, or uses the buffer at once.
    #[pin_data]
    struct Far {
        #[pin]
        bound: Mutex<Option<BoundTestDevice>>,
        queue: Virtqueue<FreePages>,
        silent: bool,
    }

    // SAFETY: A test is one thread.
    unsafe impl Send for Far {}

    // SAFETY: As above.
    unsafe impl Sync for Far {}

    impl ReportPages for Far {
        fn report(&self, pages: FreePages) {
            assert!(self.queue.add(pages).is_ok());
            let bound = self.bound.lock();
            let Some(device) = bound.as_ref().map(|bound| &bound.device) else {
                return;
            };
            let Some(chain) = device.pop_descriptor_chain(0) else {
                return;
            };
            assert_eq!(chain.segments.len(), 2);
            for segment in &chain.segments {
                assert_eq!(
                    (segment.length, segment.writable),
                    (4 * PAGE_SIZE as u32, true)
                );
            }
            if !self.silent {
                device.add_used(0, chain.head, 0);
                let returned = self.queue.get_buf();
                assert!(returned.is_some());
                if let Some((pages, _)) = returned {
                    pages.acknowledge();
                }
            }
        }

        fn overdue(&self, _seconds: u32) {
            assert!(self.silent);
            assert!(self.queue.get_buf().is_none());
            drop(self.bound.lock().take());
        }
    }

    /// A report that the device was given ends when the device answers, or when it is unbound.
    #[test]
    fn a_report_ends_with_its_buffer() -> Result {
        for (silent, expected) in [(false, 0), (true, EIO.to_errno())] {
            let queue = Virtqueue::new(c"test")?;
            let bound = BoundTestDevice::new()?;
            bound.find_queues(&[&queue], CountingHandler::new()?)?;
            let far = pin_init!(Far {
                bound <- new_mutex!(Some(bound), "Far::bound"),
                queue,
                silent,
            });
            let far = KBox::pin_init(far, GFP_KERNEL)?;
            assert_eq!(report_two(&*far)?, expected);
            assert_eq!(far.bound.lock().is_none(), silent);
        }
        Ok(())
    }

    #[pin_data]
    struct Keeper {
        #[pin]
        kept: Mutex<Option<FreePages>>,
        timeout_seconds: u32,
    }

    impl ReportPages for Keeper {
        fn report(&self, pages: FreePages) {
            *self.kept.lock() = Some(pages);
        }

        fn overdue(&self, seconds: u32) {
            if seconds == self.timeout_seconds {
                drop(self.kept.lock().take());
            }
        }
    }

    #[test]
    fn there_is_one_registration_and_it_ends() -> Result {
        let keeper = || {
            Arc::pin_init(
                pin_init!(Keeper {
                    kept <- new_mutex!(None, "Keeper::kept"),
                    timeout_seconds: 1,
                }),
                GFP_KERNEL,
            )
        };
        let register = || KBox::pin_init(PageReporting::register(keeper()?, 8), GFP_KERNEL);
        assert_eq!(
            KBox::pin_init(PageReporting::register(keeper()?, 0), GFP_KERNEL).err(),
            Some(EINVAL)
        );
        for _ in 0..2 {
            match register() {
                Ok(first) => {
                    assert_eq!(register().err(), Some(EBUSY));
                    drop(first);
                }
                // This kernel has no reporting, or a device has it.
                Err(error) => assert!(error == not_supported() || error == EBUSY),
            }
        }
        Ok(())
    }
}
