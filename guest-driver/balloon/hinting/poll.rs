// SPDX-License-Identifier: GPL-2.0

//! The work item of hinting: when it polls the ring, notifies the device and enables the interrupt.
//!
//! An interrupt costs the guest a VM exit, and a device that is at work uses the next buffers
//! within microseconds. So the work item polls the ring for up to 500 µs without progress before it
//! enables the interrupt. While the device keeps up, a hint round needs no interrupt. The work item
//! keeps the ring full, and notifies the device when the device has used nearly all buffers of the
//! previous notification. A device at work polls the ring and can suppress notifications.
//!
//! The kernel's C driver enables no interrupt for this queue, so a device that sends none goes
//! unnoticed there. QEMU 11.1 with TCG is one: it serves the queue in an I/O thread and its
//! interrupts do not arrive. Therefore a timer also polls the queue while buffers are in flight, at
//! growing intervals.
//!
//! [`Hinting`] owns the queue and both work items. The hint round itself is
//! [`process`](Hinting::process).

use kernel::prelude::*;
use kernel::processor::cpu_relax;
use kernel::sync::atomic::Relaxed;
use kernel::sync::Arc;
use kernel::time::{msecs_to_jiffies, Instant, Monotonic};

use super::budget::{WorkBudget, BUSY_POLL_BUDGET, POLL_INTERVAL_MAX};
use super::{Hinting, HintingInner, POLL};
use crate::virtio::work::{self, WorkItem};

impl Hinting {
    /// Works until nothing is left to do for now or the budget is spent. Returns whether more work
    /// is left.
    pub(super) fn work(self: &Arc<Self>) -> bool {
        let mut inner = self.inner.lock();
        let mut budget = WorkBudget::new();
        while !self.stopping.load(Relaxed) {
            self.queue.disable_callback();
            if self.busy_poll(&mut inner, &mut budget).is_err() {
                break;
            }
            if budget.is_spent() {
                return true;
            }
            let quiet = self.queue.enable_callback_delayed();
            if quiet && !self.has_pending_event(&inner) {
                self.schedule_poll(&mut inner);
                break;
            }
        }
        false
    }

    /// Processes the queue repeatedly while the device keeps up and the budget lasts.
    ///
    /// On return, one of these is true:
    ///
    /// - Nothing is in flight.
    /// - The device was notified of all buffers and has used none for [`BUSY_POLL_BUDGET`].
    /// - The budget is spent.
    /// - The driver is being unbound.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the queue is broken or the device is unbound.
    fn busy_poll(&self, inner: &mut HintingInner, budget: &mut WorkBudget) -> Result {
        let mut last: Instant<Monotonic> = Instant::now();
        loop {
            let result = self.process(inner, budget);
            if result.is_err() || inner.is_kick_due() {
                self.notify(inner);
            }
            result?;
            work::cond_resched();
            loop {
                if budget.is_spent() {
                    return Ok(());
                }
                if self.has_pending_event(inner) {
                    break;
                }
                if self.reap_used(inner) {
                    last = Instant::now();
                    break;
                }
                if !inner.any_in_flight() || last.elapsed() > BUSY_POLL_BUDGET {
                    self.notify(inner);
                    return Ok(());
                }
                cpu_relax();
            }
            if self.stopping.load(Relaxed) {
                return Ok(());
            }
        }
    }

    /// Schedules the timer if buffers are in flight, in case no interrupt arrives, or if memory is
    /// short.
    fn schedule_poll(self: &Arc<Self>, inner: &mut HintingInner) {
        if !inner.any_in_flight() && !inner.short {
            return;
        }
        let delay = msecs_to_jiffies(inner.poll_interval);
        inner.poll_interval = (inner.poll_interval * 2).min(POLL_INTERVAL_MAX);
        work::enqueue_delayed::<Self, POLL>(self, delay);
    }
}

impl HintingInner {
    /// Returns whether to notify the device now: it has nearly used up its buffers, or no further
    /// free block follows.
    fn is_kick_due(&self) -> bool {
        self.allocator.is_none() || self.kicked_buffers <= self.pending_kick / 8
    }
}

/// Runs hinting.
impl WorkItem<1> for Hinting {
    fn run(this: Arc<Self>) {
        if this.work() {
            this.wake();
        }
    }
}

/// Runs hinting if no interrupt has arrived.
impl WorkItem<2> for Hinting {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

#[kunit_tests(virtio_balloon_rs_hinting_poll)]
mod tests {
    use super::super::budget::{POLL_INTERVAL_MIN, WORK_BUDGET_BLOCKS};
    use super::super::tests_rig::*;
    use super::*;
    use crate::mm::Shrink;

    /// The ring has no room for the command ids of the second hint round when the third is
    /// requested.
    #[test]
    fn a_command_that_cannot_be_sent_leaves_nothing_to_do() -> Result {
        const BLOCKS: usize = 3;
        let rig = Rig::new(1)?;
        rig.provide(BLOCKS)?;
        rig.command(FIRST);
        rig.work();
        rig.command(FIRST + 1);
        rig.work();
        rig.command(FIRST + 2);
        // On a slow machine a run may spend its budget and request another one.
        assert!((0..100).any(|_| !rig.hinting.work()));
        // The polling interval grows.
        assert!(rig.hinting.inner.lock().poll_interval > POLL_INTERVAL_MIN);
        let found = rig.settle()?;
        let third = found
            .iter()
            .skip_while(|it| **it != Found::Command(FIRST + 2));
        assert_eq!(third.filter(|found| **found == BLOCK).count(), BLOCKS);
        assert_eq!(found.last(), Some(&Found::Command(STOP)));
        Ok(())
    }

    /// Works until nothing is left to do, and returns the number of runs. Checks that no run
    /// exceeds the budget; `done` returns the number of blocks done so far.
    fn pieces(rig: &Rig, done: impl Fn() -> usize) -> usize {
        let mut pieces = 0;
        loop {
            let before = done();
            let more = rig.hinting.work();
            pieces += 1;
            assert!(done() - before <= WORK_BUDGET_BLOCKS);
            if !more {
                break pieces;
            }
        }
    }

    #[test]
    fn a_round_is_done_piece_by_piece() -> Result {
        const BLOCKS: usize = 2 * WORK_BUDGET_BLOCKS + 1;
        let rig = Rig::new(128)?;
        rig.bound.device.set_use_on_notify(true);
        rig.provide(BLOCKS)?;
        let offered = || rig.counters.hinted_blocks.get() as usize;
        let released = || BLOCKS - rig.hinted_blocks.count() / 4;
        rig.command(FIRST);
        assert!(pieces(&rig, offered) > 2);
        assert_eq!((offered(), rig.hinted_blocks.count()), (BLOCKS, BLOCKS * 4));
        rig.command(DONE);
        assert!(pieces(&rig, released) > 2);
        assert_eq!(rig.hinted_blocks.count(), 0);
        assert_eq!(rig.counters.rounds_finished.get(), 1);
        Ok(())
    }
}
