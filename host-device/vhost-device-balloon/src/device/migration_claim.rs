// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hinting in the hands of a migration.
//!
//! One migration at a time may claim hinting. From then until it lets go, rounds are its own: the operator's commands
//! are refused, and it gives and takes back the window in which hints count. The device tells it when the memory or the
//! front end goes. All of this happens under the device's lock and waits for nothing.

use std::sync::Arc;

use guest_migration::dirty_tracking::{PunchedPages, TrackingError};
use guest_migration::{HintWindow, Memory};
use shared_abi::command::HintId;
use shared_abi::hinting::device::Phase;

use super::hinting::HintingError;
use super::Device;
use crate::event_count::EventCount;
use crate::memory::{HoleRecorder, RamLayoutError};

/// What happens to the device while a migration has a claim on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Invalidated {
    /// The front end shares other memory than that which is being migrated.
    MemoryChanged(String),
    /// The front end has gone.
    FrontEndDisconnected(String),
}

/// Who is told of [`Invalidated`], under the device's lock: it must not wait, nor lock the device.
pub type OnInvalidated = Box<dyn Fn(Invalidated) + Send>;

/// A migration's claim.
pub(super) struct MigrationClaim {
    on_invalidated: OnInvalidated,
    /// The memory is another than that which the migration's window is about.
    is_invalidated: bool,
}

/// Why a migration cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another one has hinting.
    #[error("a migration is under way already: one at a time")]
    AlreadyClaimed,
    /// There is nothing to migrate.
    #[error(
        "no front end has shared its memory yet: start the VMM with this device's socket first"
    )]
    NoMemory,
    /// Guest memory is not in files.
    #[error("guest memory cannot be migrated: {0}")]
    Memory(#[from] RamLayoutError),
    /// There is no memory for what has to be noted.
    #[error(transparent)]
    Track(#[from] TrackingError),
}

/// What a migration gets with its claim.
#[derive(Debug)]
pub struct ClaimedResources {
    /// Guest memory.
    pub memory: Memory,
    /// Where the device notes what it gives back to the host, under its lock, as long as the claim lasts.
    pub punched: PunchedPages,
    /// Whether the memory of hinted blocks is given back to the host before the guest may use them again.
    pub discards: bool,
    /// Whether hints could be had now, and why not.
    pub hint_availability: Result<(), HintingError>,
}

impl Device {
    /// What gives a signal whenever a round of hinting gets further, or whoever answers goes.
    pub fn hinting_events(&self) -> Arc<EventCount> {
        self.hinting_events.clone()
    }

    /// Claims hinting, and guest memory as it is now, for a migration. A round of the operator's ends.
    ///
    /// # Errors
    ///
    /// If another migration has it, or there is no memory that can be migrated.
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

    /// The migration is over: the guest takes its blocks back (R16), and the operator may give commands again.
    pub fn release_claim(&mut self) {
        if self.claim.take().is_some() {
            self.ram.set_hole_recorder(None);
            self.finish_hinting_if_requested();
            self.hinting.release_claim();
        }
    }

    /// Asks the driver for hints under a new id, and lets them count in `window`.
    ///
    /// # Errors
    ///
    /// If no driver is there that could answer. The window comes back.
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
                // `open_window` has just issued it.
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

    /// Ends the window, and gives it back if it was open: whatever has become of the driver.
    pub fn close_window(&mut self) -> Option<HintWindow> {
        let (window, changes) = self.hinting.close_window();
        self.publish_changes(changes);
        window
    }

    /// Tells the driver that hinted blocks are of no more use, if it was ever asked for some.
    pub fn finish_hinting_if_requested(&mut self) {
        if self.hinting.has_requested_hints() {
            self.finish_hinting();
        }
    }

    /// Whether the driver has said all in the round `id`; an error if it will not say more, and why.
    ///
    /// # Errors
    ///
    /// If the driver of that round has gone, or cannot answer.
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

    /// Whether the driver knows of the last command, as far as it is there to hear of it.
    pub fn is_cmd_id_read(&self) -> bool {
        self.are_queues_stopped()
            || self
                .connection
                .as_ref()
                .is_none_or(|it| !it.cmd_id_unread.get())
    }

    /// Tells the migration, if there is one.
    pub(super) fn invalidate_claim(&mut self, invalidated: Invalidated) {
        if let Some(claim) = &mut self.claim {
            // With the front end goes the memory that it shared.
            claim.is_invalidated = true;
            (claim.on_invalidated)(invalidated);
        }
        self.hinting_events.notify_all();
    }
}
