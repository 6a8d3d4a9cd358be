// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Precopy: sends memory in iterations while the guest runs, and the rest while the guest is paused.
//!
//! ```text
//!  start tracking, mark all pages dirty
//!  ┌► open a hint round ── wait for hints, within a limit (R14)
//!  │  send dirty pages; more hints arrive meanwhile
//!  └─ close the hint round (R6), dirty sync ◄── repeat while the rest exceeds the downtime limit
//!     [pre-switchover: DONE, wait for migrate-continue]
//!     pause the VM, last dirty sync, send the rest, verify, finish; DONE
//! ```
//!
//! However a migration ends, the guest gets its hinted pages back (R16). Unless all of its memory is at the
//! destination, the guest continues to run. The types enforce the order of hints and dirty syncs: a
//! [`HintWindow`](crate::HintWindow) accepts hints, and a sync consumes it.

mod engine;
mod hint_rounds;
mod pause_guard;
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

/// Parameters of a migration. Names are those of QEMU's `migrate-set-parameters` where QEMU has one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Parameters {
    /// `max-bandwidth`: limit in bytes per second while the guest runs. 0 means no limit.
    pub max_bandwidth: u64,
    /// `downtime-limit`: the guest is paused once the remaining pages can be sent in this time.
    pub downtime_limit: Duration,
    /// `max-rounds`: the guest is paused after this number of iterations, however much remains. At least 1.
    pub max_rounds: u32,
    /// `free-page-hint-wait`: how long a migration waits for hints, in total over all iterations (R14).
    pub hint_wait: Duration,
    /// `zero-page-detection`: whether pages are read to find pages of zeros. Without it only holes of the memory files
    /// are sent as zeros, and pages can be sent without a copy.
    pub zero_page_detection: bool,
    /// `postcopy-ram`: refused. With hints it would lose pages (R7).
    pub postcopy: bool,
    /// `pause-before-switchover`: before the last iteration, the migration returns the hinted pages and waits until a
    /// client has paused the guest and sends `migrate-continue`.
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

/// The components of a migration.
pub struct Parts {
    /// The memory to send.
    pub memory: Memory,
    /// The dirty tracker.
    pub tracker: Box<dyn DirtyTracker>,
    /// Records the content that was sent, for a comparison at the end (`verify`). Unnecessary with a tracker that
    /// compares content.
    pub sent: Option<SentTable>,
    /// The source of hints, if hints are used. Hints must be sound with the tracker.
    pub hints: Option<Box<dyn HintSource>>,
    /// The VM to pause. It may be `None` with `pause-before-switchover`.
    pub vm: Option<Box<dyn Vm>>,
}

/// Why a migration failed. The guest continues to run and has its hinted pages back.
#[derive(Debug, Error)]
pub enum PrecopyError {
    /// The migration was cancelled.
    #[error("migration was cancelled")]
    Cancelled,
    /// Post-copy and hints were requested together (R7).
    #[error("free-page-hint cannot be used with postcopy-ram: the destination may request a page that hints have skipped; disable one of them")]
    PostcopyWithHints,
    /// Post-copy was requested and is not supported.
    #[error("postcopy-ram is not supported: disable it")]
    Postcopy,
    /// There is no VM to pause.
    #[error("guest cannot be paused: give the QMP socket or the process of its VMM, or enable pause-before-switchover")]
    NoVm,
    /// Hints are not sound with the dirty tracker.
    #[error("{0} tracking can use hints only if hinted pages are discarded: start the daemon with --discard-hinted, and use a driver that accepts it")]
    UnsoundHints(&'static str),
    /// See [`LayoutError`].
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// See [`TrackingError`].
    #[error(transparent)]
    Tracking(#[from] TrackingError),
    /// The destination cannot be reached, refuses the stream, or has disconnected.
    #[error("{0}")]
    Sink(SinkError),
    /// Guest memory cannot be read.
    #[error("guest memory cannot be read at offset {offset:#x} of RAM block {block}: {source}")]
    Read {
        /// Index of the RAM block.
        block: usize,
        /// Offset in the RAM block, in bytes.
        offset: u64,
        /// The system error.
        source: std::io::Error,
    },
    /// The hint window was lost, and with it the right to change the dirty bitmap.
    #[error("hint round is lost: {0}")]
    Hints(String),
    /// The VM was not paused.
    #[error("guest cannot be paused: {0}")]
    Vm(#[from] VmError),
}
