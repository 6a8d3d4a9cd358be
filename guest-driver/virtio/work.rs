// SPDX-License-Identifier: GPL-2.0

//! Deferred work for drivers that can be unbound at any time.
//!
//! Virtqueue and config callbacks run in interrupt context, and usually only enqueue a work item.
//! `kernel::workqueue` can do that, but unloading a driver safely requires three more guarantees.
//! This module enforces them for any driver:
//!
//! - **A work queue outlives its work items.** A [`DelayedWork`] belongs to one [`WorkQueue`], has
//!   a reference to it, and is only enqueued there. So the timer of delayed work never finds its
//!   queue destroyed, even if the driver does not [`disable`] the work item.
//! - **The module outlives its work queues.** [`ModuleExit`] waits until the last work queue is
//!   destroyed, and therefore for all work items that are queued or running.
//! - **A work item does not wait for itself.** Destroying a work queue waits for its work items. If
//!   one of them drops the last reference to the queue, another context destroys the queue.
//!
//! C header: `include/linux/workqueue.h`.

use core::marker::PhantomData;
use core::ptr::{self, NonNull};

use kernel::bindings;
use kernel::container_of;
use kernel::prelude::*;
use kernel::sync::atomic::{Acquire, Atomic, Relaxed, Release};
use kernel::sync::{Arc, LockClassKey, UniqueArc};
use kernel::time::delay::fsleep;
use kernel::time::{Delta, Jiffies};
use kernel::types::Opaque;

use crate::bindings as helpers;

/// The kernel's default for the number of work items of a queue that run at once.
const DEFAULT_MAX_ACTIVE: c_int = 0;

/// The number of work queues.
static QUEUES: Atomic<i32> = Atomic::new(0);
/// A list of work queues whose last reference was dropped by one of their own work items. Another
/// context has to destroy them.
static ORPHANS: Atomic<*mut Inner> = Atomic::new(ptr::null_mut());

/// A work queue for work that may take long. It is frozen while the system sleeps.
///
/// Work items run on any CPU, and do not delay those of other queues. Clones are the same queue.
/// [`DelayedWork`]s also have a reference to their queue. Dropping the last reference waits for
/// running work items. It may be dropped in any context that may sleep, also by a work item of the
/// queue.
#[doc(alias = "workqueue_struct")]
#[doc(alias = "destroy_workqueue")]
#[derive(Clone)]
pub struct WorkQueue(Arc<Inner>);

/// # Invariants
///
/// `raw` is a valid work queue until `drop`.
struct Inner {
    raw: NonNull<bindings::workqueue_struct>,
    /// The next entry of the list [`ORPHANS`].
    next: Atomic<*mut Inner>,
}

// SAFETY: Any thread may use and destroy a work queue.
unsafe impl Send for Inner {}

// SAFETY: Several threads may use a work queue concurrently.
unsafe impl Sync for Inner {}

impl WorkQueue {
    /// Creates a work queue with this name. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    #[doc(alias = "alloc_workqueue")]
    pub fn new(name: &CStr) -> Result<Self> {
        destroy_orphans();
        let room = UniqueArc::<Inner>::new_uninit(GFP_KERNEL)?;
        let flags = bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags_WQ_FREEZABLE;
        // SAFETY: `name` is a valid string, and the kernel copies it.
        let raw =
            unsafe { helpers::vbrs_alloc_workqueue(name.as_char_ptr(), flags, DEFAULT_MAX_ACTIVE) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        QUEUES.add(1, Relaxed);
        // INVARIANT: The queue was created above, and only `drop` destroys it.
        let inner = room.write(Inner {
            raw,
            next: Atomic::new(ptr::null_mut()),
        });
        Ok(Self(inner.into()))
    }

    /// Drops the reference in a work item of the queue. Does not wait.
    fn drop_from_work(self) {
        let Some(last) = Arc::into_unique_or_drop(self.0) else {
            return;
        };
        // Destroying the queue here would wait for the caller.
        let inner = Arc::into_raw(Arc::from(last)).cast_mut();
        let mut first = ORPHANS.load(Relaxed);
        loop {
            // SAFETY: This is the last reference to `inner`, and it was leaked above. So `inner` is
            // valid, and no other code uses it.
            unsafe { (*inner).next.store(first, Relaxed) };
            match ORPHANS.cmpxchg(first, inner, Release) {
                Ok(_) => return,
                Err(now) => first = now,
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, the queue is valid. No other code can use it: each work
        // item that is queued, delayed or running has a reference. This is not a work item of the
        // queue, because those drop their reference with `drop_from_work`.
        unsafe { bindings::destroy_workqueue(self.raw.as_ptr()) };
        QUEUES.fetch_sub(1, Release);
    }
}

/// Destroys the work queues in [`ORPHANS`]. May sleep.
fn destroy_orphans() {
    let mut next = ORPHANS.xchg(ptr::null_mut(), Acquire);
    while !next.is_null() {
        // SAFETY: `drop_from_work` leaked this reference, and the exchange made this context the
        // only owner of the list.
        let inner = unsafe { Arc::from_raw(next.cast_const()) };
        next = inner.next.load(Relaxed);
    }
}

/// Keeps the module loaded while it has work queues. Must be dropped after all drivers.
///
/// Dropping it waits for work items that are not disabled. May sleep.
/// [`module_virtio_driver!`](crate::module_virtio_driver) creates it.
#[derive(Default)]
pub struct ModuleExit(());

impl ModuleExit {
    /// Creates the value. Must be called before the first driver is registered.
    pub const fn new() -> Self {
        Self(())
    }
}

impl Drop for ModuleExit {
    fn drop(&mut self) {
        const INTERVAL: Delta = Delta::from_millis(10);
        /// The number of intervals before a warning.
        const WARN_AFTER: u32 = 1000;

        let mut times = 0u32;
        loop {
            destroy_orphans();
            let left = QUEUES.load(Acquire);
            if left == 0 {
                return;
            }
            times = times.saturating_add(1);
            if times == WARN_AFTER {
                pr_warn!("waiting for {left} work queues whose work items are not disabled\n");
            }
            fsleep(INTERVAL);
        }
    }
}

/// A delayed work item of a `T`, as a field of `T`: see
/// [`impl_has_delayed_work!`](crate::impl_has_delayed_work).
///
/// It has a reference to its `T` while it is queued, delayed or running.
#[doc(alias = "delayed_work")]
#[pin_data]
pub struct DelayedWork<T, const ID: u64 = 0> {
    queue: WorkQueue,
    #[pin]
    work: Opaque<bindings::delayed_work>,
    owner: PhantomData<fn(Arc<T>)>,
}

// SAFETY: Any thread may use a work item.
unsafe impl<T, const ID: u64> Send for DelayedWork<T, ID> {}

// SAFETY: Several threads may use a work item concurrently.
unsafe impl<T, const ID: u64> Sync for DelayedWork<T, ID> {}

/// The function of the [`DelayedWork`] with the number `ID`.
pub trait WorkItem<const ID: u64 = 0>: HasDelayedWork<ID> + Send + Sync + 'static {
    /// Runs the work item. Process context, may sleep. Calls do not overlap.
    #[doc(alias = "work_func_t")]
    fn run(this: Arc<Self>);
}

/// A type that has the [`DelayedWork`] with the number `ID` as a field.
///
/// # Safety
///
/// Both functions must be inverses of each other, between a valid `Self` and its field.
pub unsafe trait HasDelayedWork<const ID: u64 = 0>: Sized {
    /// Returns the field of `this`.
    ///
    /// # Safety
    ///
    /// `this` must point to a valid `Self`.
    unsafe fn raw_get_work(this: *const Self) -> *const DelayedWork<Self, ID>;

    /// Returns the value that contains the field `dwork`.
    ///
    /// # Safety
    ///
    /// `dwork` must point to the field of a valid `Self`.
    unsafe fn work_container_of(dwork: *const DelayedWork<Self, ID>) -> *const Self;
}

/// Declares which fields of a type are its [`DelayedWork`]s.
#[macro_export]
macro_rules! impl_has_delayed_work {
    ($(impl HasDelayedWork<$id:literal> for $self:ty { self.$field:ident })*) => {$(
        #[allow(unsafe_code)]
        // SAFETY: Both functions use the same field. They only compile if the field has the right
        // type.
        unsafe impl $crate::virtio::work::HasDelayedWork<$id> for $self {
            unsafe fn raw_get_work(this: *const Self) -> *const $crate::virtio::work::DelayedWork<Self, $id> {
                // SAFETY: By the safety requirements of this function, `this` points to a valid
                // `Self`.
                unsafe { &raw const (*this).$field }
            }

            unsafe fn work_container_of(dwork: *const $crate::virtio::work::DelayedWork<Self, $id>) -> *const Self {
                // SAFETY: By the safety requirements of this function, `dwork` points to the field
                // of a valid `Self`.
                unsafe { ::kernel::container_of!(dwork, Self, $field) }
            }
        }
    )*};
}
pub use crate::impl_has_delayed_work;

/// Returns an initialiser of a [`DelayedWork`] with this name,
/// for this work queue.
#[macro_export]
macro_rules! new_delayed_work {
    ($queue:expr, $name:literal) => {
        $crate::virtio::work::DelayedWork::new(
            $queue,
            ::kernel::c_str!($name),
            ::kernel::static_lock_class!(),
            ::kernel::c_str!(::core::concat!($name, "_timer")),
            ::kernel::static_lock_class!(),
        )
    };
}
pub use crate::new_delayed_work;

impl<T: WorkItem<ID>, const ID: u64> DelayedWork<T, ID> {
    /// Returns an initialiser: see [`new_delayed_work!`](crate::new_delayed_work).
    #[doc(alias = "INIT_DELAYED_WORK")]
    #[inline]
    pub fn new(
        queue: WorkQueue,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
        timer_name: &'static CStr,
        timer_key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        pin_init!(Self {
            queue,
            work <- Opaque::ffi_init(|slot: *mut bindings::delayed_work| {
                // SAFETY: The slot is pinned memory for delayed work. The timer has the function
                // for delayed work, and the flag that this function requires.
                unsafe {
                    bindings::init_work_with_key(
                        &raw mut (*slot).work,
                        Some(Self::callback),
                        false,
                        name.as_char_ptr(),
                        key.as_ptr(),
                    );
                    bindings::timer_init_key(
                        &raw mut (*slot).timer,
                        Some(bindings::delayed_work_timer_fn),
                        bindings::TIMER_IRQSAFE,
                        timer_name.as_char_ptr(),
                        timer_key.as_ptr(),
                    );
                }
            }),
            owner: PhantomData,
        })
    }

    /// Runs the work item.
    ///
    /// # Safety
    ///
    /// The kernel must call it for the `work` of a [`DelayedWork`] that [`enqueue_delayed`] has
    /// enqueued.
    unsafe extern "C" fn callback(work: *mut bindings::work_struct) {
        // SAFETY: By the safety requirements of this function, `work` is the `work` of a
        // `DelayedWork`, which is a field of a `T`. `enqueue_delayed` leaked a reference to that
        // `T`.
        let (item, queue) = unsafe {
            let work = container_of!(work, bindings::delayed_work, work);
            let dwork: *const Self = container_of!(Opaque::cast_from(work), Self, work);
            (
                Arc::from_raw(T::work_container_of(dwork)),
                (*dwork).queue.clone(),
            )
        };
        T::run(item);
        // The work item may have dropped other references to the queue. This is the last one in
        // this context.
        queue.drop_from_work();
    }
}

/// Enqueues the work item, unless it is queued, delayed or [disabled](disable). Returns whether it
/// was enqueued.
///
/// Any context but NMI.
#[doc(alias = "queue_work")]
#[inline]
pub fn enqueue<T: WorkItem<ID>, const ID: u64>(item: &Arc<T>) -> bool {
    enqueue_delayed(item, 0)
}

/// Enqueues the work item after a delay: see [`enqueue`].
#[doc(alias = "queue_delayed_work")]
pub fn enqueue_delayed<T: WorkItem<ID>, const ID: u64>(item: &Arc<T>, delay: Jiffies) -> bool {
    let owner = Arc::into_raw(item.clone());
    // SAFETY: The leaked reference keeps the work item and its queue valid. It is only dropped by
    // `callback`, by `disable`, or below.
    let enqueued = unsafe {
        let dwork = T::raw_get_work(owner);
        bindings::queue_delayed_work_on(
            bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
            (*dwork).queue.0.raw.as_ptr(),
            (*dwork).work.get(),
            delay,
        )
    };
    if !enqueued {
        // SAFETY: The work item was not enqueued, so the leaked reference is still ours.
        drop(unsafe { Arc::from_raw(owner) });
    }
    enqueued
}

/// Disables the work item: waits while it runs, removes it from its queue, and makes all later
/// attempts to enqueue it fail.
///
/// May sleep. Must not be called from the work item, nor while holding a lock that it takes.
#[doc(alias = "disable_delayed_work_sync")]
pub fn disable<T: WorkItem<ID>, const ID: u64>(item: &Arc<T>) {
    let owner = Arc::as_ptr(item);
    // SAFETY: `owner` points to a valid `T`, which contains the initialised work item.
    let was_queued =
        unsafe { bindings::disable_delayed_work_sync((*T::raw_get_work(owner)).work.get()) };
    if was_queued {
        // SAFETY: `enqueue_delayed` leaked a reference for `callback`, which is not called.
        drop(unsafe { Arc::from_raw(owner) });
    }
}

/// Reschedules if another task needs the CPU. Call it in long loops.
///
/// May sleep.
#[inline]
pub fn cond_resched() {
    // SAFETY: May be called in any context that may sleep.
    unsafe { helpers::vbrs_cond_resched() };
}

#[kunit_tests(virtio_balloon_rs_work)]
mod tests {
    use super::*;
    use crate::virtio::kunit_device::wait_for;
    use kernel::sync::atomic::AtomicFlag;
    use kernel::sync::{new_mutex, Mutex};

    /// The state of a [`Worker`] that tests check. It outlives the worker.
    struct Record {
        runs: Atomic<i32>,
        dropped: AtomicFlag,
        /// Whether the work item enqueues itself each time.
        enqueues_itself: bool,
    }

    /// The owner of a work item.
    #[pin_data(PinnedDrop)]
    struct Worker {
        record: Arc<Record>,
        /// Dropped by the work item, after the reference to its `Worker`.
        #[pin]
        extra_queue: Mutex<Option<WorkQueue>>,
        #[pin]
        work: DelayedWork<Self>,
    }

    impl_has_delayed_work! {
        impl HasDelayedWork<0> for Worker { self.work }
    }

    impl WorkItem for Worker {
        fn run(this: Arc<Self>) {
            this.record.runs.add(1, Relaxed);
            if this.record.enqueues_itself {
                enqueue(&this);
            }
            let extra_queue = this.extra_queue.lock().take();
            drop(this);
            drop(extra_queue);
        }
    }

    #[pinned_drop]
    impl PinnedDrop for Worker {
        fn drop(self: Pin<&mut Self>) {
            self.record.dropped.store(true, Release);
        }
    }

    fn worker(queue: WorkQueue, enqueues_itself: bool) -> Result<(Arc<Worker>, Arc<Record>)> {
        let record = Record {
            runs: Atomic::new(0),
            dropped: AtomicFlag::new(false),
            enqueues_itself,
        };
        let record = Arc::new(record, GFP_KERNEL)?;
        let seen = record.clone();
        let worker = pin_init!(Worker {
            record: seen,
            extra_queue <- new_mutex!(None, "Worker::extra_queue"),
            work <- new_delayed_work!(queue, "Worker::work"),
        });
        Ok((Arc::pin_init(worker, GFP_KERNEL)?, record))
    }

    /// Returns whether this is the last reference.
    fn is_last(worker: Arc<Worker>) -> bool {
        Arc::into_unique_or_drop(worker).is_some()
    }

    #[test]
    fn work_that_is_not_disabled_keeps_its_queue_and_drops_it_last() -> Result {
        for delay in [0, 5] {
            for with_extra_queue in [false, true] {
                let before = QUEUES.load(Relaxed);
                let queue = WorkQueue::new(c"kunit")?;
                let (worker, record) = worker(queue.clone(), false)?;
                if with_extra_queue {
                    *worker.extra_queue.lock() = Some(queue.clone());
                }
                assert!(enqueue_delayed(&worker, delay));
                drop((worker, queue));
                assert!(wait_for(|| record.dropped.load(Acquire)));
                assert_eq!(record.runs.load(Relaxed), 1);
                // The work item could not destroy the queue, so another context does.
                assert!(wait_for(|| {
                    destroy_orphans();
                    QUEUES.load(Acquire) == before
                }));
            }
        }
        Ok(())
    }

    #[test]
    fn disabled_work_does_not_run_and_has_no_reference() -> Result {
        let queue = WorkQueue::new(c"kunit")?;
        let (worker, record) = worker(queue, false)?;
        assert!(enqueue_delayed(&worker, Jiffies::MAX / 4));
        // It is already queued.
        assert!(!enqueue(&worker));
        assert!(!enqueue_delayed(&worker, 1));
        disable(&worker);
        assert!(!enqueue(&worker));
        assert!(!enqueue_delayed(&worker, 1));
        // Disabling it again is allowed.
        disable(&worker);
        assert_eq!(record.runs.load(Relaxed), 0);
        assert!(is_last(worker));
        assert!(record.dropped.load(Acquire));
        Ok(())
    }

    #[test]
    fn work_that_enqueues_itself_can_be_disabled() -> Result {
        let queue = WorkQueue::new(c"kunit")?;
        let (worker, record) = worker(queue, true)?;
        assert!(enqueue(&worker));
        assert!(wait_for(|| record.runs.load(Relaxed) > 100));
        disable(&worker);
        let runs = record.runs.load(Relaxed);
        assert!(!enqueue(&worker));
        fsleep(Delta::from_millis(20));
        assert_eq!(record.runs.load(Relaxed), runs);
        assert!(is_last(worker));
        Ok(())
    }

    #[test]
    fn a_queue_waits_for_its_work() -> Result {
        let before = QUEUES.load(Relaxed);
        let queue = WorkQueue::new(c"kunit")?;
        let (first, first_record) = worker(queue.clone(), false)?;
        let (second, second_record) = worker(queue, false)?;
        for worker in [&first, &second] {
            assert!(enqueue(worker));
            disable(worker);
        }
        drop(first);
        assert!(first_record.dropped.load(Acquire));
        assert_eq!(QUEUES.load(Relaxed), before + 1);
        drop(second);
        assert!(second_record.dropped.load(Acquire));
        assert_eq!(QUEUES.load(Relaxed), before);
        Ok(())
    }
}
