// SPDX-License-Identifier: GPL-2.0

//! The parts of the driver, and the order in which they start and stop.
//!
//! [`Components`] owns the parts. Each part owns its virtqueues and the buffers that it recovers
//! after a device reset.

use kernel::device::Core;
use kernel::prelude::*;
use kernel::sync::Arc;

use super::config::BalloonConfig;
use super::counters::Counters;
use super::hinting::Hinting;
use super::interrupts::Interrupts;
use super::reporting::Reporting;
use super::resizer::Resizer;
use super::statistics::Statistics;
use crate::mm::page_alloc;
use crate::shared_abi::features::Features;
use crate::shared_abi::queue::{self, Queue};
use crate::virtio::{self, AnyQueue};

/// A proof that `DRIVER_OK` is set.
///
/// Registered callbacks may notify the device, which the specification forbids before `DRIVER_OK`.
pub(super) struct DriverOk<'a>(pub(super) &'a Components);

/// The parts of the driver. Dropping them disables their work items.
pub(super) struct Components {
    pub(super) resizer: Arc<Resizer>,
    pub(super) hinting: Option<Arc<Hinting>>,
    pub(super) statistics: Option<Arc<Statistics>>,
    pub(super) reporting: Option<Arc<Reporting>>,
    pub(super) counters: Arc<Counters>,
}

impl Components {
    /// Creates the virtqueues of the negotiated features, in the order of
    /// [`shared_abi::queue`](crate::shared_abi::queue).
    pub(super) fn find_queues(&self, dev: &virtio::Device<Core<'_>>, features: Features) -> Result {
        let mut queues: KVec<&dyn AnyQueue> = KVec::with_capacity(Queue::MAX_COUNT, GFP_KERNEL)?;
        for queue in queue::negotiated_queues(features) {
            let queue: Option<&dyn AnyQueue> = match queue {
                Queue::Inflate => Some(self.resizer.inflate_queue()),
                Queue::Deflate => Some(self.resizer.deflate_queue()),
                Queue::FreePage => self
                    .hinting
                    .as_ref()
                    .map(|it| -> &dyn AnyQueue { it.queue() }),
                Queue::Stats => self
                    .statistics
                    .as_ref()
                    .map(|it| -> &dyn AnyQueue { it.queue() }),
                Queue::Reporting => self
                    .reporting
                    .as_ref()
                    .map(|it| -> &dyn AnyQueue { it.queue() }),
            };
            queues.push(queue.ok_or(EINVAL)?, GFP_KERNEL)?;
        }
        let interrupts = Interrupts::new(
            self.resizer.clone(),
            self.hinting.clone(),
            self.statistics.clone(),
            self.reporting.clone(),
            self.counters.clone(),
            features,
        );
        dev.find_queues(&queues, Arc::new(interrupts, GFP_KERNEL)?)
    }

    /// Writes the poison value, primes the statistics queue, sets `DRIVER_OK`, and starts the work
    /// items.
    pub(super) fn start(
        &self,
        dev: &virtio::Device<Core<'_>>,
        features: Features,
    ) -> Result<DriverOk<'_>> {
        if features.contains(Features::PAGE_POISON) {
            let pattern = page_alloc::free_page_pattern().unwrap_or(0);
            let config = dev.config(BalloonConfig::size(features))?;
            BalloonConfig::new(config).set_poison_val(pattern)?;
        }
        if let Some(statistics) = &self.statistics {
            statistics.prime()?;
        }
        dev.ready();
        if let Some(statistics) = &self.statistics {
            statistics.notify();
        }
        // The host may have set both before the driver could receive a config interrupt.
        self.resizer.target_changed();
        if let Some(hinting) = &self.hinting {
            hinting.cmd_id_changed();
        }
        Ok(DriverOk(self))
    }

    pub(super) fn disable(&self) {
        if let Some(hinting) = &self.hinting {
            hinting.disable();
        }
        if let Some(statistics) = &self.statistics {
            statistics.disable();
        }
        self.resizer.disable();
    }

    /// Empties the balloon, writes its size to config space, and disables all work items.
    ///
    /// The caller resets the device next. May sleep.
    pub(super) fn quiesce(&self) {
        if let Some(hinting) = &self.hinting {
            hinting.disable();
        }
        self.resizer.empty();
        self.disable();
    }

    /// Recovers the buffers that were in flight when the device was reset. May sleep.
    pub(super) fn detach_unused(&self) {
        self.resizer.detach_unused();
        if let Some(hinting) = &self.hinting {
            hinting.detach_unused();
        }
        if let Some(statistics) = &self.statistics {
            statistics.detach_unused();
        }
        if let Some(reporting) = &self.reporting {
            reporting.detach_unused();
        }
    }
}

impl Drop for Components {
    fn drop(&mut self) {
        self.disable();
    }
}
