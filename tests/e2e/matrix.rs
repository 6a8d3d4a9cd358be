// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the matrix of machines. Its rows are in `tests/harness/src/matrix/table.rs`.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::matrix::{self, Verdict};

#[test]
fn each_machine_of_the_matrix_has_a_balloon_that_works_in_qemu() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let outcomes = matrix::run(&artifacts)?;
    let failed: Vec<String> = outcomes
        .iter()
        .filter_map(|outcome| match &outcome.verdict {
            Verdict::Failed(why) => Some(format!(
                "cargo xtask test --matrix '{}: {}': {why}",
                outcome.row,
                outcome.pair.name()
            )),
            _ => None,
        })
        .collect();
    ensure!(
        failed.is_empty(),
        "{} of {} cells failed:\n\n{}",
        failed.len(),
        outcomes.len(),
        failed.join("\n\n")
    );
    Ok(())
}
