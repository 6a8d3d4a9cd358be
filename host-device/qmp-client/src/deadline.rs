// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The end of a wait.

use std::time::{Duration, Instant};

/// The end of a wait. A timeout that no clock can represent, such as [`Duration::MAX`], means no end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// Returns the deadline `timeout` from now.
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(Instant::now().checked_add(timeout))
    }

    /// Returns the time that is left, zero once the deadline has passed.
    pub(crate) fn left(self) -> Duration {
        self.0.map_or(Duration::MAX, |end| {
            end.saturating_duration_since(Instant::now())
        })
    }
}
