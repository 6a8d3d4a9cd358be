// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the module's KUnit suites. KUnit runs the suites of a module when the module is loaded.

use std::env;

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{KunitResults, WriteFile};
use harness::check::all_passed;
use harness::guest::{Builder, Device, Driver, Guest, DEFAULT_HOST_TIMEOUT};
use harness::ktap::{self, Case, TestStatus, CASES_VARIABLE};
use harness::vmm::Vmm;

/// Suites that must have run and passed when all cases are selected.
const SUITES: [&str; 2] = [
    "virtio_balloon_rs_virtqueue",
    "virtio_balloon_rs_shared_abi",
];
/// The glob of all cases of all suites.
const ALL: &str = "*.*";

#[test]
fn every_kunit_case_of_the_module_passes() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .device(Device::None)
        .kernel_arguments("kunit.enable=1")
        .boot()?;
    let globs = env::var(CASES_VARIABLE).unwrap_or_else(|_| ALL.to_owned());
    let mut all = Vec::new();
    for glob in globs.split_whitespace() {
        let cases = run(&mut guest, glob)?;
        ensure!(!cases.is_empty(), "no case is called {glob}");
        let failed = cases.iter().any(|case| case.status == TestStatus::Failed);
        all.extend(cases);
        if failed {
            break;
        }
    }
    for case in &all {
        // The line of a suite only repeats the results of its cases, unless none of them has the same status.
        let whole = |other: &Case| {
            other.name.starts_with(&format!("{}.", case.name)) && other.status == case.status
        };
        if case.name.contains('.') || !all.iter().any(whole) {
            println!("{}", case.line());
        }
    }
    all_passed(&all)?;
    for suite in SUITES.into_iter().filter(|_| globs == ALL) {
        let passed = all
            .iter()
            .any(|case| case.name == suite && case.status == TestStatus::Passed);
        ensure!(passed, "the suite {suite} did not run, or not as a whole");
    }
    guest.power_off()?;
    Ok(())
}

/// Loads the module, which runs the cases that match `glob`. Unloads it unless a case failed. Returns the cases.
fn run(guest: &mut Guest, glob: &str) -> Result<Vec<Case>> {
    guest.call(WriteFile {
        path: "/sys/module/kunit/parameters/filter_glob".to_owned(),
        text: glob.to_owned(),
    })?;
    let before = guest.call(KunitResults {})?;
    guest
        .load_with(Driver::Ours, DEFAULT_HOST_TIMEOUT)
        .with_context(|| format!("with the cases {glob}"))?;
    let mut results = guest.call(KunitResults {})?;
    results.retain(|suite, _| !before.contains_key(suite));
    let cases: Vec<Case> = results
        .iter()
        .flat_map(|(suite, text)| ktap::parse(suite, text))
        .collect();
    // A failed case may leave references to the module, which then cannot be unloaded.
    if !cases.iter().any(|case| case.status == TestStatus::Failed) {
        guest.unload(Driver::Ours)?;
    }
    Ok(cases)
}
