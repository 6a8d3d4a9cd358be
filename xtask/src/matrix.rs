// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the matrix of machines: sets up the kernels that its cells need, and writes its results into the documentation.

use std::fs;
use std::path::Path;

use ::harness::artifacts::{self, Artifacts, Kernel as GuestKernel};
use ::harness::matrix::{self, table, CellResult, Pair, Verdict};
use ::harness::vmm::Vmm;
use anyhow::{bail, ensure, Context, Result};

use crate::build::{self, Profile};
use crate::module;
use crate::paths;
use crate::progress::say;
use crate::run;
use crate::setup::kernel_series::{self, KernelSeries};
use crate::setup::{self, Kernel};

/// The test that runs the cells.
const TEST: &str = "each_machine_of_the_matrix_has_a_balloon_that_works_in_qemu";
/// The document with the table.
const DOCUMENT: &str = "docs/testing.md";
const BEGIN: &str = "<!-- matrix: made by `cargo xtask test --matrix all` -->";
/// The longest reason in the table, in characters.
const LONGEST: usize = 200;
const END: &str = "<!-- end of matrix -->";

/// Runs the cells whose names contain `which`, or all cells for [`matrix::ALL`]. With all cells, writes the table into
/// the document.
pub fn command(which: &str) -> Result<()> {
    let cells = matrix::cells(Some(which))?;
    let mut kernels = vec![Kernel::Stock];
    if cells.iter().any(|cell| cell.row.vmm == Vmm::Uml) {
        kernels.push(Kernel::Uml);
    }
    let build_env = setup::ensure(&kernels)?;
    let mut artifacts = build::artifacts(&build_env, &kernels, Profile::Dev)?;
    prepare(&mut artifacts, Some(which))?;
    let paths = build::write_artifacts(&artifacts)?;
    let results = build::target_folder()?.join(format!("matrix-{}.json", std::process::id()));
    say(format_args!("the matrix of machines: {which}"));
    let mut test = build::cargo()?;
    test.args(["test", "--package", "e2e", "--features", "guests"]);
    test.args(["--test", "guests", "--", "--exact", "--nocapture"]);
    test.arg(format!("matrix::{TEST}"));
    test.env(artifacts::VARIABLE, &paths)
        .env(matrix::CELLS_VARIABLE, which)
        .env(matrix::RESULTS_VARIABLE, &results)
        .env("RUST_LIB_BACKTRACE", "0");
    let outcome = run::inherit_output(&mut test);
    if which == matrix::ALL {
        document(&results)?;
        say(format_args!("the table is in {DOCUMENT}"));
    }
    // The file is missing if no cell has run.
    let _ = fs::remove_file(&results);
    outcome
}

/// Adds the artifacts that the cells selected by `which` need: modules of the stock kernel, and kernels of other
/// series.
pub fn prepare(artifacts: &mut Artifacts, which: Option<&str>) -> Result<()> {
    let cells = matrix::cells(which)?;
    if let Some(stock) = &mut artifacts.stock {
        stock.modules = modules_in(&kernel_series::stock_modules()?)?;
    }
    for series in KernelSeries::ALL {
        let wanted = |cell: &matrix::Cell| cell.row.series == Some(series.name());
        if !cells.iter().any(wanted) {
            continue;
        }
        let kernel = kernel_series::ensure(series)?;
        let our_driver = match &kernel.build {
            Some(build_env) => {
                let name = format!("stock-{}", series.name().replace('.', "-"));
                say(format_args!("building the module for the {name} kernel"));
                match module::make_named(build_env, Kernel::Stock, &name, false) {
                    Ok(path) => Some(path),
                    // The cells with this kernel fail. Other cells need not.
                    Err(error) => {
                        say(format_args!("{error:#}"));
                        None
                    }
                }
            }
            None => None,
        };
        let c_driver = kernel.modules.join("virtio_balloon.ko");
        let modules = modules_in(&kernel.modules)?;
        let more = |path: &std::path::PathBuf| *path != c_driver && !kernel.early.contains(path);
        artifacts.series_kernels.insert(
            series.name().to_owned(),
            GuestKernel {
                image: kernel.image,
                unpacked: None,
                modules: modules.into_iter().filter(|path| more(path)).collect(),
                c_driver,
                our_driver,
                sample_driver: None,
                early: kernel.early,
            },
        );
    }
    Ok(())
}

fn modules_in(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "ko") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes the table of results between its marks in the document.
fn document(results: &Path) -> Result<()> {
    let text = fs::read_to_string(results)
        .with_context(|| format!("cannot read {}", results.display()))?;
    let outcomes: Vec<CellResult> =
        serde_json::from_str(&text).context("the results are not what they should be")?;
    let path = paths::repository()?.join(DOCUMENT);
    let document =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    write(&path, &replaced(&document, &table_of(&outcomes))?)
}

/// Returns the document with `text` between the marks.
fn replaced(document: &str, text: &str) -> Result<String> {
    let Some((before, rest)) = document.split_once(BEGIN) else {
        bail!("{DOCUMENT} has no line {BEGIN:?}");
    };
    let Some((_, after)) = rest.split_once(END) else {
        bail!("{DOCUMENT} has no line {END:?}");
    };
    ensure!(!after.contains(BEGIN), "{DOCUMENT} has two tables");
    Ok(format!("{before}{BEGIN}\n\n{text}\n{END}{after}"))
}

/// Returns the table: a line for each row of the matrix, and then the reasons of cells that did not run or failed.
fn table_of(outcomes: &[CellResult]) -> String {
    let mut notes: Vec<String> = Vec::new();
    let mut lines = vec![
        format!("| machine | {} |", Pair::ALL.map(Pair::name).join(" | ")),
        "|---|---|---|---|---|".to_owned(),
    ];
    let usual: Vec<String> = matrix::cells(None)
        .map(|cells| cells.iter().map(matrix::Cell::name).collect())
        .unwrap_or_default();
    for row in table::rows() {
        let mut cells = vec![row.name.to_owned()];
        for pair in Pair::ALL {
            let of = |outcome: &&CellResult| outcome.row == row.name && outcome.pair == pair;
            let name = format!("{}: {}", row.name, pair.name());
            let star = if usual.contains(&name) { "*" } else { "" };
            let mut note = |what: &str, why: &str| {
                let why: String = why
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .chars()
                    .take(LONGEST)
                    .collect();
                let why = format!("{what}: {why}");
                let number = notes.iter().position(|note| *note == why);
                let number = number.unwrap_or_else(|| {
                    notes.push(why);
                    notes.len() - 1
                });
                format!("{what} ({})", number + 1)
            };
            let text = match outcomes.iter().find(of).map(|outcome| &outcome.verdict) {
                None => String::new(),
                Some(Verdict::Passed) => format!("passed{star}"),
                Some(Verdict::NotRun(why)) => note("not run", why),
                Some(Verdict::Failed(why)) => note("FAILED", why),
            };
            cells.push(text);
        }
        lines.push(format!("| {} |", cells.join(" | ")));
    }
    lines.push(String::new());
    lines.push(format!(
        "{} of {} cells that were run passed; those with a star are part of `make test`.",
        count(outcomes, |verdict| *verdict == Verdict::Passed),
        count(outcomes, |verdict| !matches!(verdict, Verdict::NotRun(_))),
    ));
    lines.push(String::new());
    let numbered = notes.iter().zip(1..);
    lines.extend(numbered.map(|(note, number)| format!("{number}. {note}.")));
    lines.push(String::new());
    lines.join("\n")
}

fn count(outcomes: &[CellResult], wanted: impl Fn(&Verdict) -> bool) -> usize {
    outcomes
        .iter()
        .filter(|outcome| wanted(&outcome.verdict))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let document = format!("one\n{BEGIN}\nold\n{END}\ntwo\n");
        let new = replaced(&document, "new").unwrap();
        assert_eq!(new, format!("one\n{BEGIN}\n\nnew\n{END}\ntwo\n"));
        assert!(replaced("one", "new").is_err());
    }

    #[test]
    fn a_cell_that_was_not_run_says_why_once() {
        let outcome = |pair, verdict| CellResult {
            row: "`packed=on`".to_owned(),
            pair,
            verdict,
            seconds: 1,
        };
        let why = || Verdict::NotRun("there is none".to_owned());
        let table = table_of(&[
            outcome(Pair::Ours, why()),
            outcome(Pair::C, why()),
            outcome(Pair::OursInQemu, Verdict::Passed),
            outcome(Pair::CInQemu, Verdict::Failed("it is not\nso".to_owned())),
        ]);
        let row = "| `packed=on` | not run (1) | not run (1) | passed | FAILED (2) |";
        assert!(table.contains(row), "{table}");
        let notes = "1. not run: there is none.\n2. FAILED: it is not.\n";
        assert!(table.contains(notes), "{table}");
        assert!(table.contains("1 of 2 cells"), "{table}");
    }
}
