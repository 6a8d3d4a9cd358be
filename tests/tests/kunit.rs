// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tests that run in the kernel: KUnit runs a module's suites when it is loaded.

use anyhow::{ensure, Result};
use tests::artifacts::Artifacts;
use tests::calls::KunitResults;
use tests::check::all_passed;
use tests::guest::{Builder, Device, Driver};
use tests::ktap::{self, Outcome};
use tests::vmm::Vmm;

/// The suites that must be among those that ran.
const SUITES: [&str; 2] = [
    "virtio_balloon_rs_virtqueue",
    "virtio_balloon_rs_shared_abi",
];

#[test]
fn every_kunit_case_of_the_module_passes() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .device(Device::None)
        .kernel_arguments("kunit.enable=1")
        .boot()?;
    let before = guest.call(KunitResults {})?;
    guest.load(Driver::Ours)?;
    let mut results = guest.call(KunitResults {})?;
    results.retain(|suite, _| !before.contains_key(suite));
    let mut all = Vec::new();
    for (suite, text) in &results {
        let cases = ktap::parse(suite, text);
        for case in &cases {
            println!("{:?} {}", case.outcome, case.name);
        }
        all.extend(cases);
    }
    all_passed(&all)?;
    for suite in SUITES {
        let passed = all
            .iter()
            .any(|case| case.name == suite && case.outcome == Outcome::Passed);
        ensure!(passed, "the suite {suite} did not run, or not as a whole");
    }
    guest.unload(Driver::Ours)?;
    guest.power_off()?;
    Ok(())
}
