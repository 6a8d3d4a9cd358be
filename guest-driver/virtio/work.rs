// SPDX-License-Identifier: GPL-2.0

//! Deferred work of a driver that can be unbound at any time.
//!
//! Virtqueue and config callbacks run in interrupt context and can do little more than start work.
//! `kernel::workqueue` can start it, but a driver that goes needs three more things, and here they
//! hold however the driver is written:
//!
//! - **A work queue outlives its tasks.** A [`DelayedWork`] is made for one [`WorkQueue`], keeps it, and
//!   is enqueued there and nowhere else. So no timer of delayed work finds its queue destroyed,
//!   also if the driver forgets to [end](disable) the task.
//! - **The module outlives its work queues.** [`ModuleExit`] waits for the last of them, hence for all
//!   tasks that are queued or running.
//! - **No work waits for itself.** To destroy a work queue means to wait for its work. If the last
//!   reference to one goes in a task of its own, another context destroys it.
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

/// How many work queues exist.
static QUEUES: Atomic<i32> = Atomic::new(0);
/// The first of the work queues that wait for being destroyed by another context than their own.
static ORPHANS: Atomic<*mut Inner> = Atomic::new(ptr::null_mut());

/// A work queue of its own, for work that may take long; frozen while the system sleeps.
///
/// Its work runs on any CPU and does not hold up other work. Clones are the same queue. The last
/// one to be dropped, those of its [`DelayedWork`]s included, waits for work that is still running; it may
/// be dropped wherever one may sleep, also by the queue's own work.
#[derive(Clone)]
pub struct WorkQueue(Arc<Inner>);

/// # Invariants
///
/// `raw` is a work queue which lives until the drop.
struct Inner {
    raw: NonNull<bindings::workqueue_struct>,
    /// The next of the [`ORPHANS`].
    next: Atomic<*mut Inner>,
}

// SAFETY: A work queue may be used and destroyed by any thread.
unsafe impl Send for Inner {}

// SAFETY: A work queue may be used by several threads at once.
unsafe impl Sync for Inner {}

impl WorkQueue {
    /// Makes a work queue with this name. May sleep. Fails with `ENOMEM`.
    pub fn new(name: &CStr) -> Result<Self> {
        destroy_orphans();
        let room = UniqueArc::<Inner>::new_uninit(GFP_KERNEL)?;
        // SAFETY: `name` is a valid string, and is copied.
        let raw = unsafe { helpers::vbrs_alloc_workqueue(name.as_char_ptr()) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        QUEUES.add(1, Relaxed);
        // INVARIANT: The queue was just made, and is destroyed by the drop only.
        let inner = room.write(Inner {
            raw,
            next: Atomic::new(ptr::null_mut()),
        });
        Ok(Self(inner.into()))
    }

    /// Drops this in a task of the queue. Does not wait.
    fn drop_from_work(self) {
        let Some(last) = Arc::into_unique_or_drop(self.0) else {
            return;
        };
        // To destroy the queue here would be to wait for the caller.
        let inner = Arc::into_raw(Arc::from(last)).cast_mut();
        let mut first = ORPHANS.load(Relaxed);
        loop {
            // SAFETY: The reference that was just leaked keeps it valid, and nobody else has one.
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
        // SAFETY: By the invariant the queue exists. Nobody can reach it any more: each task that
        // is queued, delayed or running has a reference. This is none of its own tasks: each gives
        // its reference up by `drop_from_work`.
        unsafe { bindings::destroy_workqueue(self.raw.as_ptr()) };
        QUEUES.fetch_sub(1, Release);
    }
}

/// Destroys the queues whose last reference one of their own tasks had. May sleep.
fn destroy_orphans() {
    let mut next = ORPHANS.xchg(ptr::null_mut(), Acquire);
    while !next.is_null() {
        // SAFETY: `drop_from_work` leaked the reference, and the exchange made the list ours.
        let inner = unsafe { Arc::from_raw(next.cast_const()) };
        next = inner.next.load(Relaxed);
    }
}

/// Keeps the module while it has work queues: to be dropped after all drivers.
///
/// The drop waits for the tasks that nobody ended. May sleep.
/// [`module_virtio_driver!`](crate::module_virtio_driver) makes it.
#[derive(Default)]
pub struct ModuleExit(());

impl ModuleExit {
    /// To be made before the first driver.
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
                pr_warn!("waiting for the work of {left} work queues, which nobody ended\n");
            }
            fsleep(INTERVAL);
        }
    }
}

/// A work item of a `T`, to be a field of it: see [`impl_has_delayed_work!`](crate::impl_has_delayed_work).
///
/// While it is queued, waits for its delay or runs, it has a reference to its `T`.
#[pin_data]
pub struct DelayedWork<T, const ID: u64 = 0> {
    queue: WorkQueue,
    #[pin]
    work: Opaque<bindings::delayed_work>,
    owner: PhantomData<fn(Arc<T>)>,
}

// SAFETY: Work items are usable from any thread.
unsafe impl<T, const ID: u64> Send for DelayedWork<T, ID> {}

// SAFETY: As above.
unsafe impl<T, const ID: u64> Sync for DelayedWork<T, ID> {}

/// Does the work of the [`DelayedWork`] with the number `ID`.
pub trait WorkItem<const ID: u64 = 0>: HasDelayedWork<ID> + Send + Sync + 'static {
    /// Does the work. Process context, may sleep. One call at a time.
    fn run(this: Arc<Self>);
}

/// A type with a field that is the [`DelayedWork`] with the number `ID`.
///
/// # Safety
///
/// Both functions must be true inverses of each other, between a valid `Self` and the field.
pub unsafe trait HasDelayedWork<const ID: u64 = 0>: Sized {
    /// The field in `this`.
    ///
    /// # Safety
    ///
    /// `this` must point to a valid `Self`.
    unsafe fn raw_get_work(this: *const Self) -> *const DelayedWork<Self, ID>;

    /// What the field `dwork` is in.
    ///
    /// # Safety
    ///
    /// `dwork` must point to the field of a valid `Self`.
    unsafe fn work_container_of(dwork: *const DelayedWork<Self, ID>) -> *const Self;
}

/// Says which fields of a type are its [`DelayedWork`](crate::virtio::work::DelayedWork)s.
#[macro_export]
macro_rules! impl_has_delayed_work {
    ($(impl HasDelayedWork<$id:literal> for $self:ty { self.$field:ident })*) => {$(
        #[allow(unsafe_code)]
        // SAFETY: Compiles only if the field has the right type.
        unsafe impl $crate::virtio::work::HasDelayedWork<$id> for $self {
            unsafe fn raw_get_work(this: *const Self) -> *const $crate::virtio::work::DelayedWork<Self, $id> {
                // SAFETY: By the requirement of this function.
                unsafe { &raw const (*this).$field }
            }

            unsafe fn work_container_of(dwork: *const $crate::virtio::work::DelayedWork<Self, $id>) -> *const Self {
                // SAFETY: By the requirement of this function.
                unsafe { ::kernel::container_of!(dwork, Self, $field) }
            }
        }
    )*};
}
pub use crate::impl_has_delayed_work;

/// Makes an initialiser of a [`DelayedWork`](crate::virtio::work::DelayedWork) with this name, for this queue.
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
    /// See [`new_delayed_work!`](crate::new_delayed_work).
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
                // SAFETY: The slot is room for delayed work, and pinned. The function of the timer
                // is that for delayed work, with the flag that it needs.
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

    /// # Safety
    ///
    /// `work` must be the `work` of a task of a `T` that [`enqueue_delayed`] has enqueued, and that the
    /// kernel runs now.
    unsafe extern "C" fn callback(work: *mut bindings::work_struct) {
        // SAFETY: The kernel calls with what was enqueued, which is the `work` of a task that is a
        // field of a `T`; `enqueue_delayed` leaked a reference to that.
        let (item, queue) = unsafe {
            let work = container_of!(work, bindings::delayed_work, work);
            let dwork: *const Self = container_of!(Opaque::cast_from(work), Self, work);
            (
                Arc::from_raw(T::work_container_of(dwork)),
                (*dwork).queue.clone(),
            )
        };
        T::run(item);
        // Whatever of the queue was dropped in there, this is the last of it in this context.
        queue.drop_from_work();
    }
}

/// Enqueues the task, unless it is queued or delayed already, or [ended](disable). Returns whether
/// it was enqueued.
///
/// Any context but NMI.
pub fn enqueue<T: WorkItem<ID>, const ID: u64>(item: &Arc<T>) -> bool {
    enqueue_delayed(item, 0)
}

/// As [`enqueue`], after a delay.
pub fn enqueue_delayed<T: WorkItem<ID>, const ID: u64>(item: &Arc<T>, delay: Jiffies) -> bool {
    let owner = Arc::into_raw(item.clone());
    // SAFETY: The task is valid, and so is its queue, for as long as the reference that was leaked
    // just now is not taken back: by `callback`, `disable`, or below.
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
        // SAFETY: The kernel has not taken the reference.
        drop(unsafe { Arc::from_raw(owner) });
    }
    enqueued
}

/// Ends the task for good: waits while it runs, takes it off its queue, and lets every later attempt
/// to enqueue it fail.
///
/// May sleep. Must not be called from the task itself, nor under a lock that it takes.
pub fn disable<T: WorkItem<ID>, const ID: u64>(item: &Arc<T>) {
    let owner = Arc::as_ptr(item);
    // SAFETY: `owner` is a valid `T`, hence its task, which was initialised with it.
    let was_queued =
        unsafe { bindings::disable_delayed_work_sync((*T::raw_get_work(owner)).work.get()) };
    if was_queued {
        // SAFETY: Enqueueing leaked one reference for `callback` to take back, which will not be
        // called.
        drop(unsafe { Arc::from_raw(owner) });
    }
}

/// Lets others run, if the processor is wanted: for work that goes on for long.
///
/// May sleep.
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

    /// What the tests see of a [`Worker`], which it outlives.
    struct Record {
        runs: Atomic<i32>,
        dropped: AtomicFlag,
        /// The task enqueues itself each time.
        enqueues_itself: bool,
    }

    /// Something with a task.
    #[pin_data(PinnedDrop)]
    struct Worker {
        record: Arc<Record>,
        /// Dropped by the task, after the reference to its `Worker`.
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

    /// Whether this is the one reference that is left.
    fn is_last(worker: Arc<Worker>) -> bool {
        Arc::into_unique_or_drop(worker).is_some()
    }

    #[test]
    fn work_that_is_not_disabled_keeps_its_queue_and_drops_it_last() -> Result {
        for delay in [0, 5] {
            for with_luggage in [false, true] {
                let before = QUEUES.load(Relaxed);
                let queue = WorkQueue::new(c"kunit")?;
                let (worker, record) = worker(queue.clone(), false)?;
                if with_luggage {
                    *worker.extra_queue.lock() = Some(queue.clone());
                }
                assert!(enqueue_delayed(&worker, delay));
                drop((worker, queue));
                assert!(wait_for(|| record.dropped.load(Acquire)));
                assert_eq!(record.runs.load(Relaxed), 1);
                // Its work could not destroy the queue; others do.
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
        // It is queued once.
        assert!(!enqueue(&worker));
        assert!(!enqueue_delayed(&worker, 1));
        disable(&worker);
        assert!(!enqueue(&worker));
        assert!(!enqueue_delayed(&worker, 1));
        // Once more is nothing special.
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
