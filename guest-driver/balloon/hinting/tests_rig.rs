// SPDX-License-Identifier: GPL-2.0

//! Hinting on a test device, for the tests of this folder.

use kernel::prelude::*;
use kernel::sync::Arc;

use super::super::config::BalloonConfig;
use super::super::counters::Counters;
use super::super::hint_reserve::Limits;
use super::super::hinted_blocks::HintedBlocks;
use super::{Hinting, POLL, WORK};
use crate::mm::{HintedBlock, PageBlock, Shrink};
use crate::shared_abi::config;
use crate::shared_abi::features::Features;
use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};
use crate::virtio::work::{self, WorkQueue};

pub(super) const STOP: u32 = 0;
pub(super) const DONE: u32 = 1;
pub(super) const FIRST: u32 = 0x8000_0000;

/// A buffer that the device finds on the free page queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Command(u32),
    /// A free block with this number of bytes.
    FreeBlock(u32),
}

/// Hinting with a test device that uses buffers when the test says so. The page allocator
/// provides no free block; the test provides hinted blocks to offer again.
pub(super) struct Rig {
    pub(super) hinting: Arc<Hinting>,
    pub(super) hinted_blocks: Arc<HintedBlocks>,
    pub(super) counters: Arc<Counters>,
    // Dropped last: the other fields have references to the device.
    pub(super) bound: BoundTestDevice,
}

impl Rig {
    pub(super) fn new(entries: usize) -> Result<Self> {
        let features = Features::FREE_PAGE_HINT.bits();
        let bound = BoundTestDevice::with_features(entries, features)?;
        let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
        let hinting = Hinting::new(
            BalloonConfig::new(bound.config()?),
            WorkQueue::new(c"kunit")?,
            counters.clone(),
            Limits::nothing(),
        )?;
        // The test calls the work items.
        work::disable::<Hinting, POLL>(&hinting);
        work::disable::<Hinting, WORK>(&hinting);
        let hinted_blocks = hinting.hinted_blocks();
        hinted_blocks.disable();
        bound.find_queues(&[hinting.queue()], CountingHandler::new()?)?;
        Ok(Self {
            hinting,
            hinted_blocks,
            counters,
            bound,
        })
    }

    /// Provides `blocks` hinted blocks of four pages to offer again.
    pub(super) fn provide(&self, blocks: usize) -> Result {
        for _ in 0..blocks {
            let block = PageBlock::try_alloc(2).ok_or(ENOMEM)?;
            self.hinted_blocks
                .insert_to_reoffer(HintedBlock::new(block));
        }
        Ok(())
    }

    pub(super) fn command(&self, id: u32) {
        let at = config::FREE_PAGE_HINT_CMD_ID;
        self.bound.device.set_config(at, id);
        self.hinting.cmd_id_changed();
    }

    /// Works until nothing is left to do. The device uses no buffer meanwhile.
    pub(super) fn work(&self) {
        while self.hinting.work() {}
    }

    /// Lets the device use one buffer.
    pub(super) fn answer(&self) -> Option<Found> {
        let chain = self.bound.device.pop_descriptor_chain(0)?;
        let segment = chain.segments.first()?;
        let found = if segment.writable {
            Found::FreeBlock(segment.length)
        } else {
            Found::Command(segment.first_word())
        };
        self.bound.device.add_used(0, chain.head, 0);
        Some(found)
    }

    /// Alternates between the work item and one used buffer until nothing is left to do.
    /// Returns the buffers that the device found.
    ///
    /// While a buffer is in flight, its interrupt must be enabled.
    pub(super) fn settle(&self) -> Result<KVec<Found>> {
        let mut all = KVec::new();
        loop {
            self.work();
            let suppressed = self.bound.device.interrupts_suppressed(0);
            let Some(found) = self.answer() else {
                break Ok(all);
            };
            assert!(!suppressed);
            all.push(found, GFP_KERNEL)?;
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.hinting.disable();
        self.bound.reset();
        self.hinting.detach_unused();
        assert_eq!(self.hinted_blocks.count(), 0);
    }
}

pub(super) const BLOCK: Found = Found::FreeBlock(4 * 4096);
