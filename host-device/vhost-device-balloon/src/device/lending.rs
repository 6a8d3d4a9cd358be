// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hinting in the hands of a migration.
//!
//! One migration at a time may claim hinting. From then until it lets go, rounds are its own: the operator's commands
//! are refused, and it gives and takes back the window in which hints count. The device tells it when the memory or the
//! front end goes. All of this happens under the device's lock and waits for nothing.

use std::sync::Arc;

use migration::track::{Punched, TrackError};
use migration::{HintWindow, Memory};
use shared_abi::command::HintId;
use shared_abi::hinting::device::Phase;

use super::hinting::HintingError;
use super::Device;
use crate::memory::{HoleNotes, LayoutFailure};
use crate::signal::Signal;

/// What happens to the device while a migration has a claim on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Trouble {
    /// The front end shares other memory than that which is being migrated.
    Memory(String),
    /// The front end has gone.
    FrontEnd(String),
}

/// Who is told of [`Trouble`], under the device's lock: it must not wait, nor lock the device.
pub type OnTrouble = Box<dyn Fn(Trouble) + Send>;

/// A migration's claim.
pub(super) struct Claim {
    on_trouble: OnTrouble,
    /// The memory is another than that which the migration's window is about.
    other_memory: bool,
}

/// Why a migration cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another one has hinting.
    #[error("a migration is under way already: one at a time")]
    Claimed,
    /// There is nothing to migrate.
    #[error(
        "no front end has shared its memory yet: start the VMM with this device's socket first"
    )]
    NoMemory,
    /// Guest memory is not in files.
    #[error("guest memory cannot be migrated: {0}")]
    Memory(#[from] LayoutFailure),
    /// There is no memory for what has to be noted.
    #[error(transparent)]
    Track(#[from] TrackError),
}

/// What a migration gets with its claim.
#[derive(Debug)]
pub struct Claimed {
    /// Guest memory.
    pub memory: Memory,
    /// Where the device notes what it gives back to the host, under its lock, as long as the claim lasts.
    pub punched: Punched,
    /// Whether the memory of hinted blocks is given back to the host before the guest may use them again.
    pub discards: bool,
    /// Whether hints could be had now, and why not.
    pub hints: Result<(), HintingError>,
}

impl Device {
    /// What gives a signal whenever a round of hinting gets further, or whoever answers goes.
    pub fn signal(&self) -> Arc<Signal> {
        self.signal.clone()
    }

    /// Claims hinting, and guest memory as it is now, for a migration. A round of the operator's ends.
    ///
    /// # Errors
    ///
    /// If another migration has it, or there is no memory that can be migrated.
    pub fn claim(&mut self, on_trouble: OnTrouble) -> Result<Claimed, ClaimError> {
        if self.claim.is_some() {
            return Err(ClaimError::Claimed);
        }
        if self.ram.bytes() == 0 {
            return Err(ClaimError::NoMemory);
        }
        let memory = self.ram.memory()?;
        let punched = Punched::new(memory.layout())?;
        self.ram.note_holes(Some(HoleNotes {
            layout: memory.layout().clone(),
            punched: punched.clone(),
        }));
        self.notice_new_driver();
        let changes = self.hinting.lend();
        self.pass_on(changes);
        self.claim = Some(Claim {
            on_trouble,
            other_memory: false,
        });
        Ok(Claimed {
            memory,
            punched,
            discards: self.discards_hinted(),
            hints: self.can_hint(),
        })
    }

    /// The migration is over: the guest takes its blocks back (R16), and the operator may give commands again.
    pub fn release_claim(&mut self) {
        if self.claim.take().is_some() {
            self.ram.note_holes(None);
            self.done_for_migration();
            self.hinting.take_back();
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
        self.notice_new_driver();
        let same = self.claim.as_ref().is_some_and(|it| !it.other_memory);
        let allowed = self.can_hint().and(match same {
            true => Ok(()),
            false => Err(HintingError::OtherMemory),
        });
        if let Err(error) = allowed {
            return Err((window, error));
        }
        let command = self.hinting.command();
        match self.hinting.open(window) {
            Ok(changes) => {
                self.pass_on(changes);
                // `open` has just issued it.
                Ok(self.hinting.phase().id().unwrap_or(HintId::FIRST))
            }
            Err((window, error)) => {
                let changed = command != self.hinting.command();
                self.pass_on(super::Changes {
                    config: changed,
                    phase: changed,
                });
                Err((window, error))
            }
        }
    }

    /// Ends the window, and gives it back if it was open: whatever has become of the driver.
    pub fn close_window(&mut self) -> Option<HintWindow> {
        let (window, changes) = self.hinting.close();
        self.pass_on(changes);
        window
    }

    /// Tells the driver that hinted blocks are of no more use, if it was ever asked for some.
    pub fn done_for_migration(&mut self) {
        if self.hinting.has_asked() {
            self.finish_hinting();
        }
    }

    /// Whether the driver has said all in the round `id`; an error if it will not say more, and why.
    ///
    /// # Errors
    ///
    /// If the driver of that round has gone, or cannot answer.
    pub fn has_finished(&mut self, id: HintId) -> Result<bool, String> {
        self.notice_new_driver();
        match self.hinting.phase() {
            Phase::Finished(now) if now == id => Ok(true),
            Phase::Requested(now) | Phase::Started(now) if now == id => Ok(false),
            _ => Err(match self.can_hint() {
                Err(error) => error.to_string(),
                Ok(()) => "the guest's driver was started anew".into(),
            }),
        }
    }

    /// Whether the driver knows of the last command, as far as it is there to hear of it.
    pub fn is_heard(&self) -> bool {
        self.stopped() || self.connection.as_ref().is_none_or(|it| !it.unread.get())
    }

    /// Tells the migration, if there is one.
    pub(super) fn tell_trouble(&mut self, trouble: Trouble) {
        if let Some(claim) = &mut self.claim {
            // With the front end goes the memory that it shared.
            claim.other_memory = true;
            (claim.on_trouble)(trouble);
        }
        self.signal.give();
    }
}
