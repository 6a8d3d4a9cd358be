// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limit of a retry loop.

use std::time::Instant;

use crate::HANG_TIMEOUT;

/// A loop ends after more attempts than this without progress, but not before [`HANG_TIMEOUT`].
const MIN_ATTEMPTS: u32 = 100;

/// The attempts of a loop since its last progress.
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
    /// Counts an attempt. Returns whether the loop may try again, given that it has reached `progress`.
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
