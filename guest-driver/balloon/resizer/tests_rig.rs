// SPDX-License-Identifier: GPL-2.0

//! A balloon on a test device, for the tests of the resize worker and of OOM deflation.

use kernel::device;
use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;
use kernel::sync::{aref::ARef, Arc};

use super::super::config::BalloonConfig;
use super::super::counters::Counters;
use super::super::hinted_blocks::HintedBlocks;
use super::Resizer;
use crate::shared_abi::config;
use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};
use crate::virtio::work::WorkQueue;
use crate::virtio::Wakeup;

pub(super) const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// A balloon with a test device that uses buffers when the test says so.
pub(super) struct Rig {
    pub(super) resizer: Arc<Resizer>,
    pub(super) hinted_blocks: Arc<HintedBlocks>,
    pub(super) counters: Arc<Counters>,
    // Dropped last: the other fields have references to the device.
    pub(super) bound: BoundTestDevice,
}

impl Rig {
    /// Creates a balloon with disabled work items. The test calls them itself, because the test
    /// device supports one thread.
    pub(super) fn new(entries: usize, must_tell_host: bool) -> Result<Self> {
        let rig = Self::with_work(entries, must_tell_host)?;
        rig.resizer.end_work();
        Ok(rig)
    }

    /// Creates a balloon with enabled work items.
    pub(super) fn with_work(entries: usize, must_tell_host: bool) -> Result<Self> {
        let bound = BoundTestDevice::with_entries(entries)?;
        let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
        let queue = WorkQueue::new(c"kunit")?;
        let hinted_blocks = Arc::pin_init(HintedBlocks::new(counters.clone(), queue), GFP_KERNEL)?;
        let dev = bound.device_ref();
        let printer: &device::Device = dev.as_ref();
        let resizer = Resizer::new(
            ARef::from(printer),
            BalloonConfig::new(bound.config()?),
            Some(hinted_blocks.clone()),
            Wakeup::new(dev.clone())?,
            WorkQueue::new(c"kunit")?,
            counters.clone(),
            true,
            must_tell_host,
        )?;
        let virtqueues: [&dyn crate::virtio::AnyQueue; 2] =
            [resizer.inflate_queue(), resizer.deflate_queue()];
        bound.find_queues(&virtqueues, CountingHandler::new()?)?;
        Ok(Self {
            resizer,
            hinted_blocks,
            counters,
            bound,
        })
    }

    pub(super) fn set_target(&self, pages: u32) {
        self.bound.device.set_config(config::NUM_PAGES, pages);
        self.resizer.target_changed.store(true, Relaxed);
    }

    pub(super) fn actual(&self) -> u32 {
        self.bound.device.config_at(config::ACTUAL)
    }

    pub(super) fn inflated(&self) -> u64 {
        self.resizer.queues().page_counts().inflated()
    }

    /// Lets the device use one buffer of each queue. Returns whether there was any.
    pub(super) fn answer(&self) -> bool {
        let answers = [INFLATE, DEFLATE].map(|queue| self.bound.device.use_buffer(queue));
        answers.iter().any(Option::is_some)
    }

    /// Alternates between `update_size` and one used buffer of each queue, until nothing is in
    /// flight.
    ///
    /// While a buffer is in flight, its interrupt must be enabled.
    pub(super) fn settle(&self) {
        loop {
            self.resizer.update_size();
            let suppressed =
                [INFLATE, DEFLATE].map(|queue| self.bound.device.interrupts_suppressed(queue));
            if !self.answer() {
                break;
            }
            assert_eq!(suppressed, [false, false]);
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.resizer.disable();
        self.bound.reset();
        self.resizer.detach_unused();
    }
}
