// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the user sees: results on standard output, progress on standard error.

use std::io::{stderr, stdout, IsTerminal, Write};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::CommandError;

/// How often a line of progress is printed where lines stay.
const EVERY: Duration = Duration::from_secs(1);
/// The width that is assumed of a terminal that does not tell.
const WIDTH: usize = 80;

/// The two streams.
#[derive(Debug)]
pub struct Output {
    json: bool,
    live: bool,
    shown: bool,
    last: Option<Instant>,
}

impl Output {
    /// Results as JSON, if so wanted.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self {
            json,
            live: stderr().is_terminal(),
            shown: false,
            last: None,
        }
    }

    /// Shows how it goes. On a terminal the line replaces the one before; elsewhere, lines are added, one a second.
    pub fn show_progress(&mut self, line: &str) {
        if self.live {
            let width = rustix::termios::tcgetwinsize(stderr())
                .map_or(WIDTH, |size| usize::from(size.ws_col).max(20));
            let line: String = line.chars().take(width - 1).collect();
            // A terminal that is gone is no reason to end a migration.
            let _ = write!(stderr(), "\r{line}\x1b[K");
            let _ = stderr().flush();
            self.shown = true;
        } else if !self.json && self.last.is_none_or(|last| last.elapsed() >= EVERY) {
            let _ = writeln!(stderr(), "{line}");
            self.last = Some(Instant::now());
        }
    }

    /// Says something that stays, on standard error; nothing where results are JSON.
    pub fn say(&mut self, line: &str) {
        self.clear_progress();
        if !self.json {
            let _ = writeln!(stderr(), "{line}");
        }
    }

    /// Takes the live line away.
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
    /// If nobody takes it.
    pub fn print_result(&mut self, value: &impl Serialize, text: &str) -> Result<(), CommandError> {
        self.clear_progress();
        let text = if self.json {
            serde_json::to_string_pretty(value).map_err(|error| {
                CommandError::Failed(format!("cannot encode the result: {error}"))
            })?
        } else {
            text.trim_end().to_owned()
        };
        if text.is_empty() {
            return Ok(());
        }
        writeln!(stdout(), "{text}")
            .map_err(|error| CommandError::Io("cannot write the result".into(), error))
    }
}

/// A table, its columns as wide as they must be: the first to the left, the others to the right.
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

/// Names and values, one a line.
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
