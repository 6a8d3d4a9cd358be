// SPDX-License-Identifier: GPL-2.0

//! Deferred work of a driver that can be unbound at any time.
//!
//! Virtqueue and config callbacks run in interrupt context and can do little more than start work.
//! `kernel::workqueue` can start it, but a driver that goes needs three more things, and here they
//! hold however the driver is written:
//!
//! - **A work queue outlives its tasks.** A [`Task`] is made for one [`WorkQueue`], keeps it, and
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
/// one to be dropped, those of its [`Task`]s included, waits for work that is still running; it may
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
    fn leave(self) {
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
        // its reference up by `leave`.
        unsafe { bindings::destroy_workqueue(self.raw.as_ptr()) };
        QUEUES.fetch_sub(1, Release);
    }
}

/// Destroys the queues whose last reference one of their own tasks had. May sleep.
fn destroy_orphans() {
    let mut next = ORPHANS.xchg(ptr::null_mut(), Acquire);
    while !next.is_null() {
        // SAFETY: `leave` leaked the reference, and the exchange made the list ours.
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

/// A work item of a `T`, to be a field of it: see [`impl_has_task!`](crate::impl_has_task).
///
/// While it is queued, waits for its delay or runs, it has a reference to its `T`.
#[pin_data]
pub struct Task<T, const ID: u64 = 0> {
    queue: WorkQueue,
    #[pin]
    work: Opaque<bindings::delayed_work>,
    owner: PhantomData<fn(Arc<T>)>,
}

// SAFETY: Work items are usable from any thread.
unsafe impl<T, const ID: u64> Send for Task<T, ID> {}

// SAFETY: As above.
unsafe impl<T, const ID: u64> Sync for Task<T, ID> {}

/// Does the work of the [`Task`] with the number `ID`.
pub trait Run<const ID: u64 = 0>: HasTask<ID> + Send + Sync + 'static {
    /// Does the work. Process context, may sleep. One call at a time.
    fn run(this: Arc<Self>);
}

/// A type with a field that is the [`Task`] with the number `ID`.
///
/// # Safety
///
/// Both functions must be true inverses of each other, between a valid `Self` and the field.
pub unsafe trait HasTask<const ID: u64 = 0>: Sized {
    /// The field in `this`.
    ///
    /// # Safety
    ///
    /// `this` must point to a valid `Self`.
    unsafe fn task(this: *const Self) -> *const Task<Self, ID>;

    /// What the field `task` is in.
    ///
    /// # Safety
    ///
    /// `task` must point to the field of a valid `Self`.
    unsafe fn owner(task: *const Task<Self, ID>) -> *const Self;
}

/// Says which fields of a type are its [`Task`](crate::virtio::work::Task)s.
#[macro_export]
macro_rules! impl_has_task {
    ($(impl HasTask<$id:literal> for $self:ty { self.$field:ident })*) => {$(
        #[allow(unsafe_code)]
        // SAFETY: Compiles only if the field has the right type.
        unsafe impl $crate::virtio::work::HasTask<$id> for $self {
            unsafe fn task(this: *const Self) -> *const $crate::virtio::work::Task<Self, $id> {
                // SAFETY: By the requirement of this function.
                unsafe { &raw const (*this).$field }
            }

            unsafe fn owner(task: *const $crate::virtio::work::Task<Self, $id>) -> *const Self {
                // SAFETY: By the requirement of this function.
                unsafe { ::kernel::container_of!(task, Self, $field) }
            }
        }
    )*};
}
pub use crate::impl_has_task;

/// Makes an initialiser of a [`Task`](crate::virtio::work::Task) with this name, for this queue.
#[macro_export]
macro_rules! new_task {
    ($queue:expr, $name:literal) => {
        $crate::virtio::work::Task::new(
            $queue,
            ::kernel::c_str!($name),
            ::kernel::static_lock_class!(),
            ::kernel::c_str!(::core::concat!($name, "_timer")),
            ::kernel::static_lock_class!(),
        )
    };
}
pub use crate::new_task;

impl<T: Run<ID>, const ID: u64> Task<T, ID> {
    /// See [`new_task!`](crate::new_task).
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
            let task: *const Self = container_of!(Opaque::cast_from(work), Self, work);
            (Arc::from_raw(T::owner(task)), (*task).queue.clone())
        };
        T::run(item);
        // Whatever of the queue was dropped in there, this is the last of it in this context.
        queue.leave();
    }
}

/// Enqueues the task, unless it is queued or delayed already, or [ended](disable). Returns whether
/// it was enqueued.
///
/// Any context but NMI.
pub fn enqueue<T: Run<ID>, const ID: u64>(item: &Arc<T>) -> bool {
    enqueue_delayed(item, 0)
}

/// As [`enqueue`], after a delay.
pub fn enqueue_delayed<T: Run<ID>, const ID: u64>(item: &Arc<T>, delay: Jiffies) -> bool {
    let owner = Arc::into_raw(item.clone());
    // SAFETY: The task is valid, and so is its queue, for as long as the reference that was leaked
    // just now is not taken back: by `callback`, `disable`, or below.
    let enqueued = unsafe {
        let task = T::task(owner);
        bindings::queue_delayed_work_on(
            bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
            (*task).queue.0.raw.as_ptr(),
            (*task).work.get(),
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
pub fn disable<T: Run<ID>, const ID: u64>(item: &Arc<T>) {
    let owner = Arc::as_ptr(item);
    // SAFETY: `owner` is a valid `T`, hence its task, which was initialised with it.
    let was_queued = unsafe { bindings::disable_delayed_work_sync((*T::task(owner)).work.get()) };
    if was_queued {
        // SAFETY: Enqueueing leaked one reference for `callback` to take back, which will not be
        // called.
        drop(unsafe { Arc::from_raw(owner) });
    }
}

/// Lets others run, if the processor is wanted: for work that goes on for long.
///
/// May sleep.
pub fn give_way() {
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
        restless: bool,
    }

    /// Something with a task.
    #[pin_data(PinnedDrop)]
    struct Worker {
        record: Arc<Record>,
        /// Dropped by the task, after the reference to its `Worker`.
        #[pin]
        luggage: Mutex<Option<WorkQueue>>,
        #[pin]
        task: Task<Self>,
    }

    impl_has_task! {
        impl HasTask<0> for Worker { self.task }
    }

    impl Run for Worker {
        fn run(this: Arc<Self>) {
            this.record.runs.add(1, Relaxed);
            if this.record.restless {
                enqueue(&this);
            }
            let luggage = this.luggage.lock().take();
            drop(this);
            drop(luggage);
        }
    }

    #[pinned_drop]
    impl PinnedDrop for Worker {
        fn drop(self: Pin<&mut Self>) {
            self.record.dropped.store(true, Release);
        }
    }

    fn worker(queue: WorkQueue, restless: bool) -> Result<(Arc<Worker>, Arc<Record>)> {
        let record = Record {
            runs: Atomic::new(0),
            dropped: AtomicFlag::new(false),
            restless,
        };
        let record = Arc::new(record, GFP_KERNEL)?;
        let seen = record.clone();
        let worker = pin_init!(Worker {
            record: seen,
            luggage <- new_mutex!(None, "Worker::luggage"),
            task <- new_task!(queue, "Worker::task"),
        });
        Ok((Arc::pin_init(worker, GFP_KERNEL)?, record))
    }

    /// Whether this is the one reference that is left.
    fn is_last(worker: Arc<Worker>) -> bool {
        Arc::into_unique_or_drop(worker).is_some()
    }

    #[test]
    fn a_task_that_nobody_ended_has_its_queue_and_is_the_last_to_drop_it() -> Result {
        for delay in [0, 5] {
            for with_luggage in [false, true] {
                let before = QUEUES.load(Relaxed);
                let queue = WorkQueue::new(c"kunit")?;
                let (worker, record) = worker(queue.clone(), false)?;
                if with_luggage {
                    *worker.luggage.lock() = Some(queue.clone());
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
    fn an_ended_task_does_not_run_and_has_no_reference() -> Result {
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
    fn a_task_that_enqueues_itself_ends() -> Result {
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
