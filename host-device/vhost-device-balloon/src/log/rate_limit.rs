// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The limit on log lines of one kind. A kind is a place in the source that logs.
//!
//! Lines of the levels error, warn and info are limited, because guests, front ends and QMP clients can cause most of
//! them. The levels debug and trace are for a developer, and have no limit.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::Level;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use crate::sync::lock;

/// The most lines of a kind in one [`INTERVAL`].
const BURST: u32 = 30;
const INTERVAL: Duration = Duration::from_secs(10);

/// The lines of one kind in the current interval.
#[derive(Debug)]
struct Kind {
    start: Instant,
    logged: u32,
    left_out: u64,
    /// The first line that was left out.
    example: String,
    level: Level,
}

/// Whether a line is written.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Decision {
    Write,
    /// The first line that is left out in its interval.
    LeaveOutFirst,
    LeaveOut,
}

/// Counts the log lines of each kind.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    kinds: Mutex<HashMap<Identifier, Kind>>,
}

impl RateLimit {
    /// Counts a line of a kind that is logged at `level`, and decides whether it is written. `line` returns its text.
    pub(super) fn decide(
        &self,
        kind: Identifier,
        level: Level,
        now: Instant,
        line: impl FnOnce() -> String,
    ) -> Decision {
        let mut kinds = lock(&self.kinds);
        let kind = kinds.entry(kind).or_insert_with(|| Kind {
            start: now,
            logged: 0,
            left_out: 0,
            example: String::new(),
            level,
        });
        // An interval with lines that were left out ends with its summary.
        if kind.left_out == 0 && now.saturating_duration_since(kind.start) >= INTERVAL {
            kind.start = now;
            kind.logged = 0;
        }
        if kind.logged < BURST {
            kind.logged += 1;
            return Decision::Write;
        }
        kind.left_out = kind.left_out.saturating_add(1);
        if kind.left_out > 1 {
            return Decision::LeaveOut;
        }
        kind.example = line();
        Decision::LeaveOutFirst
    }

    /// Returns the summaries that are due, or `all` of them, and the time until the next one is due.
    pub(super) fn summaries(&self, now: Instant, all: bool) -> (Vec<String>, Option<Duration>) {
        let mut lines = Vec::new();
        let mut next: Option<Duration> = None;
        for kind in lock(&self.kinds).values_mut() {
            if kind.left_out == 0 {
                continue;
            }
            let age = now.saturating_duration_since(kind.start);
            if all || age >= INTERVAL {
                lines.push(summary(kind, age));
                kind.start = now;
                kind.logged = 0;
                kind.left_out = 0;
            } else {
                let rest = INTERVAL.saturating_sub(age);
                next = Some(next.map_or(rest, |next| next.min(rest)));
            }
        }
        (lines, next)
    }
}

fn summary(kind: &Kind, age: Duration) -> String {
    let mut line = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut line));
    let _ = writeln!(
        line,
        " {:>5} {} more lines like this were left out in {} s: {}",
        kind.level,
        kind.left_out,
        age.as_secs(),
        kind.example
    );
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a kind.
    fn kind() -> Identifier {
        struct Place;
        impl tracing::Callsite for Place {
            fn set_interest(&self, _: tracing::subscriber::Interest) {}
            fn metadata(&self) -> &tracing::Metadata<'_> {
                unimplemented!("no test asks for it")
            }
        }
        static PLACE: Place = Place;
        Identifier(&PLACE)
    }

    #[test]
    fn a_flood_is_one_burst_and_one_summary_in_each_interval() {
        let limit = RateLimit::default();
        let start = Instant::now();
        for interval in 0..3 {
            let now = start + INTERVAL * interval;
            let mut written = 0;
            for _ in 0..1000 {
                match limit.decide(kind(), Level::WARN, now, || {
                    "a front end was refused".into()
                }) {
                    Decision::Write => written += 1,
                    Decision::LeaveOutFirst => assert_eq!(written, BURST),
                    Decision::LeaveOut => {}
                }
            }
            assert_eq!(written, BURST);
            let (lines, next) = limit.summaries(now, false);
            assert_eq!((lines.len(), next), (0, Some(INTERVAL)));
            let (lines, next) = limit.summaries(now + INTERVAL, false);
            assert_eq!((lines.len(), next), (1, None));
            let expected =
                " WARN 970 more lines like this were left out in 10 s: a front end was refused\n";
            assert!(lines[0].ends_with(expected), "{lines:?}");
        }
        // After a quiet time there is nothing to tell.
        let later = start + INTERVAL * 10;
        assert_eq!(limit.summaries(later, true), (Vec::new(), None));
        assert_eq!(
            limit.decide(kind(), Level::WARN, later, String::new),
            Decision::Write
        );
    }
}
