// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Takes the state to save from a device, and restores it in another one. The caller holds the device's lock.

use shared_abi::command::{CommandId, HintId};
use shared_abi::features::Features;
use tracing::info;

use super::{SavedState, SavedStateError, DEVICE, VERSION};
use crate::device::hinting::Hinting;
use crate::device::Device;

impl Device {
    /// Returns the state to save (R9).
    pub fn saved_state(&self) -> SavedState {
        let names = |features: Features| features.names().map(str::to_owned).collect();
        SavedState {
            device: DEVICE.into(),
            version: VERSION,
            negotiated_features: self.negotiated_features.map(names),
            num_pages: self.config.num_pages,
            actual: self.config.actual,
            poison_val: self.config.poison_val,
            command_id: self.hinting.cmd_id().number(),
            next_hint_id: self.hinting.next_id().number(),
        }
    }

    /// Restores the saved state of another device, to continue with the same driver. Must be called before the
    /// first front end connects.
    ///
    /// Hint ids continue (R8). A hint round that was in progress is over: its migration has ended or failed. Config
    /// space shows DONE, so that the driver frees its hinted blocks (R16).
    ///
    /// # Errors
    ///
    /// If the state has an invalid value, or the driver uses features that are not offered here.
    pub fn restore(&mut self, saved: &SavedState) -> Result<(), SavedStateError> {
        let features = saved.features()?;
        let missing = features.unwrap_or_default().without(self.offered_features);
        if !missing.is_empty() {
            return Err(SavedStateError::NotOffered(missing));
        }
        let next =
            HintId::new(saved.next_hint_id).ok_or(SavedStateError::NextId(saved.next_hint_id))?;
        let over = match CommandId::from_number(saved.command_id) {
            CommandId::Stop => false,
            CommandId::Done | CommandId::Hint(_) => true,
            CommandId::Reserved(number) => return Err(SavedStateError::Command(number)),
        };
        self.negotiated_features = features;
        self.config.num_pages = saved.num_pages;
        self.config.actual = saved.actual;
        self.config.poison_val = saved.poison_val;
        self.hinting = Hinting::from_saved_state(next, over);
        info!(
            "device state restored: {} pages in the balloon, next hint id {:#x}",
            saved.actual, saved.next_hint_id
        );
        Ok(())
    }
}
