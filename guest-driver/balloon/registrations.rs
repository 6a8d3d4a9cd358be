// SPDX-License-Identifier: GPL-2.0

//! The driver's callbacks in the kernel.
//!
//! [`Registrations`] owns what unregisters them. The parts of the driver handle them, and each
//! registration has a reference to its part.

use kernel::prelude::*;

use super::components::DriverOk;
use super::hinted_blocks::HintedBlocks;
use super::hinting::Hinting;
use super::reporting::ReportingRegistration;
use super::resizer::Resizer;
use crate::mm::{MemoryHotplug, Notifier, OomNotifier, Shrinker, SystemSleep};
use crate::shared_abi::features::Features;

/// The priority of the balloon's OOM notifier: the same as in the kernel's C driver
/// (`VIRTIO_BALLOON_OOM_NOTIFY_PRIORITY`).
const OOM_PRIORITY: i32 = 80;

/// The driver's callbacks in the kernel. Each one is unregistered when it is dropped.
#[derive(Default)]
pub(super) struct Registrations {
    pub(super) oom_notifier: Option<OomNotifier<Resizer>>,
    pub(super) hint_oom_notifier: Option<OomNotifier<Hinting>>,
    pub(super) reporting: Option<ReportingRegistration>,
    pub(super) shrinker: Option<Shrinker<HintedBlocks>>,
    pub(super) memory_notifier: Option<Notifier<MemoryHotplug, Hinting>>,
    pub(super) sleep_notifier: Option<Notifier<SystemSleep, Hinting>>,
}

impl Registrations {
    /// Registers the callbacks for the negotiated features.
    pub(super) fn new(driver_ok: &DriverOk<'_>, features: Features) -> Result<Self> {
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
        // Last: if a later step failed, dropping this registration might wait for the device.
        if let Some(reporting) = &driver_ok.0.reporting {
            this.reporting = reporting.register()?;
        }
        Ok(this)
    }
}
