// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as the hint source of a migration.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_migration::{CancelToken, HintSource, HintSourceError, HintWindow, WaitOutcome};
use shared_abi::command::HintId;

use crate::device::migration_claim::{ClaimError, ClaimedResources, OnInvalidated, PreparedClaim};
use crate::device_lock::DeviceLock;
use crate::event_count::EventCount;
use crate::sync::lock;

/// A migration's claim on a device. Dropping it releases the claim, and the guest frees its hinted blocks (R16).
#[derive(Debug)]
#[must_use = "dropping it ends the claim"]
pub struct ClaimGuard(Arc<DeviceLock>);

impl ClaimGuard {
    /// Claims `device`. `on_invalidated` runs under the device's lock: it must neither wait nor lock the device.
    ///
    /// # Errors
    ///
    /// As [`Device::claim`].
    pub fn new(
        device: &Arc<DeviceLock>,
        on_invalidated: OnInvalidated,
    ) -> Result<(Self, ClaimedResources), ClaimError> {
        let ram = lock(device).check_claimable()?;
        let prepared = PreparedClaim::new(ram)?;
        let claimed = lock(device).claim_with(on_invalidated, prepared)?;
        Ok((Self(device.clone()), claimed))
    }
}

impl Drop for ClaimGuard {
    fn drop(&mut self) {
        lock(&self.0).release_claim();
    }
}

/// Requests hints from the driver of a claimed device. Owns the claim.
#[derive(Debug)]
pub struct DeviceHintSource {
    claim: ClaimGuard,
    hinting_events: Arc<EventCount>,
    discards: bool,
    /// The hint round whose window is open.
    hint_round: Option<HintId>,
}

impl DeviceHintSource {
    /// Creates the hint source of a claimed device. `discards` is that of the claimed resources. `cancel` ends a wait.
    pub fn new(claim: ClaimGuard, discards: bool, cancel: &CancelToken) -> Self {
        let hinting_events = lock(&claim.0).hinting_events();
        let woken = hinting_events.clone();
        cancel.on_cancel(move || woken.notify_all());
        Self {
            claim,
            hinting_events,
            discards,
            hint_round: None,
        }
    }
}

impl HintSource for DeviceHintSource {
    fn discards(&self) -> bool {
        self.discards
    }

    fn open(&mut self, window: HintWindow) -> Result<(), (HintWindow, HintSourceError)> {
        let mut device = lock(&self.claim.0);
        // Another driver may have started since the migration began, one that does not keep its hinted blocks.
        if self.discards && !device.discards_hinted() {
            let text = "driver changed during migration, and does not keep hinted blocks until their buffers are returned";
            return Err((window, HintSourceError(text.into())));
        }
        match device.open_window(window) {
            Ok(id) => {
                self.hint_round = Some(id);
                Ok(())
            }
            Err((window, error)) => Err((window, HintSourceError(error.to_string()))),
        }
    }

    fn wait(&mut self, timeout: Duration, cancel: &CancelToken) -> WaitOutcome {
        let Some(id) = self.hint_round else {
            return WaitOutcome::Lost("no hint round was requested".into());
        };
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let seen = self.hinting_events.generation();
            if cancel.is_cancelled() {
                return WaitOutcome::Cancelled;
            }
            match lock(&self.claim.0).is_hint_round_finished(id) {
                Ok(true) => return WaitOutcome::Finished,
                Ok(false) => {}
                Err(reason) => return WaitOutcome::Lost(reason),
            }
            if !self.hinting_events.wait(seen, deadline) {
                return WaitOutcome::TimedOut;
            }
        }
    }

    fn close(&mut self) -> Result<HintWindow, HintSourceError> {
        self.hint_round = None;
        lock(&self.claim.0)
            .close_window()
            .ok_or_else(|| HintSourceError("no hint window is open".into()))
    }

    fn done(&mut self) {
        lock(&self.claim.0).finish_hinting_if_requested();
    }
}
