// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares our migration with QEMU's own.

use anyhow::Result;
use harness::artifacts::Artifacts;
use harness::guest::Driver;
use harness::migration_cost::{
    GuestWorkload, MigrationBench, MigrationCost, MigrationEngine, BANDWIDTH,
};
use harness::MIB;

use crate::progress::say;

/// The memory of the guests, in bytes.
const MEMORY: u64 = 1024 * MIB;
/// Without hints the migration of an idle guest sends at least this many times the bytes that it sends with hints.
const SPARED: u64 = 5;

/// Prints the costs of migrating a guest's memory, and whether they are within the limits.
pub fn table(artifacts: &Artifacts) -> Result<()> {
    say(format_args!(
        "{} MiB of QEMU, emulated, moved at up to {} MiB/s; nine tenths of what is free were filled and freed before",
        MEMORY / MIB,
        BANDWIDTH / MIB
    ));
    println!();
    println!(
        "  {:<10}{:<9}{:<8}{:<8}{:>10}{:>9}{:>9}{:>11}{:>8}  tracking",
        "guest", "moved by", "driver", "hints", "MiB sent", "skipped", "time", "downtime", "rounds"
    );
    let workloads = [GuestWorkload::Idle, GuestWorkload::Stressed];
    let hinted = |workload| (workload, true);
    let both = workloads
        .map(|workload| [(workload, false), (workload, true)])
        .concat();
    let (mut plain, mut hints, mut qemu) = (u64::MAX, u64::MAX, u64::MAX);
    for (engine, driver, cases) in [
        (MigrationEngine::QemuOwn, Driver::C, both.clone()),
        (
            MigrationEngine::QemuOwn,
            Driver::Ours,
            workloads.map(hinted).to_vec(),
        ),
        (MigrationEngine::Ours, Driver::Ours, both),
    ] {
        let mut guest = MigrationBench::boot(artifacts, engine, driver, MEMORY)?;
        for (workload, with_hints) in cases {
            let cost = guest.measure(workload, with_hints)?;
            row(engine, driver, workload, with_hints, &cost);
            match (workload, engine, with_hints) {
                (GuestWorkload::Idle, MigrationEngine::QemuOwn, true) => {
                    qemu = qemu.min(cost.bytes)
                }
                (GuestWorkload::Idle, MigrationEngine::Ours, true) => hints = cost.bytes,
                (GuestWorkload::Idle, MigrationEngine::Ours, false) => plain = cost.bytes,
                _ => {}
            }
        }
        guest.power_off()?;
    }
    println!();
    say_whether(
        "idle: ours with hints sends no more than QEMU with hints, whichever driver it has",
        hints <= qemu,
    );
    say_whether(
        "idle: ours with hints sends at most a fifth of ours without",
        hints.saturating_mul(SPARED) <= plain,
    );
    Ok(())
}

fn say_whether(what: &str, holds: bool) {
    println!("  {what}: {}", if holds { "yes" } else { "NO" });
}

fn row(
    engine: MigrationEngine,
    driver: Driver,
    workload: GuestWorkload,
    hints: bool,
    cost: &MigrationCost,
) {
    println!(
        "  {:<10}{:<9}{:<8}{:<8}{:>10.1}{:>9}{:>9}{:>11}{:>8}  {}",
        match workload {
            GuestWorkload::Idle => "idle",
            GuestWorkload::Stressed => "stressed",
        },
        match engine {
            MigrationEngine::Ours => "us",
            MigrationEngine::QemuOwn => "QEMU",
        },
        match driver {
            Driver::Ours => "ours",
            Driver::C => "C",
        },
        if hints { "yes" } else { "no" },
        cost.bytes as f64 / MIB as f64,
        cost.skipped,
        format!("{:.1?}", cost.time),
        format!("{} ms", cost.downtime.as_millis()),
        cost.dirty_syncs,
        cost.tracking
    );
}
