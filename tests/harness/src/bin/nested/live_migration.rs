// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Live migration of a busy user-mode Linux guest, with soft-dirty tracking.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::destination::Destination;
use harness::guest::{Builder, Driver, Guest};
use harness::stress::{Stress, StressLoad};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};
use serde_json::json;

const MEMORY: u64 = 72 * MIB;
const LOAD: u64 = 8 * MIB;

/// Migrates a guest with the C driver if `driver` is `c`, and with our driver otherwise.
pub fn check(driver: &str) -> Result<()> {
    let driver = match driver {
        "c" => Driver::C,
        _ => Driver::Ours,
    };
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, Vmm::Uml).memory(MEMORY);
    let (mut guest, before) = builder.boot_filled(16 * MIB, driver)?;
    let stress = Stress::start(&mut guest, StressLoad::new(LOAD).with_rests(), 15)?;
    stress.wait_compared(&mut guest, 1, HANG_TIMEOUT)?;
    let parameters = json!({
        "dirty-tracking": "soft-dirty", "verify": true, "downtime-limit": 20, "max-rounds": 4,
        "free-page-hint-wait": HANG_TIMEOUT_MS,
    });
    guest.daemon()?.qmp().migrate_set_parameters(parameters)?;
    // With our driver, the guest continues with the destination's memory. With the C driver, the guest's kernel reports
    // whether the differing pages are free.
    migrate_once(&mut guest, &artifacts, driver == Driver::Ours)?;
    stress.wait_compared(&mut guest, 1, HANG_TIMEOUT)?;
    println!("{:?}", stress.end_and_verify(&mut guest)?);
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

fn migrate_once(guest: &mut Guest, artifacts: &Artifacts, adopt: bool) -> Result<()> {
    let mut destination = Destination::start(&artifacts.balloonctl, guest.memory())?;
    let status = guest.migrate_to(&mut destination)?;
    ensure!(guest.is_paused()?, "the source is not paused");
    let comparison = guest.compare_memory(&destination)?;
    let tracking = status.tracking.clone().unwrap_or_default();
    let ram = status.ram;
    let differ = comparison.different.bytes() / 4096;
    println!(
        "{} ({}): {} iterations, {} ms, {} paused; {} pages have data; {} sent, {} of them again, {} as zeros, {} hinted, \
         {} skipped; {} missed; {differ} differ",
        tracking.mode,
        tracking.reason,
        status.rounds.len(),
        status.total_time,
        status.downtime.unwrap_or_default(),
        comparison.data_pages,
        ram.normal,
        ram.resent,
        ram.duplicate,
        ram.hinted,
        ram.skipped,
        ram.missed,
    );
    ensure!(
        tracking.mode == "soft-dirty" && tracking.free_page_hint,
        "{tracking:?}"
    );
    ensure!(ram.missed == 0, "writes were missed: {status:#?}");
    ensure!(ram.hinted > 0, "no page was hinted: {ram:?}");
    ensure!(
        differ <= ram.skipped,
        "{differ} pages differ, and only {} were left out",
        ram.skipped
    );
    if adopt {
        guest.adopt(&comparison, &destination)?;
    }
    guest.resume()?;
    if !adopt {
        guest.check_different_pages_are_free(&comparison)?;
    }
    Ok(())
}
