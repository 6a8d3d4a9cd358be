// SPDX-License-Identifier: GPL-2.0

//! Waiting for what interrupts bring, for a limited time.
//!
//! C header: `include/linux/wait.h`.

use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Full};
use kernel::time::{msecs_to_jiffies, Msecs};
use kernel::types::Opaque;

use crate::bindings as helpers;

/// Says that something may have happened, to whoever waits for it.
///
/// Who waits takes the [`wakeups`](Self::wakeups) first, then looks for what it waits for, and only then
/// [`wait_timeout`](Self::wait_timeout)s: a signal that comes after the first step ends the wait. So none is missed,
/// without a lock that interrupts would have to take.
///
/// Unlike [`CondVar`](kernel::sync::CondVar) it can be waited for with a limit and regardless of
/// signals to the process: whoever waits may be a process that only wants some memory.
#[pin_data]
pub struct WaitQueue {
    #[pin]
    waiters: Opaque<bindings::wait_queue_head>,
    wakeups: Atomic<u32>,
}

// SAFETY: A wait queue may be used from any thread.
unsafe impl Send for WaitQueue {}

// SAFETY: A wait queue has its own lock.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// A signal that was not raised yet.
    pub fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            waiters <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes, and pinned.
                unsafe { helpers::vbrs_wait_queue_init(slot) }
            }),
            wakeups: Atomic::new(0),
        })
    }

    /// Wakes all who wait. Any context but NMI.
    pub fn wake_up_all(&self) {
        self.wakeups.fetch_add(1, Full);
        // SAFETY: The wait queue was initialised, and is pinned.
        unsafe { helpers::vbrs_wake_up_all(self.waiters.get()) };
    }

    /// How often it was raised; wraps. Any context.
    pub fn wakeups(&self) -> u32 {
        self.wakeups.load(kernel::sync::atomic::Acquire)
    }

    /// Waits until it has been raised since [`wakeups`](Self::wakeups) was `seen`, for `limit`
    /// milliseconds at most. Returns whether it was.
    ///
    /// Sleeps, and does not heed signals to the process. Allocates nothing.
    pub fn wait_timeout(&self, seen: u32, limit: Msecs) -> bool {
        // SAFETY: The wait queue was initialised and the counter is valid; both are pinned.
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
        // It was seen then, and only another one counts.
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
