// SPDX-License-Identifier: GPL-2.0

//! Free page reporting.
//!
//! The kernel isolates blocks of free pages from the free lists and reports them to one
//! [`ReportPages`] in the system, as a [`FreePages`]. The pages return to the free lists when the
//! `FreePages` is dropped or acknowledged. A driver sends the `FreePages` through a
//! [`Virtqueue`](crate::virtio::Virtqueue), which owns it while the device uses the buffer. So the
//! device no longer uses the pages once they are back in the free lists.
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
use crate::virtio::compat::not_supported;
use crate::virtio::{Buffer, Segments};

/// The default order of the blocks: the default of the kernel, except where that would be 512 MiB.
/// The C driver `virtio_balloon` uses the same default.
const DEFAULT_ORDER: u32 = if cfg!(all(CONFIG_ARM64, CONFIG_ARM64_64K_PAGES)) {
    5
} else {
    helpers::PAGE_REPORTING_ORDER_UNSPECIFIED as u32
};

/// Callbacks of free page reporting.
///
/// The kernel calls both methods from a work item, one call at a time. They may sleep. They must
/// not wait for memory to be reclaimed, because the reported pages are not in the free lists
/// meanwhile.
pub trait ReportPages: Send + Sync + 'static {
    /// Called with a report of free pages.
    ///
    /// The kernel makes no further report until `pages` is dropped or
    /// [acknowledged](FreePages::acknowledge). That may happen after this method has returned, and
    /// in any context but NMI.
    fn report(&self, pages: FreePages);

    /// Called once a second while the last report is pending, with its age in seconds.
    fn overdue(&self, seconds: u32) {
        let _ = seconds;
    }
}

/// A report: blocks of free pages, which are isolated from the free lists while this exists.
///
/// As a [`Buffer`] it has one segment for each block. The kernel does not access the pages while
/// the report is pending.
///
/// # Invariants
///
/// The batch is valid until [`Batch::end`] is called for it, and this is the only `FreePages` of
/// the batch.
#[doc(alias = "scatterlist")]
pub struct FreePages(NonNull<Batch>);

// SAFETY: The batch is not bound to a thread, and only one `FreePages` refers to it.
unsafe impl Send for FreePages {}

impl FreePages {
    fn batch(&self) -> &Batch {
        // SAFETY: By the type invariants, the batch is valid.
        unsafe { self.0.as_ref() }
    }

    /// Returns the number of blocks.
    pub fn blocks(&self) -> usize {
        self.batch().count
    }

    /// Returns the total number of pages in the blocks.
    pub fn pages(&self) -> usize {
        let bytes = self.batch().entries().map(|(_, length)| length as usize);
        bytes.sum::<usize>() / PAGE_SIZE
    }

    /// Returns the pages to the free lists as reported. The kernel does not report them again until
    /// they have been allocated and freed.
    ///
    /// To return the pages as not reported, drop the value. Any context but NMI.
    pub fn acknowledge(self) {
        self.batch().acknowledged.store(true, Relaxed);
    }
}

impl Drop for FreePages {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, the batch is valid, and this is its only `FreePages`,
        // which is not used again.
        unsafe { Batch::end(self.0) };
    }
}

// SAFETY: The segments are the blocks of the report. The kernel keeps them out of the free lists
// until the batch ends, so no other code accesses them. The token is the pointer to the batch,
// which has the alignment of a pointer.
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
        // INVARIANT: The token comes from `into_token`, and the invariants held then.
        Self(token.cast())
    }
}

/// One report, on the stack of the callback, which waits for its end.
#[pin_data]
struct Batch {
    list: NonNull<bindings::scatterlist>,
    count: usize,
    acknowledged: AtomicFlag,
    #[pin]
    ended: Opaque<bindings::completion>,
}

impl Batch {
    /// Creates a batch.
    ///
    /// # Safety
    ///
    /// `list` must be an array of `count` entries with pages, and must not change until the batch
    /// has ended.
    unsafe fn new(list: NonNull<bindings::scatterlist>, count: usize) -> impl PinInit<Self> {
        pin_init!(Self {
            list,
            count,
            acknowledged: AtomicFlag::new(false),
            // SAFETY: The slot is pinned memory for a completion.
            ended <- Opaque::ffi_init(|slot| unsafe { bindings::init_completion(slot) }),
        })
    }

    /// Returns the first page and the size in bytes of each block.
    fn entries(&self) -> impl Iterator<Item = (NonNull<bindings::page>, u32)> + '_ {
        (0..self.count).filter_map(|index| {
            // SAFETY: By the safety requirements of `new`, the array has `count` entries, each with
            // a page.
            unsafe {
                let entry = self.list.as_ptr().add(index);
                let page = NonNull::new(helpers::vbrs_sg_page(entry))?;
                Some((page, (*entry).length))
            }
        })
    }

    /// Ends the batch, which wakes the callback. The batch may be freed before this function
    /// returns.
    ///
    /// # Safety
    ///
    /// The batch must be valid, and must not be used afterwards.
    unsafe fn end(batch: NonNull<Self>) {
        // SAFETY: The batch stays valid until the waiter has seen the completion. The waiter checks
        // the completion under the same lock under which it is completed.
        unsafe { bindings::complete_all((*batch.as_ptr()).ended.get()) };
    }

    /// Waits for the end of the batch, for one second at most. Returns whether it has ended.
    fn wait_a_second(&self) -> bool {
        // An interruptible wait, because the device may take long: the hung-task detector and the
        // load average ignore such a wait. A work item gets no signals.
        // SAFETY: The completion is initialised and pinned.
        let left = unsafe {
            bindings::wait_for_completion_interruptible_timeout(
                self.ended.get(),
                msecs_to_jiffies(1000),
            )
        };
        left > 0
    }
}

/// A registration for free page reporting. Only one can exist in the system.
///
/// Dropping it ends the registration and **waits for the end of a pending report**. If the device
/// has the pages, that is until it uses the buffer. To avoid this wait, reset the device and drop
/// the buffers that were detached from the queue before dropping the registration. May sleep.
#[doc(alias = "page_reporting_dev_info")]
#[doc(alias = "page_reporting_unregister")]
#[pin_data(PinnedDrop)]
pub struct PageReporting<T: ReportPages> {
    data: Arc<T>,
    #[pin]
    info: Opaque<helpers::page_reporting_dev_info>,
}

// SAFETY: Any thread may end the registration, and `T` is `Send` and `Sync`.
unsafe impl<T: ReportPages> Send for PageReporting<T> {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: ReportPages> Sync for PageReporting<T> {}

impl<T: ReportPages> PageReporting<T> {
    /// Registers `data` for reports of up to `capacity` blocks each, at most 32
    /// (`PAGE_REPORTING_CAPACITY`).
    ///
    /// The kernel's parameter `page_reporting.page_reporting_order` sets the order of the blocks.
    /// Its default is the order of a pageblock. On ARM64 with 64 KiB pages a pageblock would be 512
    /// MiB, so the default there is 2 MiB. The C driver `virtio_balloon` uses the same defaults.
    ///
    /// May sleep. The kernel's parameter `page_reporting.page_reporting_delay_ms` delays the first
    /// report, by 2 seconds if it is not set.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if another registration exists, `EOPNOTSUPP` if the kernel is built without free
    /// page reporting, [`EINVAL`] if `capacity` is 0.
    #[doc(alias = "page_reporting_register")]
    pub fn register(data: Arc<T>, capacity: usize) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            data,
            info <- Opaque::try_ffi_init(|slot: *mut helpers::page_reporting_dev_info| {
                if capacity == 0 {
                    return Err(EINVAL);
                }
                if !cfg!(CONFIG_PAGE_REPORTING) {
                    return Err(not_supported());
                }
                let capacity = capacity.min(Segments::MAX) as u32;
                // SAFETY: `slot` is pinned memory, which is fully initialised before the
                // registration. So is `data`, which the callback uses.
                unsafe {
                    slot.write_bytes(0, 1);
                    (*slot).report = Some(Self::report_callback);
                    (*slot).order = DEFAULT_ORDER;
                    (*slot).capacity = capacity;
                    to_result(helpers::page_reporting_register(slot))
                }
            }),
        })
    }

    extern "C" fn report_callback(
        info: *mut helpers::page_reporting_dev_info,
        list: *mut bindings::scatterlist,
        count: c_uint,
    ) -> c_int {
        // SAFETY: The kernel passes the registered structure, which is the field `info` of a
        // `Self`.
        let data = unsafe {
            let this = container_of!(Opaque::cast_from(info), Self, info);
            &(*this).data
        };
        let Some(list) = NonNull::new(list) else {
            return EINVAL.to_errno();
        };
        // SAFETY: The kernel passes an array of `count` entries with pages, which does not change
        // during the call.
        unsafe { Self::report(data, list, count as usize) }
    }

    /// Reports the pages of `list` to `data`, and waits until the report ends. Returns 0 if the
    /// report was acknowledged, or a negative error number.
    ///
    /// # Safety
    ///
    /// As for [`Batch::new`].
    unsafe fn report(data: &T, list: NonNull<bindings::scatterlist>, count: usize) -> c_int {
        // SAFETY: By the safety requirements of this function, `list` has `count` entries with
        // pages. It does not change before this function returns, which is after the end of the
        // batch.
        stack_pin_init!(let batch = unsafe { Batch::new(list, count) });
        // INVARIANT: The batch is valid until this function returns, which is after `Batch::end`.
        // No other `FreePages` refers to it.
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
        // Without free page reporting, the kernel does not have the function.
        if cfg!(CONFIG_PAGE_REPORTING) {
            // SAFETY: A value only exists if the registration succeeded, and only `drop` ends it.
            unsafe { helpers::page_reporting_unregister(self.info.get()) };
        }
    }
}

#[kunit_tests(virtio_balloon_rs_mm_reporting)]
mod tests {
    use super::super::PageBlock;
    use super::*;
    use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};
    use crate::virtio::Virtqueue;
    use kernel::sync::atomic::Atomic;
    use kernel::sync::{new_mutex, Mutex};
    use kernel::time::{delay::fsleep, Delta};
    use kernel::workqueue;

    /// How a report ends.
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
        /// Set just before the report ends.
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
        // SAFETY: The table has two entries, and the blocks live until the end of this function.
        unsafe {
            bindings::sg_init_table(list.as_mut_ptr(), 2);
            for (entry, block) in list.iter_mut().zip(&blocks) {
                let length = block.size() as u32;
                helpers::vbrs_sg_set_page(entry, block.as_raw().as_ptr(), length, 0);
            }
        }
        // SAFETY: The table has two entries with pages, and does not change during the call.
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

    /// A device with a reporting queue. It uses each buffer at once, unless it is `silent`.
    #[pin_data]
    struct Far {
        #[pin]
        bound: Mutex<Option<BoundTestDevice>>,
        queue: Virtqueue<FreePages>,
        silent: bool,
    }

    // SAFETY: The test uses the value from one thread only.
    unsafe impl Send for Far {}

    // SAFETY: The test uses the value from one thread only.
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

    /// A pending report ends when the device uses the buffer, or when the device is unbound.
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
                // The kernel has no free page reporting, or a device is registered for it.
                Err(error) => assert!(error == not_supported() || error == EBUSY),
            }
        }
        Ok(())
    }
}
