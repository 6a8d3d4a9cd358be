// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration's exclusive use of hinting.
//!
//! One migration at a time may claim hinting. Until it releases the claim, the hinting commands of QMP clients are
//! refused, and the migration opens and closes the hint window. The device reports to the migration when guest memory
//! changes or the front end disconnects. All of this happens under the device's lock and never waits.

use std::sync::Arc;

use guest_migration::dirty_tracking::{PunchedPages, TrackingError};
use guest_migration::{HintWindow, Memory};
use shared_abi::command::HintId;
use shared_abi::hinting::device::Phase;

use super::hinting::HintingError;
use super::Device;
use crate::event_count::EventCount;
use crate::memory::{HoleRecorder, RamLayoutError};

/// An event that invalidates a migration's claim.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Invalidated {
    /// The front end shares different guest memory.
    MemoryChanged(String),
    /// The front end disconnected.
    FrontEndDisconnected(String),
}

/// Callback for [`Invalidated`]. It runs under the device's lock: it must neither wait nor lock the device.
pub type OnInvalidated = Box<dyn Fn(Invalidated) + Send>;

/// A migration's claim.
pub(super) struct MigrationClaim {
    on_invalidated: OnInvalidated,
    /// Whether guest memory is no longer the memory that the migration's window covers.
    is_invalidated: bool,
}

/// Why a migration cannot claim hinting.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another migration has claimed hinting.
    #[error("a migration is under way already: one at a time")]
    AlreadyClaimed,
    /// No front end has shared guest memory.
    #[error(
        "no front end has shared its memory yet: start the VMM with this device's socket first"
    )]
    NoMemory,
    /// Guest memory cannot be migrated: for example, it is not in files.
    #[error("guest memory cannot be migrated: {0}")]
    Memory(#[from] RamLayoutError),
    /// The host has no memory for the bitmap of punched pages.
    #[error(transparent)]
    Track(#[from] TrackingError),
}

/// Resources that a migration gets with its claim.
#[derive(Debug)]
pub struct ClaimedResources {
    /// Guest memory.
    pub memory: Memory,
    /// Records the pages that the device releases or discards. The device updates it under its lock
    /// while the claim lasts.
    pub punched: PunchedPages,
    /// Whether hinted blocks are discarded before the guest may use them again.
    pub discards: bool,
    /// Whether hints are available now; the error is the reason if they are not.
    pub hint_availability: Result<(), HintingError>,
}

impl Device {
    /// Returns the event count of hinting. It changes when a hint round changes its phase, when the driver reads the
    /// command id, and when the claim is invalidated.
    pub fn hinting_events(&self) -> Arc<EventCount> {
        self.hinting_events.clone()
    }

    /// Claims hinting, and the current guest memory, for a migration. Ends a hint round in progress.
    ///
    /// # Errors
    ///
    /// If another migration has the claim, or guest memory cannot be migrated.
    pub fn claim(&mut self, on_invalidated: OnInvalidated) -> Result<ClaimedResources, ClaimError> {
        if self.claim.is_some() {
            return Err(ClaimError::AlreadyClaimed);
        }
        if self.ram.size() == 0 {
            return Err(ClaimError::NoMemory);
        }
        let memory = self.ram.memory()?;
        let punched = PunchedPages::new(memory.layout())?;
        self.ram.set_hole_recorder(Some(HoleRecorder {
            layout: memory.layout().clone(),
            punched: punched.clone(),
        }));
        self.detect_driver_restart();
        let changes = self.hinting.claim();
        self.publish_changes(changes);
        self.claim = Some(MigrationClaim {
            on_invalidated,
            is_invalidated: false,
        });
        Ok(ClaimedResources {
            memory,
            punched,
            discards: self.discards_hinted(),
            hint_availability: self.check_hinting_available(),
        })
    }

    /// Releases the claim at the end of the migration. The guest frees its hinted blocks (R16), and QMP clients
    /// may use hinting again.
    pub fn release_claim(&mut self) {
        if self.claim.take().is_some() {
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
                self.publish_changes(super::HintingChanges {
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
                Ok(()) => "the guest's driver was started anew".into(),
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
    pub(super) fn invalidate_claim(&mut self, invalidated: Invalidated) {
        if let Some(claim) = &mut self.claim {
            // A front end that disconnects no longer shares memory, so this holds for both events.
            claim.is_invalidated = true;
            (claim.on_invalidated)(invalidated);
        }
        self.hinting_events.notify_all();
    }
}
