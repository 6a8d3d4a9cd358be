// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a migration's source of hints.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migration::{Cancel, HintSource, HintSourceError, HintWindow, Waited};
use shared_abi::command::HintId;

use crate::device::lending::{ClaimError, Claimed, OnTrouble};
use crate::device::Device;
use crate::lock;
use crate::signal::Signal;

/// A migration's claim on a device. Dropping it lets the claim go, and the guest takes its hinted pages back (R16).
#[derive(Debug)]
#[must_use = "dropping it ends the claim"]
pub struct Claim(Arc<Mutex<Device>>);

impl Claim {
    /// Claims `device`. `on_trouble` is called under the device's lock: it must not wait, nor lock the device.
    ///
    /// # Errors
    ///
    /// As [`Device::claim`].
    pub fn new(
        device: &Arc<Mutex<Device>>,
        on_trouble: OnTrouble,
    ) -> Result<(Self, Claimed), ClaimError> {
        let claimed = lock(device).claim(on_trouble)?;
        Ok((Self(device.clone()), claimed))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.0).release_claim();
    }
}

/// Asks the driver of a device that this migration has claimed. The claim goes with it.
#[derive(Debug)]
pub struct DeviceHints {
    claim: Claim,
    signal: Arc<Signal>,
    discards: bool,
    /// The round whose window is open.
    round: Option<HintId>,
}

impl DeviceHints {
    /// The hints of the device that is claimed; `discards` is what came with the claim. `cancel` ends a wait.
    pub fn new(claim: Claim, discards: bool, cancel: &Cancel) -> Self {
        let signal = lock(&claim.0).signal();
        let woken = signal.clone();
        cancel.on_cancel(move || woken.give());
        Self {
            claim,
            signal,
            discards,
            round: None,
        }
    }
}

impl HintSource for DeviceHints {
    fn discards(&self) -> bool {
        self.discards
    }

    fn open(&mut self, window: HintWindow) -> Result<(), (HintWindow, HintSourceError)> {
        let mut device = lock(&self.claim.0);
        // Another driver may have come since the migration began, one that does not keep its blocks.
        if self.discards && !device.discards_hinted() {
            let text = "the guest's driver has changed, and does not keep hinted blocks until they are returned";
            return Err((window, HintSourceError(text.into())));
        }
        match device.open_window(window) {
            Ok(id) => {
                self.round = Some(id);
                Ok(())
            }
            Err((window, error)) => Err((window, HintSourceError(error.to_string()))),
        }
    }

    fn wait(&mut self, limit: Duration, cancel: &Cancel) -> Waited {
        let Some(id) = self.round else {
            return Waited::Lost("no hints were asked for".into());
        };
        let limit = Instant::now().checked_add(limit);
        loop {
            let seen = self.signal.changes();
            if cancel.is_cancelled() {
                return Waited::Cancelled;
            }
            match lock(&self.claim.0).has_finished(id) {
                Ok(true) => return Waited::Finished,
                Ok(false) => {}
                Err(reason) => return Waited::Lost(reason),
            }
            if !self.signal.wait(seen, limit) {
                return Waited::TimedOut;
            }
        }
    }

    fn close(&mut self) -> Result<HintWindow, HintSourceError> {
        self.round = None;
        lock(&self.claim.0)
            .close_window()
            .ok_or_else(|| HintSourceError("no window for hints is open".into()))
    }

    fn done(&mut self) {
        lock(&self.claim.0).done_for_migration();
    }
}
