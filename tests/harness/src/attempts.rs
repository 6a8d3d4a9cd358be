// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a loop that tries for something has tried enough.

use std::time::Instant;

use crate::HANG_TIMEOUT;

/// A loop ends after so many turns without progress, but not before [`HANG_TIMEOUT`] has passed.
const MIN_ATTEMPTS: u32 = 100;

/// The turns of a loop since it last got further.
#[derive(Debug)]
pub struct Attempts {
    progress: u64,
    count: u32,
    since: Instant,
}

impl Default for Attempts {
    fn default() -> Self {
        Self {
            progress: 0,
            count: 0,
            since: Instant::now(),
        }
    }
}

impl Attempts {
    /// Counts a turn. Returns whether there may be another, where the loop has come to `progress`.
    pub fn may_retry(&mut self, progress: u64) -> bool {
        if progress > self.progress {
            *self = Self {
                progress,
                ..Self::default()
            };
        }
        self.count += 1;
        self.count <= MIN_ATTEMPTS || self.since.elapsed() < HANG_TIMEOUT
    }
}
