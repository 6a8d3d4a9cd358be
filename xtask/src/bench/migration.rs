// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Our migration beside QEMU's own.

use anyhow::Result;
use tests::artifacts::Artifacts;
use tests::guest::Driver;
use tests::moves::{Cost, Guise, Moved, Mover, BANDWIDTH};
use tests::MIB;

use crate::progress::say;

/// The memory of the guests.
const MEMORY: u64 = 1024 * MIB;
/// Without hints an idle guest's memory costs at least so many times what it costs with them.
const SPARED: u64 = 5;

/// Prints what it costs to move a guest's memory, and whether that is as little as it should be.
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
    let guises = [Guise::Idle, Guise::Stressed];
    let hinted = |guise| (guise, true);
    let both = guises.map(|guise| [(guise, false), (guise, true)]).concat();
    let (mut plain, mut hints, mut qemu) = (u64::MAX, u64::MAX, u64::MAX);
    for (mover, driver, cases) in [
        (Mover::QemuOwn, Driver::C, both.clone()),
        (Mover::QemuOwn, Driver::Ours, guises.map(hinted).to_vec()),
        (Mover::Ours, Driver::Ours, both),
    ] {
        let mut guest = Moved::boot(artifacts, mover, driver, MEMORY)?;
        for (guise, with_hints) in cases {
            let cost = guest.cost(guise, with_hints)?;
            row(mover, driver, guise, with_hints, &cost);
            match (guise, mover, with_hints) {
                (Guise::Idle, Mover::QemuOwn, true) => qemu = qemu.min(cost.bytes),
                (Guise::Idle, Mover::Ours, true) => hints = cost.bytes,
                (Guise::Idle, Mover::Ours, false) => plain = cost.bytes,
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

fn row(mover: Mover, driver: Driver, guise: Guise, hints: bool, cost: &Cost) {
    println!(
        "  {:<10}{:<9}{:<8}{:<8}{:>10.1}{:>9}{:>9}{:>11}{:>8}  {}",
        match guise {
            Guise::Idle => "idle",
            Guise::Stressed => "stressed",
        },
        match mover {
            Mover::Ours => "us",
            Mover::QemuOwn => "QEMU",
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
        cost.rounds,
        cost.tracking
    );
}
