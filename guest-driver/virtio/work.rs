// SPDX-License-Identifier: GPL-2.0

//! Deferred work of a driver that can be unbound at any time.
//!
//! Virtqueue and config callbacks run in interrupt context and can do little more than start work.
//! `kernel::workqueue` can start it, but cannot stop it: a driver that is being removed must know
//! that none of its work runs or will run. This adds the two missing things, a queue of one's own
//! and an end.
//!
//! C header: `include/linux/workqueue.h`.

use core::ops::Deref;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::container_of;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::workqueue::{HasDelayedWork, HasWork, Queue, Work, WorkItem};

use crate::bindings as helpers;

/// A work queue of its own, for work that may take long; frozen while the system sleeps.
///
/// Its work runs on any CPU and does not hold up other work. Derefs to the kernel crate's
/// [`Queue`], with which work is enqueued.
///
/// Dropping it waits for the work that is queued or running; may sleep. Delayed work whose delay
/// has not passed must be ended before, by [`disable_delayed`].
///
/// # Invariants
///
/// The pointer is that of a work queue which lives until the drop.
pub struct WorkQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A work queue may be used and destroyed by any thread.
unsafe impl Send for WorkQueue {}

// SAFETY: A work queue may be used by several threads at once.
unsafe impl Sync for WorkQueue {}

impl WorkQueue {
    /// Makes a work queue with this name. `ENOMEM` if memory is short.
    pub fn new(name: &CStr) -> Result<Self> {
        // SAFETY: `name` is a valid string, and is copied.
        let raw = unsafe { helpers::vbrs_alloc_workqueue(name.as_char_ptr()) };
        // INVARIANT: The queue was just made, and is destroyed by the drop only.
        NonNull::new(raw).map(Self).ok_or(ENOMEM)
    }
}

impl Deref for WorkQueue {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        // SAFETY: By the invariant the queue lives for as long as `self` does.
        unsafe { Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        // SAFETY: By the invariant the queue exists, and nobody can reach it any more.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// Ends a work item for good: waits while it runs, takes it off its queue, and lets every later
/// attempt to enqueue it fail.
///
/// May sleep. Must not be called from the work item itself, nor under a lock that it takes.
pub fn disable<T, const ID: u64>(item: &Arc<T>)
where
    T: WorkItem<ID, Pointer = Arc<T>> + HasWork<T, ID>,
{
    let owner = Arc::as_ptr(item).cast_mut();
    // SAFETY: `owner` is a valid `T`, hence its work item, which was initialised with it.
    let was_queued = unsafe { bindings::disable_work_sync(raw_work(owner)) };
    if was_queued {
        // SAFETY: Enqueueing leaked one reference for `run` to take back, which will not happen.
        drop(unsafe { Arc::from_raw(owner) });
    }
}

/// As [`disable`], for delayed work; also if its delay has not passed yet.
pub fn disable_delayed<T, const ID: u64>(item: &Arc<T>)
where
    T: WorkItem<ID, Pointer = Arc<T>> + HasDelayedWork<T, ID>,
{
    let owner = Arc::as_ptr(item).cast_mut();
    // SAFETY: `owner` is a valid `T`, whose work item is part of a `delayed_work`, as
    // `HasDelayedWork` guarantees.
    let was_queued = unsafe {
        let work = raw_work(owner);
        bindings::disable_delayed_work_sync(container_of!(work, bindings::delayed_work, work))
    };
    if was_queued {
        // SAFETY: As in `disable`.
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

/// The `work_struct` inside `owner`.
///
/// # Safety
///
/// `owner` must point to a valid `T`.
unsafe fn raw_work<T: HasWork<T, ID>, const ID: u64>(owner: *mut T) -> *mut bindings::work_struct {
    // SAFETY: By this function's requirement.
    unsafe { Work::raw_get(T::raw_get_work(owner)) }
}
