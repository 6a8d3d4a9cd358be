// SPDX-License-Identifier: GPL-2.0

//! Wait queues: wait for an event from interrupt context, with a timeout.
//!
//! C header: `include/linux/wait.h`.

use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Full};
use kernel::time::{msecs_to_jiffies, Msecs};
use kernel::types::Opaque;

use crate::bindings as helpers;

/// A wait queue with a count of wakeups.
///
/// To wait for a condition, read [`wakeups`](Self::wakeups), then check the condition, then call
/// [`wait_timeout`](Self::wait_timeout) with the count. A wakeup after the first step ends the
/// wait, so none is missed. This requires no lock, so wakeups may come from interrupt context.
///
/// Unlike [`CondVar`](kernel::sync::CondVar), it has a wait with a timeout that signals do not
/// interrupt: the waiter may be any process that allocates memory.
#[doc(alias = "wait_queue_head")]
#[pin_data]
pub struct WaitQueue {
    #[pin]
    waiters: Opaque<bindings::wait_queue_head>,
    wakeups: Atomic<u32>,
}

// SAFETY: Any thread may use a wait queue.
unsafe impl Send for WaitQueue {}

// SAFETY: A wait queue has its own lock, and the count is atomic.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Creates a wait queue without waiters, and with no wakeups.
    #[doc(alias = "init_waitqueue_head")]
    pub fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            waiters <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes, and pinned.
                unsafe { helpers::vbrs_wait_queue_init(slot) }
            }),
            wakeups: Atomic::new(0),
        })
    }

    /// Wakes all waiters. Any context but NMI.
    #[inline]
    pub fn wake_up_all(&self) {
        self.wakeups.fetch_add(1, Full);
        // SAFETY: The wait queue is initialised and pinned.
        unsafe { helpers::vbrs_wake_up_all(self.waiters.get()) };
    }

    /// Returns the number of wakeups. Wraps. Any context.
    pub fn wakeups(&self) -> u32 {
        self.wakeups.load(kernel::sync::atomic::Acquire)
    }

    /// Waits until the number of [`wakeups`](Self::wakeups) differs from `seen`, for at most
    /// `limit` milliseconds. Returns whether it does.
    ///
    /// Sleeps, and signals do not interrupt it. Does not allocate memory.
    #[doc(alias = "wait_event_timeout")]
    #[inline]
    pub fn wait_timeout(&self, seen: u32, limit: Msecs) -> bool {
        // SAFETY: The wait queue is initialised, and the counter is valid. Both are pinned.
        unsafe {
            helpers::vbrs_wait_event_timeout(
                self.waiters.get(),
                (&raw const self.wakeups).cast(),
                seen,
                msecs_to_jiffies(limit),
            )
        }
    }
}

#[kunit_tests(virtio_balloon_rs_wait_queue)]
mod tests {
    use super::*;
    use kernel::sync::Arc;

    #[test]
    fn a_wakeup_before_the_wait_ends_it() -> Result {
        let wait_queue = Arc::pin_init(WaitQueue::new(), GFP_KERNEL)?;
        let seen = wait_queue.wakeups();
        wait_queue.wake_up_all();
        assert!(wait_queue.wait_timeout(seen, 60_000));
        // `wakeups` includes the wakeup above, so only a further one would end the wait.
        assert!(!wait_queue.wait_timeout(wait_queue.wakeups(), 1));
        Ok(())
    }

    #[test]
    fn a_wakeup_from_another_context_ends_the_wait() -> Result {
        let wait_queue = Arc::pin_init(WaitQueue::new(), GFP_KERNEL)?;
        let seen = wait_queue.wakeups();
        let other = wait_queue.clone();
        kernel::workqueue::system().try_spawn(GFP_KERNEL, move || other.wake_up_all())?;
        assert!(wait_queue.wait_timeout(seen, 60_000));
        Ok(())
    }
}
