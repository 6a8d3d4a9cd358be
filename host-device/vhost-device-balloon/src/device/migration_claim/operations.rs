// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Operations of a migration on the balloon: the claim, the hint window, the end of hinting. The caller holds the
//! device's lock.

use std::sync::Arc;

use guest_migration::HintWindow;
use shared_abi::command::HintId;
use shared_abi::hinting::device::Phase;

use super::{
    ClaimError, ClaimedResources, Invalidated, MigrationClaim, OnInvalidated, PreparedClaim,
};
use crate::device::hinting::{HintingChanges, HintingError};
use crate::device::Device;
use crate::event_count::EventCount;
use crate::memory::{HoleRecorder, Ram};

impl Device {
    /// Returns the event count of hinting. It changes when a hint round changes its phase, when the driver reads the
    /// command id, and when the claim is invalidated.
    pub fn hinting_events(&self) -> Arc<EventCount> {
        self.hinting_events.clone()
    }

    /// Claims hinting, and the current guest memory, for a migration. Ends a hint round in progress. Takes time for each
    /// page of guest memory.
    ///
    /// # Errors
    ///
    /// If another migration has the claim, or guest memory cannot be migrated.
    pub fn claim(&mut self, on_invalidated: OnInvalidated) -> Result<ClaimedResources, ClaimError> {
        let prepared = PreparedClaim::new(self.check_claimable()?)?;
        self.claim_with(on_invalidated, prepared)
    }

    /// Checks whether a migration can claim hinting, and returns the guest memory to prepare the claim with.
    ///
    /// # Errors
    ///
    /// If another migration has the claim, or there is no guest memory.
    pub fn check_claimable(&self) -> Result<Ram, ClaimError> {
        if self.claim.is_some() {
            return Err(ClaimError::AlreadyClaimed);
        }
        self.ram_bytes()?;
        Ok(self.ram())
    }

    /// Claims as [`Device::claim`], with resources that were prepared after [`Device::check_claimable`].
    ///
    /// # Errors
    ///
    /// As there, and if guest memory has changed since.
    pub fn claim_with(
        &mut self,
        on_invalidated: OnInvalidated,
        prepared: PreparedClaim,
    ) -> Result<ClaimedResources, ClaimError> {
        self.check_claimable()?;
        let PreparedClaim {
            ram,
            memory,
            punched,
        } = prepared;
        if !ram.has_same_layout(&self.ram) {
            return Err(ClaimError::MemoryChanged);
        }
        self.ram.set_hole_recorder(Some(HoleRecorder {
            layout: memory.layout().clone(),
            punched: punched.clone(),
        }));
        self.detect_driver_restart();
        let changes = self.hinting.claim();
        self.publish_changes(changes);
        let discards = self.discards_hinted();
        self.claim = Some(MigrationClaim {
            on_invalidated,
            is_invalidated: false,
            hints_need_discard: discards,
        });
        Ok(ClaimedResources {
            memory,
            punched,
            discards,
            hint_availability: self.check_hinting_available(),
        })
    }

    /// Sets whether a hint may only spare a page that is discarded: whether the migration finds written pages by their
    /// content. True until this call, if hinted blocks are discarded.
    pub fn set_hints_need_discard(&mut self, need: bool) {
        if let Some(claim) = &mut self.claim {
            claim.hints_need_discard = need;
        }
    }

    /// Releases the claim at the end of the migration. The guest frees its hinted blocks (R16), and QMP clients
    /// may use hinting again.
    pub fn release_claim(&mut self) {
        if self.claim.take().is_some() {
            self.hinting.retire_hole_recorder(self.ram.hole_recorder());
            self.ram.set_hole_recorder(None);
            self.finish_hinting_if_requested();
            self.hinting.release_claim();
        }
    }

    /// Requests hints under a new id, and applies them to `window`.
    ///
    /// # Errors
    ///
    /// If the driver cannot answer, guest memory has changed since the claim, or no id is free. The
    /// error contains the window.
    pub fn open_window(
        &mut self,
        window: HintWindow,
    ) -> Result<HintId, (HintWindow, HintingError)> {
        self.detect_driver_restart();
        let same = self.claim.as_ref().is_some_and(|it| !it.is_invalidated);
        let allowed = self.check_hinting_available().and(match same {
            true => Ok(()),
            false => Err(HintingError::MemoryChanged),
        });
        if let Err(error) = allowed {
            return Err((window, error));
        }
        let cmd_id = self.hinting.cmd_id();
        match self.hinting.open_window(window) {
            Ok(changes) => {
                self.publish_changes(changes);
                // `open_window` has just issued the id.
                Ok(self.hinting.phase().id().unwrap_or(HintId::FIRST))
            }
            Err((window, error)) => {
                let changed = cmd_id != self.hinting.cmd_id();
                self.publish_changes(HintingChanges {
                    config: changed,
                    phase: changed,
                });
                Err((window, error))
            }
        }
    }

    /// Closes the window, and returns it if it was open, whatever the state of the driver.
    pub fn close_window(&mut self) -> Option<HintWindow> {
        let (window, changes) = self.hinting.close_window();
        self.publish_changes(changes);
        window
    }

    /// Shows DONE to the driver, if any hint round was requested since the daemon started.
    pub fn finish_hinting_if_requested(&mut self) {
        if self.hinting.has_requested_hints() {
            self.finish_hinting();
        }
    }

    /// Returns whether the driver has finished the hint round `id`.
    ///
    /// # Errors
    ///
    /// Why the driver will not finish the round: it was reset or disconnected, or cannot answer.
    pub fn is_hint_round_finished(&mut self, id: HintId) -> Result<bool, String> {
        self.detect_driver_restart();
        match self.hinting.phase() {
            Phase::Finished(now) if now == id => Ok(true),
            Phase::Requested(now) | Phase::Started(now) if now == id => Ok(false),
            _ => Err(match self.check_hinting_available() {
                Err(error) => error.to_string(),
                Ok(()) => "driver restarted".into(),
            }),
        }
    }

    /// Returns whether the driver has read the last command id. True if it cannot: its queues are stopped, or no
    /// front end is connected.
    pub fn is_cmd_id_read(&self) -> bool {
        self.are_queues_stopped()
            || self
                .connection
                .as_ref()
                .is_none_or(|it| !it.cmd_id_unread.get())
    }

    /// Reports an event to the migration, if there is one, and invalidates its claim.
    pub(in crate::device) fn invalidate_claim(&mut self, invalidated: Invalidated) {
        if let Some(claim) = &mut self.claim {
            // A front end that disconnects no longer shares memory, so this holds for both events.
            claim.is_invalidated = true;
            (claim.on_invalidated)(invalidated);
        }
        self.hinting_events.notify_all();
    }
}
