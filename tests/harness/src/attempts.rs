// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a loop that tries for something has tried enough.

use std::time::Instant;

use crate::HANG_LIMIT;

/// A loop ends after so many turns without progress, but not before [`HANG_LIMIT`] has passed.
const TURNS: u32 = 100;

/// The turns of a loop since it last got further.
#[derive(Debug)]
pub struct Attempts {
    progress: u64,
    turns: u32,
    since: Instant,
}

impl Default for Attempts {
    fn default() -> Self {
        Self {
            progress: 0,
            turns: 0,
            since: Instant::now(),
        }
    }
}

impl Attempts {
    /// Counts a turn. Returns whether there may be another, where the loop has come to `progress`.
    pub fn may_go_on(&mut self, progress: u64) -> bool {
        if progress > self.progress {
            *self = Self {
                progress,
                ..Self::default()
            };
        }
        self.turns += 1;
        self.turns <= TURNS || self.since.elapsed() < HANG_LIMIT
    }
}
