// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The output of a process, collected line by line.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};

/// The lines that one or several readers collect. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Lines(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    collected: Mutex<Collected>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Collected {
    lines: Vec<String>,
    readers: usize,
}

impl Lines {
    /// Collects the lines of `source` in the background until the end of `source`.
    pub fn collect(&self, source: impl Read + Send + 'static) {
        self.lock().readers += 1;
        let lines = self.clone();
        thread::spawn(move || {
            let mut source = BufReader::new(source);
            let mut line = Vec::new();
            while matches!(source.read_until(b'\n', &mut line), Ok(length) if length > 0) {
                lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
            lines.lock().readers -= 1;
            lines.0.changed.notify_all();
        });
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0
            .collected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: String) {
        self.lock().lines.push(line);
        self.0.changed.notify_all();
    }

    /// Returns all lines so far, as text.
    #[must_use]
    pub fn text(&self) -> String {
        self.lock().lines.join("\n")
    }

    /// Waits until all readers have reached the end of their streams, or until `timeout`.
    pub fn wait_end(&self, timeout: Duration) {
        let reads = |collected: &mut Collected| collected.readers > 0;
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.lock(), timeout, reads);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for a line that satisfies `wanted`, and returns the first such line. Includes earlier lines.
    ///
    /// # Errors
    ///
    /// Fails if the output ends, or `timeout` passes, before such a line.
    pub fn wait_for(
        &self,
        what: &str,
        wanted: impl Fn(&str) -> bool,
        timeout: Duration,
    ) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let mut collected = self.lock();
        let mut seen = 0;
        loop {
            let fresh = collected.lines.get(seen..).unwrap_or_default();
            if let Some(line) = fresh.iter().find(|line| wanted(line)) {
                return Ok(line.clone());
            }
            seen = collected.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if collected.readers == 0 {
                bail!("the output ended without {what}");
            }
            if left.is_zero() {
                bail!("the output had no {what} within {timeout:?}");
            }
            let waited = self.0.changed.wait_timeout(collected, left);
            (collected, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HANG_TIMEOUT;

    #[test]
    fn a_line_is_found_whether_it_came_before_or_comes_later() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let lines = Lines::default();
        lines.collect(reader);
        std::io::Write::write_all(&mut writer, b"one\ntwo").unwrap();
        assert_eq!(
            lines
                .wait_for("one", |line| line == "one", HANG_TIMEOUT)
                .unwrap(),
            "one"
        );
        drop(writer);
        lines.wait_end(HANG_TIMEOUT);
        assert_eq!(lines.text(), "one\ntwo");
        assert_eq!(
            lines
                .wait_for("two", |line| line == "two", HANG_TIMEOUT)
                .unwrap(),
            "two"
        );
        let error = lines
            .wait_for("a third line", |line| line == "three", HANG_TIMEOUT)
            .unwrap_err();
        assert_eq!(error.to_string(), "the output ended without a third line");
    }
}
