// SPDX-License-Identifier: GPL-2.0

//! The balloon driver.
//!
//! Three things, each with its own work item: [`Sizing`] inflates and deflates, [`Hinting`] hints
//! free pages, [`Statistics`] says how the guest's memory fares. This file binds them to a device.
//! Interrupts only start the work; see [`Interrupts`].

mod balance;
mod config;
mod counters;
mod held;
mod hinting;
mod interrupts;
mod reporting;
mod request;
mod reserve;
mod sizing;
mod statistics;

use core::pin::Pin;

use kernel::device::{self, Bound, Core};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::Arc;

use self::config::BalloonConfig;
use self::counters::{Counters, CountersFile};
use self::held::Held;
use self::hinting::Hinting;
use self::interrupts::Interrupts;
use self::reporting::{Registration, Reporting};
use self::sizing::Sizing;
use self::statistics::Statistics;
use crate::mm::{state, Shrinker};
use crate::shared_abi::features::Features;
use crate::shared_abi::queue::{self, Queue};
use crate::shared_abi::VIRTIO_ID_BALLOON;
use crate::virtio::work::WorkQueue;
use crate::virtio::{self, AnyQueue, Negotiation};
use crate::virtio_device_table;

/// `VIRTIO_RING_F_INDIRECT_DESC`
const RING_INDIRECT_DESC: u32 = 28;
/// `VIRTIO_F_ACCESS_PLATFORM`
const ACCESS_PLATFORM: u32 = 33;

virtio_device_table!(ID_TABLE, [virtio::DeviceId::new(VIRTIO_ID_BALLOON)]);

/// The driver of memory balloons.
pub(crate) struct Balloon;

/// What the driver keeps for a device.
pub(crate) struct Data {
    // First, so that on the way out nothing runs any more when the rest goes.
    works: Works,
    _reporting: Option<Registration>,
    _shrinker: Option<Shrinker<Held>>,
    _work_queue: Arc<WorkQueue>,
    _counters: Option<CountersFile>,
}

/// The works, which are ended when this is dropped.
struct Works {
    sizing: Arc<Sizing>,
    hinting: Option<Arc<Hinting>>,
    statistics: Option<Arc<Statistics>>,
    reporting: Option<Arc<Reporting>>,
    counters: Arc<Counters>,
}

impl Works {
    fn disable(&self) {
        if let Some(hinting) = &self.hinting {
            hinting.disable();
        }
        if let Some(statistics) = &self.statistics {
            statistics.disable();
        }
        self.sizing.disable();
    }
}

impl Drop for Works {
    fn drop(&mut self) {
        self.disable();
    }
}

impl Data {
    fn bind(dev: &virtio::Device<Core<'_>>) -> Result<Self> {
        let features = Features::from_bits(dev.features());
        let config = dev.config()?;
        let counters = Arc::new(Counters::new(), GFP_KERNEL)?;
        let work_queue = Arc::new(WorkQueue::new(c"virtio_balloon_rs")?, GFP_KERNEL)?;

        let hinting = if features.contains(Features::FREE_PAGE_HINT) {
            let config = BalloonConfig::new(config.clone());
            let min_order = u32::from(crate::module_parameters::hint_min_order.value());
            Some(Hinting::new(
                config,
                work_queue.clone(),
                counters.clone(),
                min_order,
            )?)
        } else {
            None
        };
        let statistics = if features.contains(Features::STATS_VQ) {
            Some(Statistics::new(work_queue.clone(), counters.clone())?)
        } else {
            None
        };
        let printer: &device::Device = dev.as_ref();
        let reporting = if features.contains(Features::REPORTING) {
            Some(Reporting::new(ARef::from(printer), counters.clone())?)
        } else {
            None
        };
        let works = Works {
            sizing: Sizing::new(
                ARef::from(printer),
                BalloonConfig::new(config.clone()),
                work_queue.clone(),
                counters.clone(),
                !features.contains(Features::DEFLATE_ON_OOM),
            )?,
            hinting,
            statistics,
            reporting,
            counters: counters.clone(),
        };

        works.find_queues(dev, features)?;
        let shrinker = match &works.hinting {
            Some(hinting) => Some(Shrinker::register(c"virtio-balloon-rs", hinting.held())?),
            None => None,
        };
        let counters = CountersFile::new(printer, counters)?;
        if features.contains(Features::PAGE_POISON) {
            let pattern = state::free_page_pattern().unwrap_or(0);
            BalloonConfig::new(config).set_poison(pattern)?;
        }
        dev.ready();

        // The host may have set both before there was anybody to be interrupted.
        works.sizing.target_changed();
        if let Some(hinting) = &works.hinting {
            hinting.command_changed();
        }
        if let Some(statistics) = &works.statistics {
            statistics.wanted();
        }
        // The last thing: a report that the device has got is over only when the device is reset.
        let registration = match &works.reporting {
            Some(reporting) => reporting.register()?,
            None => None,
        };
        Ok(Self {
            works,
            _reporting: registration,
            _shrinker: shrinker,
            _work_queue: work_queue,
            _counters: counters,
        })
    }
}

impl Works {
    /// Creates the queues that the features bring, in the order of the contract.
    fn find_queues(&self, dev: &virtio::Device<Core<'_>>, features: Features) -> Result {
        let mut queues: KVec<&dyn AnyQueue> = KVec::with_capacity(Queue::MAX_COUNT, GFP_KERNEL)?;
        for queue in queue::present(features) {
            let queue: Option<&dyn AnyQueue> = match queue {
                Queue::Inflate => Some(self.sizing.inflate_queue()),
                Queue::Deflate => Some(self.sizing.deflate_queue()),
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
            self.sizing.clone(),
            self.hinting.clone(),
            self.statistics.clone(),
            self.reporting.clone(),
            self.counters.clone(),
            features,
        );
        dev.find_queues(&queues, Arc::new(interrupts, GFP_KERNEL)?)
    }
}

#[vtable]
impl virtio::Driver for Balloon {
    type Data<'bound> = Data;

    const ID_TABLE: virtio::IdTable = &ID_TABLE;

    const FEATURES: &'static [u32] = &[
        Features::MUST_TELL_HOST.bit_number(),
        Features::STATS_VQ.bit_number(),
        Features::FREE_PAGE_HINT.bit_number(),
        Features::PAGE_POISON.bit_number(),
        Features::REPORTING.bit_number(),
        Features::KEEPS_HINTED_UNTIL_RETURNED.bit_number(),
    ];

    fn validate(features: &mut Negotiation<'_>) -> Result {
        if state::free_page_pattern().is_none() {
            features.decline(Features::PAGE_POISON.bit_number());
        } else if !features.has_feature(Features::PAGE_POISON.bit_number()) {
            // The device would not know what reported pages must hold, and might clear them.
            features.decline(Features::REPORTING.bit_number());
        }
        // Requests have one segment each, so indirect descriptors would only cost memory; and page
        // numbers are physical addresses, which no IOMMU may translate.
        features.decline(RING_INDIRECT_DESC);
        features.decline(ACCESS_PLATFORM);
        Ok(())
    }

    fn probe<'bound>(dev: &'bound virtio::Device<Core<'_>>) -> impl PinInit<Data, Error> + 'bound {
        Data::bind(dev)
    }

    fn remove<'bound>(dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Data>) {
        if let Some(hinting) = &this.works.hinting {
            hinting.disable();
        }
        this.works.sizing.empty();
        this.works.disable();
        dev.reset();
        if let Some(hinting) = &this.works.hinting {
            hinting.give_up();
        }
        if let Some(reporting) = &this.works.reporting {
            reporting.give_up();
        }
    }

    fn config_changed<'bound>(_dev: &'bound virtio::Device<Bound>, this: Pin<&Data>) {
        this.works.sizing.target_changed();
        if let Some(hinting) = &this.works.hinting {
            hinting.command_changed();
        }
    }
}
