// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks that all tests named in `docs/conformance.md` exist.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{ensure, Context, Result};

use crate::paths;
use crate::sources;

/// Prints how many rows the document has and how many tests it names.
///
/// # Errors
///
/// Fails if the document names a test that does not exist.
pub fn check() -> Result<()> {
    let repository = paths::repository()?;
    let path = repository.join("docs/conformance.md");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let sources = sources::read_all(&repository)?;
    let functions: BTreeSet<&str> = sources
        .iter()
        .flat_map(|source| functions(&source.text))
        .collect();
    let evidence: Vec<&str> = text.lines().filter_map(last_cell).collect();
    let named: BTreeSet<&str> = evidence.iter().flat_map(|cell| tests(cell)).collect();
    let missing: Vec<&str> = named
        .iter()
        .copied()
        .filter(|name| !exists(name, &functions))
        .collect();
    println!("{:>5}  rows, {} tests named", evidence.len(), named.len());
    ensure!(
        missing.is_empty(),
        "{} names tests that do not exist: {}",
        path.display(),
        missing.join(", ")
    );
    Ok(())
}

/// Returns the names of the functions that a source file defines.
pub fn functions(text: &str) -> impl Iterator<Item = &str> {
    let definitions = text.lines().filter_map(|line| {
        let (before, after) = line.split_once("fn ")?;
        (before.is_empty() || before.ends_with(' ')).then_some(after)
    });
    definitions.filter_map(|after| after.split(['(', '<']).next())
}

/// Returns the last cell of a table row; `None` for a heading or any other line.
fn last_cell(line: &str) -> Option<&str> {
    let row = line.strip_prefix('|')?.trim_end().strip_suffix('|')?;
    let (_, last) = row.rsplit_once('|')?;
    let last = last.trim();
    (!last.starts_with("---") && last != "shown by").then_some(last)
}

/// Returns the test names in a cell: code of lower-case letters, digits and at least one underscore, perhaps with a
/// star at the end.
fn tests(cell: &str) -> impl Iterator<Item = &str> {
    let code = cell.split('`').skip(1).step_by(2);
    code.filter(|word| {
        let name = word.trim_end_matches('*');
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        name.contains('_') && name.bytes().all(plain)
    })
}

fn exists(name: &str, functions: &BTreeSet<&str>) -> bool {
    match name.strip_suffix('*') {
        Some(start) => functions
            .range(start..)
            .next()
            .is_some_and(|found| found.starts_with(start)),
        None => functions.contains(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_the_last_column_only() {
        let row =
            "| MUST use `poison_val` | `r1_it_sleeps`, `r2_*`, by `HintedBlock`, `a/b_c.rs` |";
        let cell = last_cell(row).unwrap_or_default();
        assert_eq!(tests(cell).collect::<Vec<_>>(), ["r1_it_sleeps", "r2_*"]);
        assert_eq!(last_cell("|---|---|"), None);
    }

    #[test]
    fn a_star_stands_for_any_end() {
        let text = "    fn r2_one() {\n    pub(crate) fn other<T>(x: T) {}\n";
        let functions: BTreeSet<&str> = functions(text).collect();
        assert!(exists("r2_*", &functions) && exists("other", &functions));
        assert!(!exists("r2_", &functions) && !exists("r3_*", &functions));
    }
}
