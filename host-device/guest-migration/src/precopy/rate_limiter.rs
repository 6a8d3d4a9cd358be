// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bandwidth: its limit and its measurement.

use std::time::{Duration, Instant};

/// Limits a sender to a number of bytes per second.
#[derive(Debug)]
pub struct RateLimiter {
    bytes_per_second: u64,
    since: Instant,
    bytes: u64,
}

impl RateLimiter {
    /// Returns a limiter that starts now. A limit of 0 means no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            since: Instant::now(),
            bytes: 0,
        }
    }

    /// Counts `bytes` that were sent, and returns how long to wait before sending more.
    pub fn delay_after(&mut self, bytes: u64) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        self.bytes = self.bytes.saturating_add(bytes);
        transfer_time(self.bytes, self.bytes_per_second).saturating_sub(self.since.elapsed())
    }
}

/// Returns how long sending `bytes` takes at a rate, or [`Duration::MAX`] at a rate of 0.
pub fn transfer_time(bytes: u64, bytes_per_second: u64) -> Duration {
    if bytes == 0 {
        return Duration::ZERO;
    }
    let nanos = u128::from(bytes) * 1_000_000_000;
    match nanos.checked_div(u128::from(bytes_per_second)) {
        Some(nanos) => u64::try_from(nanos).map_or(Duration::MAX, Duration::from_nanos),
        None => Duration::MAX,
    }
}

/// Returns the rate in bytes per second, or `None` if no time has passed.
pub fn rate(bytes: u64, time: Duration) -> Option<u64> {
    let rate = (u128::from(bytes) * 1_000_000_000).checked_div(time.as_nanos())?;
    Some(u64::try_from(rate).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_and_rate_belong_together() {
        assert_eq!(transfer_time(500, 1000), Duration::from_millis(500));
        assert_eq!(transfer_time(0, 0), Duration::ZERO);
        assert_eq!(transfer_time(1, 0), Duration::MAX);
        assert_eq!(transfer_time(u64::MAX, 1), Duration::MAX);
        assert_eq!(rate(500, Duration::from_millis(500)), Some(1000));
        assert_eq!(rate(5, Duration::ZERO), None);
    }

    #[test]
    fn a_limit_makes_one_wait_and_none_does_not() {
        let mut rate_limiter = RateLimiter::new(1);
        let wait = rate_limiter.delay_after(10_000);
        // Time that has passed already counts.
        assert!(wait > Duration::from_secs(9_000) && wait <= Duration::from_secs(10_000));
        assert!(rate_limiter.delay_after(1000) > wait);
        assert_eq!(RateLimiter::new(0).delay_after(u64::MAX), Duration::ZERO);
    }
}
