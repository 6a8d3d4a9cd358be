// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration gets of the device, in the device's process or in another one.

use std::sync::Arc;

use guest_migration::dirty_tracking::{PunchedPages, Quiesce};
use guest_migration::{CancelToken, HintSource, Memory};

use super::hint_source::{ClaimGuard, DeviceHintSource};
use crate::device::migration_claim::ClaimedResources;
use crate::device_lock::{DeviceLock, QuiescedDevice};
use crate::sync::lock;

/// What a migration gets of the device.
pub(super) struct DeviceAccess {
    /// Guest memory.
    pub(super) memory: Memory,
    /// The pages that the device releases or discards.
    pub(super) punched: PunchedPages,
    /// Whether hinted blocks are discarded before the guest may use them again.
    pub(super) discards: bool,
    /// Whether hints are available; the error is the reason if they are not.
    pub(super) hint_availability: Result<(), String>,
    /// Keeps the device from writing to guest memory.
    pub(super) quiesce: Box<dyn Quiesce>,
    /// Sets whether a hint may only spare a page that is discarded.
    pub(super) set_hints_need_discard: Box<dyn FnOnce(bool) + Send>,
    /// The source of hints. It owns the claim on the device, also if no hints are used.
    pub(super) hints: Box<dyn HintSource>,
}

impl DeviceAccess {
    /// Returns the access to a device of this process.
    pub(super) fn local(
        device: &Arc<DeviceLock>,
        claim: ClaimGuard,
        claimed: ClaimedResources,
        cancel: &CancelToken,
    ) -> Self {
        let ClaimedResources {
            memory,
            punched,
            discards,
            hint_availability,
        } = claimed;
        let claimed_device = device.clone();
        Self {
            memory,
            punched,
            discards,
            hint_availability: hint_availability.map_err(|why| why.to_string()),
            // This program writes to guest memory only under the device's lock.
            quiesce: Box::new(QuiescedDevice(device.clone())),
            set_hints_need_discard: Box::new(move |need| {
                lock(&claimed_device).set_hints_need_discard(need);
            }),
            hints: Box::new(DeviceHintSource::new(claim, discards, cancel)),
        }
    }
}
