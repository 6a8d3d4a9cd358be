// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration's exclusive use of hinting.
//!
//! One migration at a time may claim hinting. Until it releases the claim, the hinting commands of QMP clients are
//! refused, and the migration opens and closes the hint window. The device reports to the migration when guest memory
//! changes or the front end disconnects. All of this happens under the device's lock and never waits.

mod operations;

use guest_migration::dirty_tracking::{PunchedPages, TrackingError};
use guest_migration::Memory;

use super::hinting::HintingError;
use super::missing_memory::MissingMemory;
use crate::memory::{Ram, RamLayoutError};

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
    /// Whether a hint may only spare a page that is discarded.
    pub(super) hints_need_discard: bool,
}

/// Why a migration cannot claim hinting.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another migration has claimed hinting.
    #[error("a migration is already in progress")]
    AlreadyClaimed,
    /// The front end shared different guest memory while the claim was prepared.
    #[error("front end changed guest memory while the migration started: try again")]
    MemoryChanged,
    /// Guest memory is not known.
    #[error(transparent)]
    NoMemory(#[from] MissingMemory),
    /// Guest memory cannot be migrated: for example, it is not in files.
    #[error("guest memory cannot be migrated: {0}")]
    Memory(#[from] RamLayoutError),
    /// The host has no memory for the bitmap of punched pages.
    #[error(transparent)]
    Track(#[from] TrackingError),
}

/// Resources for a claim. Making them takes time for each page of guest memory, and needs no lock.
#[derive(Debug)]
pub struct PreparedClaim {
    ram: Ram,
    memory: Memory,
    punched: PunchedPages,
}

impl PreparedClaim {
    /// Prepares to claim the memory `ram`.
    ///
    /// # Errors
    ///
    /// If guest memory cannot be migrated.
    pub fn new(ram: Ram) -> Result<Self, ClaimError> {
        let memory = ram.memory()?;
        let punched = PunchedPages::new(memory.layout())?;
        Ok(Self {
            ram,
            memory,
            punched,
        })
    }
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
