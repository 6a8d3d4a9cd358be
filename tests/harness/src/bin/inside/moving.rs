// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest of user-mode Linux is moved while it works, its writes tracked by soft-dirty bits.

use anyhow::{ensure, Result};
use serde_json::json;
use tests::artifacts::Artifacts;
use tests::destination::Destination;
use tests::guest::{Builder, Driver, Guest};
use tests::stress::{Load, Stress};
use tests::vmm::Vmm;
use tests::{HANG_LIMIT, HANG_LIMIT_MS, MIB};

const MEMORY: u64 = 72 * MIB;
const LOAD: u64 = 8 * MIB;

/// Moves one with our driver, or with the kernel's own.
pub fn check(driver: &str) -> Result<()> {
    let driver = match driver {
        "c" => Driver::C,
        _ => Driver::Ours,
    };
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, Vmm::Uml).memory(MEMORY);
    let (mut guest, before) = builder.boot_used(16 * MIB, driver)?;
    let stress = Stress::start(&mut guest, Load::of(LOAD), 15)?;
    stress.wait_compared(&mut guest, 1, HANG_LIMIT)?;
    let parameters = json!({
        "dirty-tracking": "soft-dirty", "verify": true, "downtime-limit": 20, "max-rounds": 4,
        "free-page-hint-wait": HANG_LIMIT_MS,
    });
    guest.daemon()?.qmp().migrate_parameters(parameters)?;
    // With the one it goes on with what the destination got, with the other its kernel is asked.
    is_moved(&mut guest, &artifacts, driver == Driver::Ours)?;
    stress.wait_compared(&mut guest, 1, HANG_LIMIT)?;
    println!("{:?}", stress.end_whole(&mut guest)?);
    guest.unload(driver)?;
    guest.farewell(before)
}

fn is_moved(guest: &mut Guest, artifacts: &Artifacts, adopt: bool) -> Result<()> {
    let mut destination = Destination::start(&artifacts.balloonctl, guest.memory())?;
    let status = guest.migrate_to(&mut destination)?;
    ensure!(guest.is_paused()?, "the source is not paused");
    let outcome = guest.outcome(&destination)?;
    let tracking = status.tracking.clone().unwrap_or_default();
    let ram = status.ram;
    let differ = outcome.different.bytes() / 4096;
    println!(
        "{} ({}): {} rounds, {} ms, {} paused; {} pages have data; {} sent, {} of them again, {} as zeros, {} hinted, \
         {} skipped; {} missed; {differ} differ",
        tracking.mode,
        tracking.reason,
        status.rounds.len(),
        status.total_time,
        status.downtime.unwrap_or_default(),
        outcome.data,
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
        guest.adopt(&outcome, &destination)?;
    }
    guest.resume()?;
    if !adopt {
        guest.check_different_are_free(&outcome)?;
    }
    Ok(())
}
