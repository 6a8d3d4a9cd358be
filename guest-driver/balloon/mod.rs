// SPDX-License-Identifier: GPL-2.0

//! The virtio balloon driver.
//!
//! - [`Resizer`] inflates and deflates the balloon.
//! - [`Hinting`] offers free blocks to the device (free page hinting).
//! - [`Statistics`] sends memory statistics.
//! - [`Reporting`] sends free page reports.
//!
//! This file binds them to a device. [`Components`] owns them, and [`Registrations`] the callbacks
//! in the kernel. Interrupts and config changes only start work items (see
//! [`Interrupts`](self::interrupts::Interrupts)), except that a used report is completed in its
//! interrupt.

mod balloon_queues;
mod components;
mod config;
mod counters;
mod free_block_allocator;
mod hint_reserve;
mod hinted_blocks;
mod hinting;
mod interrupts;
mod page_counts;
mod page_geometry;
mod registrations;
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

use self::components::Components;
use self::config::BalloonConfig;
use self::counters::{Counters, CountersFile};
use self::hint_reserve::Limits;
use self::hinting::Hinting;
use self::registrations::Registrations;
use self::reporting::Reporting;
use self::resizer::Resizer;
use self::statistics::Statistics;
use crate::mm::page_alloc;
use crate::shared_abi::features::Features;
use crate::shared_abi::VIRTIO_ID_BALLOON;
use crate::virtio::compat::not_supported;
use crate::virtio::work::WorkQueue;
use crate::virtio::{self, Negotiation, Wakeup};
use crate::virtio_device_table;

/// `VIRTIO_RING_F_INDIRECT_DESC`
const RING_INDIRECT_DESC: u32 = 28;
/// `VIRTIO_F_VERSION_1`
const VERSION_1: u32 = 32;
/// `VIRTIO_F_ACCESS_PLATFORM`
const ACCESS_PLATFORM: u32 = 33;

virtio_device_table!(ID_TABLE, [virtio::DeviceId::new(VIRTIO_ID_BALLOON)]);

/// The virtio balloon driver.
pub(crate) struct Balloon;

/// The driver's data for one device.
pub(crate) struct Data {
    // Dropped first: disables all work items before the registrations and the counters are dropped.
    components: Components,
    registrations: Pin<KBox<Mutex<Registrations>>>,
    _counters: Option<CountersFile>,
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
            // Page frame numbers, statistics and command ids would be big-endian.
            pr_err!("a legacy balloon is not supported on a big-endian guest\n");
            return Err(not_supported());
        }
        if page_alloc::free_page_pattern().is_none() {
            features.clear_feature(Features::PAGE_POISON.bit_number());
        } else if !features.has_feature(Features::PAGE_POISON.bit_number()) {
            // Without the poison value the device does not know the content that reported pages
            // must have, and may clear them.
            features.clear_feature(Features::REPORTING.bit_number());
        }
        // Indirect descriptors only cost memory: inflate, deflate and hinting buffers have one
        // segment each. Page frame numbers are guest-physical addresses, so an IOMMU must not
        // translate them.
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

    // The work queue is frozen, so this function calls the resize worker's code itself.
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
            // Returns to the frozen state. The device can still be removed, and the system can
            // sleep again.
            this.components.resizer.freeze();
            dev.reset();
            this.components.detach_unused();
        }
        result
    }

    fn shutdown<'bound>(dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Data>) {
        // No task waits for the device any longer, OOM notifiers that are running included.
        this.components.disable();
        let registrations = core::mem::take(&mut *this.registrations.lock());
        drop((registrations.oom_notifier, registrations.hint_oom_notifier));
        drop(registrations.shrinker);
        drop((registrations.memory_notifier, registrations.sleep_notifier));
        // Unregistering the reporting callback waits for the report in flight, so the reset and
        // `detach_unused` come first. The balloon keeps its pages: freeing them takes time, and the
        // system is about to stop.
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
    use crate::shared_abi::queue::{self, Queue};
    use crate::virtio::kunit_device::{wait_for, BoundTestDevice};
    use crate::virtio::Driver;

    struct Nobody;

    impl ReportPages for Nobody {
        fn report(&self, _pages: FreePages) {}
    }

    /// Shuts down a device that has all features and uses no buffer, with a report, requests and
    /// hints in flight.
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
                // The balloon is empty.
                Queue::Deflate => false,
                // Reporting is unavailable only if another device has registered it or the kernel
                // lacks it.
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
            // The system has one reporting registration at most, so this one shows that the
            // driver's is dropped.
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
        // A removal after the shutdown recovers all buffers.
        Balloon::remove(bound.core(), data.as_ref());
        Ok(())
    }
}
