// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of the guest: all of them are counted, and their log messages are rate-limited.

use std::time::{Duration, Instant};

use shared_abi::queue::Queue;
use tracing::warn;

use super::request::RequestError;

/// The number of errors that are logged in one [`RATELIMIT_INTERVAL`].
const RATELIMIT_BURST: u32 = 5;
const RATELIMIT_INTERVAL: Duration = Duration::from_secs(10);

/// Counts the errors of the guest, and limits the rate of their log messages.
#[derive(Debug)]
pub struct GuestErrors {
    total: u64,
    last: Option<String>,
    period: Instant,
    logged: u32,
    suppressed: u64,
}

impl Default for GuestErrors {
    fn default() -> Self {
        Self {
            total: 0,
            last: None,
            period: Instant::now(),
            logged: 0,
            suppressed: 0,
        }
    }
}

impl GuestErrors {
    /// Counts `error`, and logs it unless this interval's limit is reached.
    pub fn record(&mut self, queue: Queue, error: &RequestError) {
        self.total = self.total.saturating_add(1);
        if self.period.elapsed() >= RATELIMIT_INTERVAL {
            if self.suppressed > 0 {
                warn!("{} more guest errors were not logged", self.suppressed);
            }
            self.period = Instant::now();
            self.logged = 0;
            self.suppressed = 0;
        }
        if self.logged < RATELIMIT_BURST {
            self.logged += 1;
            let line = format!("{} queue: {error}", queue.name());
            warn!("{line}");
            self.last = Some(line);
        } else {
            self.suppressed = self.suppressed.saturating_add(1);
        }
    }

    /// Returns the number of errors.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Returns the last error that was logged.
    pub fn last(&self) -> Option<&str> {
        self.last.as_deref()
    }
}
