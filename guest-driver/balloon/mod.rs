// SPDX-License-Identifier: GPL-2.0

//! The balloon driver.
//!
//! Three things, each with its own work item: [`Resizer`] inflates and deflates, [`Hinting`] hints
//! free pages, [`Statistics`] says how the guest's memory fares. This file binds them to a device.
//! Interrupts only start the work; see [`Interrupts`].

mod balloon_queues;
mod config;
mod counters;
mod free_block_allocator;
mod hinted_blocks;
mod hinting;
mod interrupts;
mod page_counts;
mod reporting;
mod request;
mod resizer;
mod statistics;
mod timeout;

use core::pin::Pin;

use kernel::device::{self, Bound, Core};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::{new_mutex, Arc, Mutex};

use self::config::BalloonConfig;
use self::counters::{Counters, CountersFile};
use self::free_block_allocator::Limits;
use self::hinted_blocks::HintedBlocks;
use self::hinting::Hinting;
use self::interrupts::Interrupts;
use self::reporting::{Reporting, ReportingRegistration};
use self::resizer::Resizer;
use self::statistics::Statistics;
use crate::mm::{page_alloc, MemoryHotplug, Notifier, OomNotifier, Shrinker, SystemSleep};
use crate::shared_abi::features::Features;
use crate::shared_abi::queue::{self, Queue};
use crate::shared_abi::VIRTIO_ID_BALLOON;
use crate::virtio::compat::not_supported;
use crate::virtio::work::WorkQueue;
use crate::virtio::{self, AnyQueue, Negotiation, Wakeup};
use crate::virtio_device_table;

/// `VIRTIO_RING_F_INDIRECT_DESC`
const RING_INDIRECT_DESC: u32 = 28;
/// `VIRTIO_F_VERSION_1`
const VERSION_1: u32 = 32;
/// `VIRTIO_F_ACCESS_PLATFORM`
const ACCESS_PLATFORM: u32 = 33;

/// Among those who are asked when the guest has run out of memory: as early as the kernel's own
/// balloon driver.
const OOM_PRIORITY: i32 = 80;

virtio_device_table!(ID_TABLE, [virtio::DeviceId::new(VIRTIO_ID_BALLOON)]);

/// The driver of memory balloons.
pub(crate) struct Balloon;

/// What the driver keeps for a device.
pub(crate) struct Data {
    // First, so that on the way out nothing runs any more when the rest goes.
    components: Components,
    registrations: Pin<KBox<Mutex<Registrations>>>,
    _counters: Option<CountersFile>,
}

/// What the kernel calls the driver for, until it is dropped.
#[derive(Default)]
struct Registrations {
    oom_notifier: Option<OomNotifier<Resizer>>,
    hint_oom_notifier: Option<OomNotifier<Hinting>>,
    reporting: Option<ReportingRegistration>,
    shrinker: Option<Shrinker<HintedBlocks>>,
    memory_notifier: Option<Notifier<MemoryHotplug, Hinting>>,
    sleep_notifier: Option<Notifier<SystemSleep, Hinting>>,
}

impl Registrations {
    /// Registers the callbacks for the negotiated features.
    fn new(driver_ok: &DriverOk<'_>, features: Features) -> Result<Self> {
        let mut this = Self::default();
        if let Some(hinting) = &driver_ok.0.hinting {
            let shrinker = Shrinker::register(c"virtio-balloon-rs", hinting.hinted_blocks())?;
            this.shrinker = Some(shrinker);
            this.memory_notifier = Some(Notifier::register(hinting.clone())?);
            this.sleep_notifier = Some(Notifier::register(hinting.clone())?);
            // Higher priority than the balloon: hinted pages are free memory.
            let notifier = OomNotifier::register(OOM_PRIORITY + 1, hinting.clone())?;
            this.hint_oom_notifier = Some(notifier);
        }
        if features.contains(Features::DEFLATE_ON_OOM) {
            let resizer = driver_ok.0.resizer.clone();
            this.oom_notifier = Some(OomNotifier::register(OOM_PRIORITY, resizer)?);
        }
        // Last, because a report in flight ends only with the device reset.
        if let Some(reporting) = &driver_ok.0.reporting {
            this.reporting = reporting.register()?;
        }
        Ok(this)
    }
}

/// Proof that `DRIVER_OK` is set. Registered callbacks may notify the device, which is not allowed
/// earlier.
struct DriverOk<'a>(&'a Components);

/// The works, which are ended when this is dropped.
struct Components {
    resizer: Arc<Resizer>,
    hinting: Option<Arc<Hinting>>,
    statistics: Option<Arc<Statistics>>,
    reporting: Option<Arc<Reporting>>,
    counters: Arc<Counters>,
}

impl Components {
    fn disable(&self) {
        if let Some(hinting) = &self.hinting {
            hinting.disable();
        }
        if let Some(statistics) = &self.statistics {
            statistics.disable();
        }
        self.resizer.disable();
    }

    /// Empties the balloon, reports the size to the host, and disables all work items. The caller resets
    /// the device next. May sleep.
    fn quiesce(&self) {
        if let Some(hinting) = &self.hinting {
            hinting.disable();
        }
        self.resizer.empty();
        self.disable();
    }

    /// Takes back what the device had when it was reset.
    fn detach_unused(&self) {
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

impl Data {
    fn bind(dev: &virtio::Device<Core<'_>>) -> Result<Self> {
        let features = Features::from_bits(dev.features());
        let config = BalloonConfig::new(dev.config(BalloonConfig::size(features))?);
        let printer: &device::Device = dev.as_ref();
        let counters = Arc::new(Counters::new(Some(ARef::from(printer))), GFP_KERNEL)?;
        timeout::warn_if_clamped(printer);
        let work_queue = WorkQueue::new(c"virtio_balloon_rs")?;

        let hinting = if features.contains(Features::FREE_PAGE_HINT) {
            Some(Hinting::new(
                config.clone(),
                work_queue.clone(),
                counters.clone(),
                Limits::from_parameters(printer),
            )?)
        } else {
            None
        };
        let wakeup = Wakeup::new(ARef::from(dev))?;
        let statistics = if features.contains(Features::STATS_VQ) {
            Some(Statistics::new(
                wakeup.clone(),
                work_queue.clone(),
                counters.clone(),
            )?)
        } else {
            None
        };
        let reporting = if features.contains(Features::REPORTING) {
            Some(Reporting::new(ARef::from(printer), counters.clone())?)
        } else {
            None
        };
        let components = Components {
            resizer: Resizer::new(
                ARef::from(printer),
                config,
                hinting.as_ref().map(|it| it.hinted_blocks()),
                wakeup,
                work_queue,
                counters.clone(),
                !features.contains(Features::DEFLATE_ON_OOM),
                features.contains(Features::MUST_TELL_HOST),
            )?,
            hinting,
            statistics,
            reporting,
            counters: counters.clone(),
        };

        components.find_queues(dev, features)?;
        let counters = CountersFile::new(printer, counters)?;
        let registrations = new_mutex!(Registrations::default(), "Data::registrations");
        let registrations = KBox::pin_init(registrations, GFP_KERNEL)?;
        let driver_ok = components.start(dev, features)?;
        match Registrations::new(&driver_ok, features) {
            Ok(registered) => *registrations.lock() = registered,
            Err(error) => {
                // The balloon may already contain pages.
                components.quiesce();
                return Err(error);
            }
        }
        Ok(Self {
            components,
            registrations,
            _counters: counters,
        })
    }
}

impl Components {
    /// Tells the device what it has to know first and that the driver is ready, and starts.
    fn start(&self, dev: &virtio::Device<Core<'_>>, features: Features) -> Result<DriverOk<'_>> {
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
        // The host may have set both before there was anybody to be interrupted.
        self.resizer.target_changed();
        if let Some(hinting) = &self.hinting {
            hinting.cmd_id_changed();
        }
        Ok(DriverOk(self))
    }

    /// Creates the queues that the features bring, in the order of the contract.
    fn find_queues(&self, dev: &virtio::Device<Core<'_>>, features: Features) -> Result {
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
}

#[vtable]
impl virtio::Driver for Balloon {
    type Data<'bound> = Data;

    const ID_TABLE: virtio::IdTable = &ID_TABLE;

    const FEATURES: &'static [u32] = &[
        Features::MUST_TELL_HOST.bit_number(),
        Features::STATS_VQ.bit_number(),
        Features::DEFLATE_ON_OOM.bit_number(),
        Features::FREE_PAGE_HINT.bit_number(),
        Features::PAGE_POISON.bit_number(),
        Features::REPORTING.bit_number(),
        Features::KEEPS_HINTED_UNTIL_RETURNED.bit_number(),
    ];

    fn validate(features: &mut Negotiation<'_>) -> Result {
        if cfg!(target_endian = "big") && !features.has_feature(VERSION_1) {
            // Its page numbers, statistics and command ids would be big-endian.
            pr_err!("a legacy balloon is not supported on a big-endian guest\n");
            return Err(not_supported());
        }
        if page_alloc::free_page_pattern().is_none() {
            features.clear_feature(Features::PAGE_POISON.bit_number());
        } else if !features.has_feature(Features::PAGE_POISON.bit_number()) {
            // The device would not know what reported pages must hold, and might clear them.
            features.clear_feature(Features::REPORTING.bit_number());
        }
        // Requests have one segment each, so indirect descriptors would only cost memory; and page
        // numbers are physical addresses, which no IOMMU may translate.
        features.clear_feature(RING_INDIRECT_DESC);
        features.clear_feature(ACCESS_PLATFORM);
        Ok(())
    }

    fn probe<'bound>(dev: &'bound virtio::Device<Core<'_>>) -> impl PinInit<Data, Error> + 'bound {
        Data::bind(dev)
    }

    fn remove<'bound>(dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Data>) {
        this.components.quiesce();
        dev.reset();
        this.components.detach_unused();
    }

    fn config_changed<'bound>(_dev: &'bound virtio::Device<Bound>, this: Pin<&Data>) {
        this.components.resizer.target_changed();
        if let Some(hinting) = &this.components.hinting {
            hinting.cmd_id_changed();
        }
    }

    // The work queue is frozen meanwhile: what must be done is done here.
    fn freeze<'bound>(dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Data>) -> Result {
        this.components.resizer.empty();
        this.components.resizer.freeze();
        dev.reset();
        this.components.detach_unused();
        Ok(())
    }

    fn restore<'bound>(dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Data>) -> Result {
        let features = Features::from_bits(dev.features());
        let result = this.components.find_queues(dev, features).and_then(|()| {
            this.components.resizer.thaw();
            this.components.start(dev, features).map(drop)
        });
        if result.is_err() {
            // As it was; the device can still be removed, or the system sleep again.
            this.components.resizer.freeze();
            dev.reset();
            this.components.detach_unused();
        }
        result
    }

    fn shutdown<'bound>(dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Data>) {
        // From now on nobody waits for the device, an OOM notification under way included.
        this.components.disable();
        let registrations = core::mem::take(&mut *this.registrations.lock());
        drop((registrations.oom_notifier, registrations.hint_oom_notifier));
        drop(registrations.shrinker);
        drop((registrations.memory_notifier, registrations.sleep_notifier));
        // The end of the registration waits for the report that the device has, so that comes back
        // before. The balloon stays what it is: to free its pages would take time, for nobody.
        dev.reset();
        if let Some(reporting) = &this.components.reporting {
            reporting.detach_unused();
        }
        drop(registrations.reporting);
    }
}

#[kunit_tests(virtio_balloon_rs_balloon)]
mod tests {
    use super::*;
    use crate::mm::{FreePages, OnOutOfMemory, PageReporting, ReportPages};
    use crate::shared_abi::config;
    use crate::virtio::kunit_device::{wait_for, BoundTestDevice};
    use crate::virtio::Driver;

    struct Nobody;

    impl ReportPages for Nobody {
        fn report(&self, _pages: FreePages) {}
    }

    /// A device that has everything and uses no buffer is shut down: with a report, requests and
    /// hints under way.
    #[test]
    fn a_silent_device_is_shut_down_and_nothing_reaches_for_it_afterwards() -> Result {
        let features = Features::STATS_VQ
            | Features::DEFLATE_ON_OOM
            | Features::FREE_PAGE_HINT
            | Features::REPORTING
            | Features::MUST_TELL_HOST;
        let bound = BoundTestDevice::with_features(16, features.bits())?;
        bound.device.set_config(config::NUM_PAGES, 1000);
        bound
            .device
            .set_config(config::FREE_PAGE_HINT_CMD_ID, 0x8000_0000);
        let data = KBox::pin(Data::bind(bound.core())?, GFP_KERNEL)?;
        let reports = data.registrations.lock().reporting.is_some();
        for (index, queue) in queue::negotiated_queues(features).enumerate() {
            let expected = match queue {
                // Nothing is in the balloon.
                Queue::Deflate => false,
                // Another device, or a kernel that cannot, is the one reason not to report.
                Queue::Reporting => reports,
                Queue::Inflate | Queue::Stats | Queue::FreePage => true,
            };
            assert!(!expected || wait_for(|| bound.device.pop_descriptor_chain(index).is_some()));
        }
        let resizer = data.components.resizer.clone();
        let hinting = data.components.hinting.clone().ok_or(ENOENT)?;
        let reporting = data.components.reporting.clone().ok_or(ENOENT)?;

        Balloon::shutdown(bound.core(), data.as_ref());

        let registrations = data.registrations.lock();
        assert!(registrations.oom_notifier.is_none());
        assert!(registrations.hint_oom_notifier.is_none());
        assert!(registrations.shrinker.is_none());
        assert!(registrations.memory_notifier.is_none());
        assert!(registrations.sleep_notifier.is_none());
        assert!(registrations.reporting.is_none());
        drop(registrations);
        if reports {
            // There can be one registration in the system: ours has gone.
            let other = Arc::new(Nobody, GFP_KERNEL)?;
            let other = KBox::pin_init(PageReporting::register(other, 1), GFP_KERNEL);
            assert!(other.is_ok());
        }
        let notifications = bound.device.notifications();
        assert_eq!(resizer.oom_notify(0), 0);
        resizer.target_changed();
        hinting.cmd_id_changed();
        reporting.used();
        assert!(resizer.inflate_queue().is_broken() && hinting.queue().is_broken());
        assert_eq!(bound.device.notifications(), notifications);
        // What the device had is all there for a removal that comes all the same.
        Balloon::remove(bound.core(), data.as_ref());
        Ok(())
    }
}
