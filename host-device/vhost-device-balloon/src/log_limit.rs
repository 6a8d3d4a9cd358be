// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Limits the rate of log lines that a guest, a front end or a QMP client can cause.
//!
//! Each kind of line has a [`LogLimit`] of its own. A line is logged with the permit in its text:
//!
//! ```text
//! if let Some(permit) = self.limit.permit() {
//!     info!("QMP client {number} connected{permit}");
//! }
//! ```
//!
//! The permit is empty, or tells how many lines were left out since the last one.

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Lines of one kind in one [`INTERVAL`].
const BURST: u32 = 10;

const INTERVAL: Duration = Duration::from_secs(10);

/// Limits the rate of one kind of log line: to 10 lines in 10 seconds.
#[derive(Debug, Default)]
pub struct LogLimit {
    period: Mutex<Period>,
}

#[derive(Debug, Default)]
struct Period {
    /// Start of the interval; `None` before the first line.
    start: Option<Instant>,
    logged: u32,
    suppressed: u64,
}

/// The permission to log one line. Its text ends that line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use = "without a line, the count of suppressed lines is lost"]
pub struct LogPermit {
    /// Lines that were left out since the last one.
    pub suppressed: u64,
}

impl LogLimit {
    /// Returns the permission to log a line now, or counts a suppressed line.
    pub fn permit(&self) -> Option<LogPermit> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&self, now: Instant) -> Option<LogPermit> {
        let mut period = lock(&self.period);
        let over = period
            .start
            .is_none_or(|start| now.saturating_duration_since(start) >= INTERVAL);
        if over {
            period.start = Some(now);
            period.logged = 0;
        }
        if period.logged >= BURST {
            period.suppressed = period.suppressed.saturating_add(1);
            return None;
        }
        period.logged += 1;
        Some(LogPermit {
            suppressed: std::mem::take(&mut period.suppressed),
        })
    }
}

impl fmt::Display for LogPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.suppressed {
            0 => Ok(()),
            count => write!(f, " ({count} such messages before it were not logged)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_is_cut_and_counted() {
        let limit = LogLimit::default();
        let start = Instant::now();
        let logged = (0..1000)
            .filter(|_| limit.permit_at(start).is_some())
            .count();
        assert_eq!(logged, BURST as usize);
        let permit = limit.permit_at(start + INTERVAL).unwrap();
        assert_eq!(permit.suppressed, 1000 - u64::from(BURST));
        assert!(permit.to_string().contains("990"), "{permit}");
        assert_eq!(limit.permit_at(start + INTERVAL).unwrap().to_string(), "");
    }
}
