// SPDX-License-Identifier: GPL-2.0

//! Hinting's handlers of the kernel's notifiers: system sleep, memory offline and out of memory.
//!
//! Before the system sleeps, and while memory goes offline, the driver *pauses* the hint round: it
//! offers no free block, waits for the hinted blocks in flight, and returns hinted blocks to the
//! page allocator (all of them before sleep, otherwise those in the range). Then the hint round
//! resumes with the largest order.
//!
//! The handlers return blocks of [`HintedBlocks`](super::HintedBlocks) only. A hinted block in
//! flight stays with the queue, and the handlers wait until the device has used its buffer.

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;
use kernel::sync::Arc;
use kernel::time::delay::fsleep;
use kernel::time::{Delta, Instant, Monotonic};

use super::super::free_block_allocator::FreeBlockAllocator;
use super::super::timeout;
use super::{Hinting, HintingInner};
use crate::mm::{OnMemoryOffline, OnOutOfMemory, OnSystemSleep, Shrink};

/// The number of pages of hinted blocks that one OOM notification frees.
const OOM_PAGES: usize = 1024;

impl Hinting {
    /// Waits until nothing is in flight. Hinting must be [paused](Self::is_paused).
    ///
    /// The wait times out if the device makes no progress, and after a longer time if it does.
    /// After a timeout without progress, later calls do not wait until the device uses a buffer.
    /// The wait also ends when the driver is unbound.
    fn wait_for_device(&self) {
        let since = Instant::now();
        while self.may_return_more(&mut self.inner.lock(), since) {
            fsleep(Delta::from_millis(1));
        }
    }

    /// Reaps used buffers. Returns whether the caller, which has waited since `since`, should wait
    /// for more.
    fn may_return_more(&self, inner: &mut HintingInner, since: Instant<Monotonic>) -> bool {
        self.reap_used(inner);
        let is_over = self.stopping.load(Relaxed) || self.queue.is_broken();
        if is_over || !inner.any_in_flight() {
            return false;
        }
        self.notify(inner);
        let waited = since.elapsed();
        let limit = timeout::host();
        inner.timed_out |= waited > limit && inner.last_used.elapsed() > limit;
        // If the device makes progress, only this caller stops waiting.
        !inner.timed_out && waited <= timeout::total()
    }

    /// Resumes the hint round after a pause, unless another pause is active.
    fn resume(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        if inner.allocator.is_some() {
            // Freed memory may be available again in large free blocks.
            inner.allocator = Some(FreeBlockAllocator::new(self.limits, &self.counters));
        }
        drop(inner);
        self.wake();
    }
}

/// Returns the hinted blocks in memory that goes offline.
impl OnMemoryOffline for Hinting {
    fn going_offline(self: &Arc<Self>, range: Range<u64>) {
        self.offlining.fetch_add(1, Relaxed);
        self.wait_for_device();
        let inner = self.inner.lock();
        self.hinted_blocks.free_in_range(&range);
        drop(inner);
        self.offlining.fetch_sub(1, Relaxed);
        self.resume();
    }
}

/// Frees hinted blocks before the kernel kills a process. Waits for hinted blocks in flight if
/// necessary.
///
/// It runs within an allocation, possibly one by the work item itself: some transports allocate
/// memory to read config space. So it only tries to take the lock of [`HintingInner`].
impl OnOutOfMemory for Hinting {
    fn oom_notify(self: &Arc<Self>, already_freed: usize) -> usize {
        if already_freed > 0 {
            return 0;
        }
        let since: Instant<Monotonic> = Instant::now();
        let before = self.hinted_blocks.total_freed();
        // Counts pages that other tasks have freed since, too.
        let freed = || self.hinted_blocks.total_freed().wrapping_sub(before);
        loop {
            let may_come = match self.inner.try_lock() {
                Some(mut inner) => self.may_return_more(&mut inner, since),
                // The allocating task itself may hold the lock.
                None => !self.stopping.load(Relaxed) && since.elapsed() < timeout::host(),
            };
            if freed() == 0 {
                self.hinted_blocks.scan(OOM_PAGES);
            }
            if freed() > 0 || !may_come {
                break;
            }
            fsleep(Delta::from_millis(1));
        }
        // No interrupt follows for the used buffers that were reaped here.
        self.wake();
        freed()
    }
}

/// Returns all hinted blocks before the system sleeps: hibernation allocates its image before it
/// freezes the devices.
impl OnSystemSleep for Hinting {
    fn prepare_sleep(self: &Arc<Self>) {
        self.asleep.store(true, Relaxed);
        self.wait_for_device();
        self.hinted_blocks.free_all();
    }

    fn post_sleep(self: &Arc<Self>) {
        self.asleep.store(false, Relaxed);
        self.resume();
    }
}

#[kunit_tests(virtio_balloon_rs_hinting_notifiers)]
mod tests {
    use super::super::tests_rig::*;
    use super::*;
    use crate::mm::{HintedBlock, PageBlock};

    /// An OOM notification frees hinted blocks whose buffers are used, before the work item runs.
    /// It waits only once for a device that uses no buffer.
    #[test]
    fn a_task_without_memory_gets_what_the_device_has_used() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(2)?;
        rig.command(FIRST);
        rig.work();
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        rig.work();
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.hinted_blocks.count(), 0);
        assert_eq!(rig.hinting.oom_notify(0), 4);
        assert_eq!(rig.hinting.oom_notify(0), 0);
        assert!(rig.hinting.inner.lock().timed_out);
        assert_eq!(rig.hinting.oom_notify(0), 0);
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.hinting.oom_notify(0), 4);
        assert_eq!(rig.counters.returned_pages.get(), 8);
        Ok(())
    }

    #[test]
    fn before_the_system_sleeps_blocks_go_back_and_none_is_offered() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        rig.work();
        assert_eq!(rig.answer(), Some(BLOCK));
        // The device uses the buffers in flight when it is notified.
        rig.bound.device.set_use_on_notify(true);
        rig.hinting.asleep.store(true, Relaxed);
        rig.work();
        rig.bound.device.set_use_on_notify(false);
        while rig.answer().is_some() {}
        rig.hinting.prepare_sleep();
        assert_eq!(rig.hinted_blocks.count(), 0);
        let offered = rig.counters.hinted_blocks.get();
        assert!(offered < 8);
        rig.provide(5)?;
        assert!(rig.settle()?.is_empty());
        assert_eq!(rig.counters.hinted_blocks.get(), offered);
        rig.hinting.post_sleep();
        let found = rig.settle()?;
        assert_eq!(found.len(), 6);
        assert_eq!(found.last(), Some(&Found::Command(STOP)));
        Ok(())
    }

    #[test]
    fn a_device_that_keeps_its_buffers_does_not_keep_the_system_awake() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        let in_flight = rig.counters.hinted_blocks.get() as usize;
        assert!(in_flight > 1);
        rig.hinting.prepare_sleep();
        assert_eq!(rig.hinted_blocks.count(), 0);
        // No second wait, until the device uses a buffer.
        let awaits_device = || {
            let inner = &mut rig.hinting.inner.lock();
            rig.hinting.may_return_more(inner, Instant::now())
        };
        assert!(!awaits_device());
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        assert!(awaits_device());
        rig.hinting.post_sleep();
        // The hint round resumes with the hinted blocks that were in flight.
        let found = rig.settle()?;
        assert_eq!(found.len(), in_flight + 1);
        assert_eq!(rig.hinted_blocks.count(), in_flight * 4);
        Ok(())
    }

    #[test]
    fn a_driver_that_goes_does_not_wait_for_the_device() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        let awaits_device = || {
            let inner = &mut rig.hinting.inner.lock();
            rig.hinting.may_return_more(inner, Instant::now())
        };
        assert!(awaits_device());
        rig.hinting.disable();
        assert!(!awaits_device());
        Ok(())
    }

    /// The device says DONE, and uses the buffers in flight only after that.
    #[test]
    fn who_finds_no_memory_gets_what_the_device_returns_at_last() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        rig.command(DONE);
        rig.work();
        assert_eq!(rig.hinted_blocks.count(), 0);
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.hinting.oom_notify(0), 4);
        Ok(())
    }

    #[test]
    fn blocks_in_memory_that_goes_offline_go_back() -> Result {
        let rig = Rig::new(4)?;
        let block = PageBlock::try_alloc(2).ok_or(ENOMEM)?;
        let address = block.address();
        rig.hinted_blocks.insert_to_reoffer(HintedBlock::new(block));
        rig.provide(3)?;
        rig.command(FIRST);
        assert_eq!(rig.settle()?.len(), 6);
        rig.hinting.going_offline(address..address + 4096);
        assert_eq!(rig.hinted_blocks.count(), 12);
        // The hint round has ended, so nothing is offered.
        assert!(rig.settle()?.is_empty());
        rig.command(FIRST + 1);
        assert_eq!(rig.settle()?.len(), 5);
        Ok(())
    }
}
