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
/// Who waits takes the [`count`](Self::count) first, then looks for what it waits for, and only then
/// [`wait`](Self::wait)s: a signal that comes after the first step ends the wait. So none is missed,
/// without a lock that interrupts would have to take.
///
/// Unlike [`CondVar`](kernel::sync::CondVar) it can be waited for with a limit and regardless of
/// signals to the process: whoever waits may be a process that only wants some memory.
#[pin_data]
pub struct Signal {
    #[pin]
    waiters: Opaque<bindings::wait_queue_head>,
    count: Atomic<u32>,
}

// SAFETY: A wait queue may be used from any thread.
unsafe impl Send for Signal {}

// SAFETY: A wait queue has its own lock.
unsafe impl Sync for Signal {}

impl Signal {
    /// A signal that was not raised yet.
    pub fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            waiters <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes, and pinned.
                unsafe { helpers::vbrs_wait_queue_init(slot) }
            }),
            count: Atomic::new(0),
        })
    }

    /// Wakes all who wait. Any context but NMI.
    pub fn raise(&self) {
        self.count.fetch_add(1, Full);
        // SAFETY: The wait queue was initialised, and is pinned.
        unsafe { helpers::vbrs_wake_all(self.waiters.get()) };
    }

    /// How often it was raised; wraps. Any context.
    pub fn count(&self) -> u32 {
        self.count.load(kernel::sync::atomic::Acquire)
    }

    /// Waits until it has been raised since [`count`](Self::count) was `seen`, for `limit`
    /// milliseconds at most. Returns whether it was.
    ///
    /// Sleeps, and does not heed signals to the process. Allocates nothing.
    pub fn wait(&self, seen: u32, limit: Msecs) -> bool {
        // SAFETY: The wait queue was initialised and the counter is valid; both are pinned.
        unsafe {
            helpers::vbrs_wait_for_change(
                self.waiters.get(),
                (&raw const self.count).cast(),
                seen,
                msecs_to_jiffies(limit),
            )
        }
    }
}

#[kunit_tests(virtio_balloon_rs_signal)]
mod tests {
    use super::*;
    use kernel::sync::Arc;

    #[test]
    fn a_signal_that_came_before_the_wait_ends_it() -> Result {
        let signal = Arc::pin_init(Signal::new(), GFP_KERNEL)?;
        let seen = signal.count();
        signal.raise();
        assert!(signal.wait(seen, 60_000));
        // It was seen then, and only another one counts.
        assert!(!signal.wait(signal.count(), 1));
        Ok(())
    }

    #[test]
    fn a_signal_from_elsewhere_ends_a_wait() -> Result {
        let signal = Arc::pin_init(Signal::new(), GFP_KERNEL)?;
        let seen = signal.count();
        let other = signal.clone();
        kernel::workqueue::system().try_spawn(GFP_KERNEL, move || other.raise())?;
        assert!(signal.wait(seen, 60_000));
        Ok(())
    }
}
