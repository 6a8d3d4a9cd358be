// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of dirty tracking.

use std::io;

use thiserror::Error;

use crate::RamBlock;

/// Why writes cannot be tracked.
#[derive(Debug, Error)]
pub enum TrackingError {
    /// The tracking mode is not available, for this reason.
    #[error("{0}")]
    Unavailable(String),
    /// Guest memory cannot be read.
    #[error("guest memory cannot be read at offset {offset:#x} of RAM block {block}: {source}")]
    Read {
        /// Index of the RAM block.
        block: usize,
        /// Offset in the RAM block, in bytes.
        offset: u64,
        /// The system error.
        source: io::Error,
    },
    /// A process that maps guest memory cannot be examined.
    #[error("process {pid}, which maps guest memory, cannot be tracked: {what}: {source}")]
    Process {
        /// The pid.
        pid: u32,
        /// The file or operation that failed.
        what: &'static str,
        /// The system error.
        source: io::Error,
    },
}

impl TrackingError {
    /// Returns the error for a bitmap of the pages of `block` that does not fit in memory.
    pub(super) fn no_bitmap(block: &RamBlock) -> Self {
        let name = block.name();
        Self::Unavailable(format!(
            "not enough memory for a page bitmap of RAM block '{name}'"
        ))
    }
}
