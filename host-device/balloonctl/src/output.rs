// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Output for the user: results on standard output, progress on standard error.

use std::io::{stderr, stdout, IsTerminal, Write};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::CommandError;

/// Minimum interval between two lines of progress if standard error is not a terminal.
const EVERY: Duration = Duration::from_secs(1);
/// Width that is assumed of a terminal that does not report its width.
const WIDTH: usize = 80;

/// Writes results and progress.
#[derive(Debug)]
pub struct Output {
    json: bool,
    live: bool,
    shown: bool,
    last: Option<Instant>,
}

impl Output {
    /// Returns an output, which writes results as JSON if `json` is true.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self {
            json,
            live: stderr().is_terminal(),
            shown: false,
            last: None,
        }
    }

    /// Shows a line of progress. On a terminal it replaces the previous one. Elsewhere it is added at most once per
    /// second, and not if results are JSON.
    pub fn show_progress(&mut self, line: &str) {
        if self.live {
            let width = rustix::termios::tcgetwinsize(stderr())
                .map_or(WIDTH, |size| usize::from(size.ws_col).max(20));
            let line: String = line.chars().take(width - 1).collect();
            // A lost terminal is no reason to end a migration.
            let _ = write!(stderr(), "\r{line}\x1b[K");
            let _ = stderr().flush();
            self.shown = true;
        } else if !self.json && self.last.is_none_or(|last| last.elapsed() >= EVERY) {
            let _ = writeln!(stderr(), "{line}");
            self.last = Some(Instant::now());
        }
    }

    /// Writes a line that stays to standard error, unless results are JSON.
    pub fn say(&mut self, line: &str) {
        self.clear_progress();
        if !self.json {
            let _ = writeln!(stderr(), "{line}");
        }
    }

    /// Removes the line of progress from the terminal.
    pub fn clear_progress(&mut self) {
        if self.shown {
            let _ = write!(stderr(), "\r\x1b[K");
            let _ = stderr().flush();
            self.shown = false;
        }
        self.last = None;
    }

    /// Prints the result: `value` as JSON, or `text`.
    ///
    /// # Errors
    ///
    /// If the result cannot be encoded or written.
    pub fn print_result(&mut self, value: &impl Serialize, text: &str) -> Result<(), CommandError> {
        self.clear_progress();
        let text = if self.json {
            serde_json::to_string_pretty(value).map_err(|error| {
                CommandError::Failed(format!("result cannot be encoded: {error}"))
            })?
        } else {
            text.trim_end().to_owned()
        };
        if text.is_empty() {
            return Ok(());
        }
        writeln!(stdout(), "{text}")
            .map_err(|error| CommandError::Io("result cannot be written".into(), error))
    }
}

/// Writes a line to standard error. For the few messages that come from another thread or another process.
pub fn notice(line: &str) {
    let _ = writeln!(stderr(), "balloonctl: {line}");
}

/// Returns a table. The first column is aligned to the left, the others to the right.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        let line: Vec<String> = cells.collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Returns names and values, one pair per line.
#[must_use]
pub fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = fields
        .iter()
        .map(|(name, value)| format!("{name:<width$}  {value}\n"));
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect();
        let rows: Vec<Vec<String>> =
            vec![row(&["round", "sent"]), row(&["1", "100000"]), row(&["2"])];
        assert_eq!(table(&rows), "round    sent\n1      100000\n2\n");
        assert_eq!(
            fields(&[("a", "x".into()), ("long", "y".into())]),
            "a     x\nlong  y\n"
        );
    }
}
