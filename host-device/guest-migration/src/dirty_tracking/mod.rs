// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who knows which pages the guest has written.

mod content;
mod mock_tracker;
mod pagemap;
mod punched_pages;
mod quiesce;
mod sent_table;
mod soft_dirty;
mod tracker_choice;

use std::io;
use std::time::Duration;

use thiserror::Error;

pub use content::ContentTracker;
pub use mock_tracker::{mock_tracker, MockTracker, MockWrites};
pub use punched_pages::PunchedPages;
pub use quiesce::{NoWriters, Quiesce};
pub use sent_table::SentTable;
pub use soft_dirty::SoftDirtyTracker;
pub use tracker_choice::{choose_tracker, TrackerChoice, TrackingMode};

use crate::{PageRun, SyncPhase};

/// Why writes cannot be tracked.
#[derive(Debug, Error)]
pub enum TrackingError {
    /// The way of tracking is not to be had, for this reason.
    #[error("{0}")]
    Unavailable(String),
    /// Guest memory cannot be read.
    #[error("guest memory cannot be read at {offset:#x} of block {block}: {source}")]
    Read {
        /// The index of the block.
        block: usize,
        /// Bytes from its start.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// A process that maps guest memory cannot be examined.
    #[error("the process {pid}, which maps guest memory, cannot be tracked: {what}: {source}")]
    Process {
        /// Its number.
        pid: u32,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Whether the guest runs during a sync.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// It runs: what it writes meanwhile may show at the next sync only.
    Live,
    /// It is paused, and stays so.
    Paused,
}

/// What a sync did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SyncStats {
    /// Pages that were not dirty before, and now are.
    pub marked: u64,
    /// How long processes were stopped for it.
    pub stop_time: Duration,
}

/// A way to know which pages were written.
///
/// Sound means: a page that was written after it was taken to be sent is marked at the next sync at the latest that begins
/// after the write.
pub trait DirtyTracker: Send {
    /// Its name for operators, as the parameter `dirty-tracking` has it.
    fn name(&self) -> &'static str;

    /// Whether it is sound with hints only if the hinted pages were made zero before the guest used them again
    /// ([`HintSource::discards`](crate::HintSource::discards)).
    fn hints_need_discard(&self) -> bool;

    /// Whether it must be told the very bytes that are sent. Then no page goes out without a copy.
    fn wants_bytes(&self) -> bool;

    /// Begins: each write after this shows at the first sync. Called once, before anything is sent.
    ///
    /// # Errors
    ///
    /// If writes cannot be tracked.
    fn start(&mut self) -> Result<(), TrackingError>;

    /// Marks the pages that were written since the last sync, or since [`start`](Self::start).
    ///
    /// # Errors
    ///
    /// If writes cannot be tracked any more. The migration must fail then.
    fn sync(&mut self, phase: &SyncPhase, stage: Stage) -> Result<SyncStats, TrackingError>;

    /// The pages `run` were sent, as these `bytes`, [`PAGE_SIZE`](crate::PAGE_SIZE) each; there may be none if it does not
    /// [want](Self::wants_bytes) them. Called for each page that is sent, before the next sync.
    fn record_sent(&mut self, run: PageRun, bytes: &[u8]) {
        let _ = (run, bytes);
    }

    /// The pages `run` were sent as zeros. Called for each page that is, before the next sync.
    fn record_sent_zeros(&mut self, run: PageRun) {
        let _ = run;
    }

    /// What was sent of each page, if it keeps that.
    fn sent_table(&self) -> Option<&SentTable> {
        None
    }
}

/// Memory with a block of so many pages each; the first is shown from address 0 on.
#[cfg(test)]
fn test_memory(pages: &[u64]) -> crate::Memory {
    use crate::{Layout, Memory, RamBlock, Region, PAGE_SIZE};
    use rustix::fs::{ftruncate, memfd_create, MemfdFlags};

    let lengths = pages.iter().map(|pages| pages * PAGE_SIZE);
    let names = ('a'..='z').map(String::from);
    let blocks = lengths
        .clone()
        .zip(names)
        .map(|(length, name)| RamBlock::new(&name, length).unwrap());
    let region = Region::new(0, pages[0] * PAGE_SIZE).unwrap();
    let layout = Layout::new(blocks, [region]).unwrap();
    let files = lengths.map(|length| {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, length).unwrap();
        file.into()
    });
    Memory::new(layout.into(), files.collect()).unwrap()
}
