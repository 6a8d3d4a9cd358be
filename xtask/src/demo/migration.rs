// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The last part of the demonstration: migrates the running guest's memory twice, without hints and with.

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::destination::Destination;
use harness::guest::Guest;
use harness::migration::MigrationInfo;
use serde_json::json;

use super::{mib, use_memory};
use crate::progress::say;

/// The limit for the bytes sent with hints, in percent of those sent without.
const WIRE_AT_MOST: u64 = 60;

/// The outcome of one migration.
pub struct MigrationOutcome {
    status: MigrationInfo,
    /// The number of pages that differ at the destination.
    different: u64,
}

/// Migrates the guest's memory without hints, and then with.
pub fn with_and_without_hints(
    guest: &mut Guest,
    artifacts: &Artifacts,
    memory: u64,
) -> Result<[MigrationOutcome; 2]> {
    Ok([
        migrate(guest, artifacts, memory, false)?,
        migrate(guest, artifacts, memory, true)?,
    ])
}

fn migrate(
    guest: &mut Guest,
    artifacts: &Artifacts,
    memory: u64,
    hints: bool,
) -> Result<MigrationOutcome> {
    use_memory(guest)?;
    let before = guest.settled_memory_usage()?;
    let parameters = json!({ "free-page-hint": hints });
    guest.daemon()?.qmp().migrate_set_parameters(parameters)?;
    let mut destination = Destination::start(&artifacts.balloonctl, memory)?;
    let how = if hints { "with" } else { "without" };
    say(format_args!(
        "host: the guest, which runs and has {} free, is migrated {how} hints",
        mib(before.free)
    ));
    let status = guest.migrate_to(&mut destination)?;
    let different =
        guest.compare_memory(&destination)?.different.bytes() / status.ram.page_size.max(1);
    let tracking = status.tracking.clone().unwrap_or_default();
    ensure!(
        tracking.free_page_hint == hints,
        "hints were {}used: {}",
        if hints { "not " } else { "" },
        tracking.reason
    );
    ensure!(
        different <= status.ram.skipped,
        "{different} pages differ at the destination, and only {} were skipped",
        status.ram.skipped
    );
    guest.resume()?;
    guest.check_memory(before)?;
    guest
        .check_log()
        .context("the guest's kernel log after a migration")?;
    let rounds = status.rounds.len();
    say(format_args!(
        "host: {} over the wire in {rounds} iterations; the guest continues, with {} free again",
        mib(status.ram.transferred),
        mib(before.free)
    ));
    Ok(MigrationOutcome { status, different })
}

/// Prints both outcomes side by side.
pub fn print([without, with]: &[MigrationOutcome; 2]) {
    let pages = |pages: u64| format!("{pages} pages");
    let row = |name: &str, figure: &dyn Fn(&MigrationOutcome) -> String| {
        println!("  {name:<28} {:>16} {:>16}", figure(without), figure(with));
    };
    println!(
        "  {:<28} {:>16} {:>16}",
        "migration", "without hints", "with hints"
    );
    row("over the wire", &|it| mib(it.status.ram.transferred));
    row("sent", &|it| pages(it.status.ram.normal));
    row("sent as zeros", &|it| pages(it.status.ram.duplicate));
    row("sent again", &|it| pages(it.status.ram.resent));
    row("skipped, by hints", &|it| pages(it.status.ram.skipped));
    row("different, all of them free", &|it| pages(it.different));
    row("iterations", &|it| it.status.rounds.len().to_string());
    row("waited for hints", &|it| {
        let waited: u64 = it.status.rounds.iter().map(|it| it.hint_wait_us).sum();
        millis(Some(waited / 1000))
    });
    row("time", &|it| millis(Some(it.status.total_time)));
    row("downtime", &|it| millis(it.status.downtime));
    println!();
}

/// Fails if hints have saved less than they should.
pub fn check_thresholds([without, with]: &[MigrationOutcome; 2]) -> Result<()> {
    let (without, with) = (without.status.ram.transferred, with.status.ram.transferred);
    ensure!(
        with * 100 <= without * WIRE_AT_MOST,
        "with hints {with} bytes went over the wire, more than {WIRE_AT_MOST} % of the {without} without"
    );
    Ok(())
}

fn millis(millis: Option<u64>) -> String {
    format!("{} ms", millis.unwrap_or(0))
}
