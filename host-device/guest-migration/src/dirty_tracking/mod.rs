// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty tracking: finds the pages that the guest has written.

mod content;
#[cfg(test)]
mod mock_tracker;
mod page_hashes;
mod pagemap;
mod process_snapshot;
mod punched_pages;
mod quiesce;
mod reclaim;
mod run_builder;
mod sent_table;
mod soft_dirty;
#[cfg(test)]
mod test_support;
mod tracker_choice;
mod tracking_error;

use std::time::Duration;

pub use content::ContentTracker;
#[cfg(test)]
pub(crate) use mock_tracker::{mock_tracker, MockWrites};
pub use punched_pages::PunchedPages;
pub use quiesce::Quiesce;
pub use sent_table::SentTable;
pub use soft_dirty::SoftDirtyTracker;
#[cfg(test)]
use test_support::{test_memory, NoWriters};
pub use tracker_choice::{choose_tracker, TrackerChoice, TrackingMode};
pub use tracking_error::TrackingError;

use crate::{PageRun, SyncPhase};

/// Whether the guest runs during a dirty sync.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// The guest runs. A write during the sync may show only at the next sync.
    Live,
    /// The guest is paused, and stays paused.
    Paused,
}

/// The result of a dirty sync.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SyncStats {
    /// Pages that the sync marked and that were clean before.
    pub marked: u64,
    /// How long processes were stopped for the sync.
    pub stop_time: Duration,
}

/// Finds the pages that were written.
///
/// A tracker is sound if it marks each page that was written after it was taken to be sent. It must mark the page no
/// later than at the first dirty sync that begins after the write.
pub trait DirtyTracker: Send {
    /// Returns the name of the tracker, as the parameter `dirty-tracking` has it.
    fn name(&self) -> &'static str;

    /// Returns whether the tracker is sound with hints only if the hinted pages are made zero before the guest uses
    /// them again ([`HintSource::discards`](crate::HintSource::discards)).
    fn hints_need_discard(&self) -> bool;

    /// Returns whether the tracker needs the bytes of each page that is sent. The sender must then copy each page.
    fn wants_bytes(&self) -> bool;

    /// Starts tracking: the first sync shows each write after this call. Called once, before any page is sent.
    ///
    /// # Errors
    ///
    /// If writes cannot be tracked.
    fn start(&mut self) -> Result<(), TrackingError>;

    /// Marks the pages that were written since the last sync, or since [`start`](Self::start).
    ///
    /// # Errors
    ///
    /// If writes can no longer be tracked. The migration must then fail.
    fn sync(&mut self, phase: &SyncPhase, stage: Stage) -> Result<SyncStats, TrackingError>;

    /// Records that the pages `run` were sent with the content `bytes`, [`PAGE_SIZE`](crate::PAGE_SIZE) each. `bytes`
    /// may be empty if the tracker does not [want](Self::wants_bytes) them. Called before the next sync for each page
    /// that is sent with its content.
    fn record_sent(&mut self, run: PageRun, bytes: &[u8]) {
        let _ = (run, bytes);
    }

    /// Records that the pages `run` were sent as zeros. Called before the next sync for each page that is sent as
    /// zeros.
    fn record_sent_zeros(&mut self, run: PageRun) {
        let _ = run;
    }

    /// Returns the content that was sent, if the tracker records it.
    fn sent_table(&self) -> Option<&SentTable> {
        None
    }
}
