// SPDX-License-Identifier: GPL-2.0

//! Budgets and intervals of hinting's work item: how much it does in one run, and how long it
//! polls.

use kernel::time::{Delta, Instant, Monotonic, Msecs};

/// The budget of one run of the work item: a number of free blocks and a time.
pub(super) const WORK_BUDGET_BLOCKS: usize = 256;
const WORK_BUDGET_TIME: Delta = Delta::from_millis(5);

/// The longest time without a notification while the ring is being filled. If the page allocator is
/// slow, for instance because it clears each free block, the device starts working meanwhile.
pub(super) const MAX_KICK_DELAY: Delta = Delta::from_millis(100);
/// The interval at which the timer polls the queue if no interrupt arrives. It doubles from the
/// minimum to the maximum while the device uses no buffer.
pub(super) const POLL_INTERVAL_MIN: Msecs = 8;
pub(super) const POLL_INTERVAL_MAX: Msecs = 1024;

/// The time for which the work item polls the ring without progress before it enables the
/// interrupt.
pub(super) const BUSY_POLL_BUDGET: Delta = Delta::from_micros(500);

/// The remaining budget of one run of the work item.
pub(super) struct WorkBudget {
    pub(super) blocks: usize,
    began: Instant<Monotonic>,
}

impl WorkBudget {
    pub(super) fn new() -> Self {
        Self {
            blocks: WORK_BUDGET_BLOCKS,
            began: Instant::now(),
        }
    }

    pub(super) fn is_spent(&self) -> bool {
        self.blocks == 0 || self.began.elapsed() > WORK_BUDGET_TIME
    }
}
