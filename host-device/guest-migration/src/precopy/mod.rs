// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Precopy: memory is sent while the guest runs, round by round, until what is left is sent with the guest paused.
//!
//! ```text
//!  begin tracking, mark all
//!  ┌► hints wanted, under a new id ── wait for them, for a while (R14)
//!  │  send what is dirty; hints come meanwhile, too
//!  └─ hints dead (R6), sync ◄── again while what is left takes longer than the downtime allows
//!     [pre-switchover: DONE; wait to be told]
//!     pause the vm, last sync, send the rest, check, end; DONE
//! ```
//!
//! However it ends, the guest gets its hinted pages back (R16); and unless all of its memory is at the destination, it runs
//! on. What it can rely on is in the types: hints are taken by a [`HintWindow`](crate::HintWindow), which a sync consumes.

mod engine;
mod progress;
mod rate_limiter;
mod send;
mod sink;
#[cfg(test)]
mod tests;

use std::time::Duration;

use thiserror::Error;

use crate::dirty_tracking::{DirtyTracker, SentTable, TrackingError};
use crate::vm::{Vm, VmError};
use crate::{HintSource, LayoutError, Memory};

pub use engine::Precopy;
pub use progress::{Progress, ProgressEvent};
pub use sink::{Sink, SinkError};

/// How a migration is to go. The names are those of QEMU's `migrate-set-parameters` where it has one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Parameters {
    /// `max-bandwidth`: bytes a second over the wire while the guest runs; 0 for as many as there can be.
    pub max_bandwidth: u64,
    /// `downtime-limit`: the guest is paused once what is left can be sent in this time.
    pub downtime_limit: Duration,
    /// `max-rounds`: the guest is paused after so many rounds, however much is left. At least 1.
    pub max_rounds: u32,
    /// `free-page-hint-wait`: how long a migration waits for hints, all its rounds together (R14).
    pub hint_wait: Duration,
    /// `zero-page-detection`: whether pages are read to see if they are zero. Without it only holes of the memory files are
    /// sent as zeros, and pages can go out without a copy.
    pub zero_page_detection: bool,
    /// `postcopy-ram`: refused; with hints it would lose pages (R7).
    pub postcopy: bool,
    /// `pause-before-switchover`: once what is left would fit, hinted pages are returned, and the migration waits to be told
    /// that the machine was paused.
    pub pause_before_switchover: bool,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            max_bandwidth: 0,
            downtime_limit: Duration::from_millis(300),
            max_rounds: 10,
            hint_wait: Duration::from_secs(2),
            zero_page_detection: true,
            postcopy: false,
            pause_before_switchover: false,
        }
    }
}

/// What a migration is made of.
pub struct Parts {
    /// What is moved.
    pub memory: Memory,
    /// Who knows of writes.
    pub tracker: Box<dyn DirtyTracker>,
    /// What was sent of each page, to compare it with at the end (`verify`). A tracker that compares needs none.
    pub sent: Option<SentTable>,
    /// Who asks for hints, if they are to be used. They must be sound with the tracker.
    pub hints: Option<Box<dyn HintSource>>,
    /// Who pauses the guest. Nobody, with `pause-before-switchover`.
    pub vm: Option<Box<dyn Vm>>,
}

/// Why a migration failed. The guest runs on, and has its pages back.
#[derive(Debug, Error)]
pub enum PrecopyError {
    /// It was told to end.
    #[error("the migration was cancelled")]
    Cancelled,
    /// Both were asked for (R7).
    #[error("free-page-hint cannot be used with postcopy-ram: a page that was not sent may be asked for when it is too late; switch one of them off")]
    PostcopyWithHints,
    /// It is not there.
    #[error("postcopy-ram is not supported: switch it off")]
    Postcopy,
    /// There is nobody to pause the machine.
    #[error("nobody can pause the machine: name its QMP socket or its process, or use pause-before-switchover")]
    NoVm,
    /// Hints would not be sound.
    #[error("dirty tracking by {0} may use hints only if hinted pages are discarded: start the device with --discard-hinted, and use a driver that accepts it")]
    UnsoundHints(&'static str),
    /// See [`LayoutError`].
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// See [`TrackingError`].
    #[error(transparent)]
    Tracking(#[from] TrackingError),
    /// The destination cannot be reached, or refuses, or is gone.
    #[error("{0}")]
    Sink(SinkError),
    /// Guest memory cannot be read.
    #[error("guest memory cannot be read at {offset:#x} of block {block}: {source}")]
    Read {
        /// The index of the block.
        block: usize,
        /// Bytes from its start.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The window of hints is gone, and with it what may be sent.
    #[error("the hints of this round are lost: {0}")]
    Hints(String),
    /// The machine was not paused.
    #[error("the machine cannot be paused: {0}")]
    Vm(#[from] VmError),
}
