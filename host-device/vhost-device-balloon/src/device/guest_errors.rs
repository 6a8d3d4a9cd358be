// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's mistakes: counted all, logged at a bounded rate.

use std::time::{Duration, Instant};

use shared_abi::queue::Queue;
use tracing::warn;

use super::request::RequestError;

/// How many mistakes are logged in one [`RATELIMIT_INTERVAL`].
const RATELIMIT_BURST: u32 = 5;
const RATELIMIT_INTERVAL: Duration = Duration::from_secs(10);

/// The count of mistakes and the state of the log's limit.
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
    /// Counts `error`, and logs it unless there were too many of late.
    pub fn record(&mut self, queue: Queue, error: &RequestError) {
        self.total = self.total.saturating_add(1);
        if self.period.elapsed() >= RATELIMIT_INTERVAL {
            if self.suppressed > 0 {
                warn!(
                    "{} more errors of the guest were not logged",
                    self.suppressed
                );
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

    /// How many there were.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The last one that was logged.
    pub fn last(&self) -> Option<&str> {
        self.last.as_deref()
    }
}
