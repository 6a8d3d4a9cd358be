// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon device: configuration space and virtqueues.
//!
//! One [`Device`] lives as long as the program. Front ends connect and disconnect, and drivers start and stop. One
//! mutex protects the device. Locks are taken in the order device, queue. All work under these locks is bounded,
//! whatever the guest sends.
//!
//! This file contains the state of the device. Other files implement the operations on it, one kind each:
//!
//! - `front_end`: connection, guest memory, features and reset, as the front end reports them.
//! - `config_space`: accesses to configuration space.
//! - `queues`: requests of the driver, in turns of limited work. `pending_request`: a request that takes several turns.
//!   `queue_numbers`: which queue an index means.
//! - `releases`: the memory that one turn of a queue releases.
//! - `discard`: inhibits that memory is released or discarded.
//! - `driver`: detects whether a driver runs, and whether another one has taken over.
//! - `notify`: notifications of the driver and of QMP clients.
//! - `control`: operations of QMP clients.
//! - `missing_memory`: why guest memory is not known.
//! - [`migration_claim`]: operations of a migration.
//! - [`saved_state`]: saving and restoring.

mod config_space;
mod connection;
mod control;
mod discard;
mod discard_inhibition;
mod driver;
mod front_end;
pub mod guest_errors;
pub mod hinting;
pub mod migration_claim;
mod missing_memory;
mod notify;
mod pending_request;
pub mod pfn;
mod queue_numbers;
mod queues;
mod releases;
pub mod request;
pub mod saved_state;
pub mod stats;
mod status;
#[cfg(test)]
mod tests;

pub use connection::NotifyConfigChange;
pub use control::BalloonError;
pub use discard_inhibition::DiscardStatus;
pub use hinting::Retired;
pub use missing_memory::MissingMemory;
pub use request::MAX_QUEUE_SIZE;
pub use status::{phase_name, QueueStatus, StatsReport, VirtioStatus};

use std::sync::Arc;

use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;

use crate::event_count::EventCount;
use crate::events::Events;
use crate::memory::pin_scan::{PinFinder, PinScan};
use crate::memory::{PartialPages, Ram};
use crate::vring::{Interrupt, NotificationSuppression};
use connection::Connection;
use discard_inhibition::DiscardInhibition;
use guest_errors::GuestErrors;
use hinting::Hinting;
use migration_claim::MigrationClaim;
use stats::Stats;

/// A virtio memory balloon.
pub struct Device {
    offered_features: Features,
    suppression: NotificationSuppression,
    negotiated_features: Option<Features>,
    config: ConfigSpace,
    ram: Ram,
    partial_pages: PartialPages,
    discard_inhibition: DiscardInhibition,
    hinting: Hinting,
    /// The claim of a migration, while it lasts.
    claim: Option<MigrationClaim>,
    hinting_events: Arc<EventCount>,
    stats: Stats,
    guest_errors: GuestErrors,
    events: Arc<Events>,
    connection: Option<Connection>,
    pages_inflated: u64,
    pages_deflated: u64,
    bytes_released: u64,
    bytes_reported: u64,
    /// Buffer that requests are read into. Kept to reuse its allocation.
    buffer: Vec<u8>,
    /// Interrupts of the driver, which are sent without the device's lock.
    interrupts: Vec<Interrupt>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("offered", &self.offered_features)
            .field("negotiated", &self.negotiated_features)
            .field("config", &self.config)
            .field("hinting", &self.hinting)
            .finish_non_exhaustive()
    }
}

impl Device {
    /// Creates a balloon that offers `offered_features`, with no front end connected.
    pub fn new(offered_features: Features, events: Arc<Events>) -> Self {
        Self {
            offered_features,
            suppression: NotificationSuppression::default(),
            negotiated_features: None,
            config: ConfigSpace::default(),
            ram: Ram::default(),
            partial_pages: PartialPages::default(),
            discard_inhibition: DiscardInhibition::default(),
            hinting: Hinting::default(),
            claim: None,
            hinting_events: Arc::default(),
            stats: Stats::default(),
            guest_errors: GuestErrors::default(),
            events,
            connection: None,
            pages_inflated: 0,
            pages_deflated: 0,
            bytes_released: 0,
            bytes_reported: 0,
            buffer: Vec::new(),
            interrupts: Vec::new(),
        }
    }

    /// Returns the features that the device offers.
    pub fn offered_features(&self) -> Features {
        self.offered_features
    }

    /// Sets how drivers are asked to leave out notifications.
    #[must_use]
    pub fn with_suppression(mut self, suppression: NotificationSuppression) -> Self {
        self.suppression = suppression;
        self
    }

    /// Sets who searches for devices that pin guest memory.
    #[must_use]
    pub fn with_pin_finder(mut self, finder: PinFinder) -> Self {
        self.discard_inhibition.scan = PinScan::new(finder);
        self
    }

    /// Returns who searches for devices that pin guest memory.
    pub fn pin_finder(&self) -> PinFinder {
        self.discard_inhibition.scan.finder()
    }

    /// Returns the memory to free after the device's lock is released.
    pub fn take_retired(&mut self) -> Vec<Retired> {
        self.hinting.take_retired()
    }

    /// Returns the interrupts of the driver to send after the device's lock is released: a malicious front end can make
    /// the thread that sends one wait.
    pub fn take_interrupts(&mut self) -> Vec<Interrupt> {
        std::mem::take(&mut self.interrupts)
    }

    /// Returns how drivers are asked to leave out notifications.
    pub fn suppression(&self) -> NotificationSuppression {
        self.suppression
    }
}
