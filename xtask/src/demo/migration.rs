// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The last part of the demonstration: the running guest's memory is moved twice, without hints and with.

use anyhow::{ensure, Context, Result};
use serde_json::json;
use tests::artifacts::Artifacts;
use tests::destination::Destination;
use tests::guest::Guest;
use tests::migration::Status;

use super::{mib, use_memory};
use crate::progress::say;

/// With hints at most this share of the bytes goes over the wire, in percent of what goes without.
const WIRE_AT_MOST: u64 = 60;

/// One way of moving the guest.
pub struct Moved {
    status: Status,
    /// Pages that are not the same at the destination.
    different: u64,
}

/// Moves the guest's memory without hints, and then with.
pub fn both_ways(guest: &mut Guest, artifacts: &Artifacts, memory: u64) -> Result<[Moved; 2]> {
    Ok([
        moved(guest, artifacts, memory, false)?,
        moved(guest, artifacts, memory, true)?,
    ])
}

fn moved(guest: &mut Guest, artifacts: &Artifacts, memory: u64, hints: bool) -> Result<Moved> {
    use_memory(guest)?;
    let before = guest.settled()?;
    let parameters = json!({ "free-page-hint": hints });
    guest.daemon()?.qmp().migrate_parameters(parameters)?;
    let mut destination = Destination::start(&artifacts.balloonctl, memory)?;
    let how = if hints { "with" } else { "without" };
    say(format_args!(
        "host: the guest, which runs and has {} free, is migrated {how} hints",
        mib(before.free)
    ));
    let status = guest.migrate_to(&mut destination)?;
    let different = guest.outcome(&destination)?.different.bytes() / status.ram.page_size.max(1);
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
        "host: {} over the wire in {rounds} rounds; the guest goes on, and has its {} free again",
        mib(status.ram.transferred),
        mib(before.free)
    ));
    Ok(Moved { status, different })
}

/// Prints both side by side.
pub fn print([without, with]: &[Moved; 2]) {
    let pages = |pages: u64| format!("{pages} pages");
    let row = |name: &str, figure: &dyn Fn(&Moved) -> String| {
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
    row("rounds", &|it| it.status.rounds.len().to_string());
    row("waited for hints", &|it| {
        let waited: u64 = it.status.rounds.iter().map(|it| it.hint_wait_us).sum();
        millis(Some(waited / 1000))
    });
    row("time", &|it| millis(Some(it.status.total_time)));
    row("downtime", &|it| millis(it.status.downtime));
    println!();
}

/// Whether hints have helped as they should.
pub fn judge([without, with]: &[Moved; 2]) -> Result<()> {
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
