// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Our driver's work beside the C driver's, counted by our device in one run.

use anyhow::Result;
use clap::Args;
use tests::guest::Driver;
use tests::measure::{self, Suppression, Work};
use tests::MIB;

use crate::build::{self, Profile};
use crate::progress::say;
use crate::setup::{self, Kernel};

/// The options of `bench`.
#[derive(Args)]
pub struct Options {
    /// The guest's memory, in MiB.
    #[arg(long, default_value_t = 1280, value_parser = clap::value_parser!(u64).range(256..=16384))]
    memory: u64,
    /// How often each thing is measured; the table shows medians.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
}

/// What a guest keeps of its memory when the balloon is inflated, in MiB.
const SPARE: u64 = 128;

const WAYS: [(Suppression, &str); 3] = [
    (Suppression::EventIndex, "event index"),
    (Suppression::Flag, "no event index"),
    (Suppression::Never, "no suppression"),
];

/// Does what `bench` says.
pub fn command(options: &Options) -> Result<()> {
    let set_up = setup::ensure(&[Kernel::Uml])?;
    let artifacts = build::artifacts(&set_up, &[Kernel::Uml], Profile::Release)?;
    let (memory, rounds) = (options.memory, usize::try_from(options.rounds)?);
    let size = (memory - SPARE).min(1024);
    say(format_args!(
        "{memory} MiB of user-mode Linux, our device, one driver after the other; medians of {rounds}"
    ));
    let measure =
        |driver, way| measure::costs(&artifacts, driver, way, memory * MIB, size * MIB, rounds);
    println!();
    println!(
        "  {:<10}{:<16}{:<8}{:>8}{:>10}{:>9}{:>11}{:>8}{:>8}{:>12}",
        "",
        "device",
        "driver",
        "MiB",
        "requests",
        "notified",
        "interrupts",
        "config",
        "exits",
        "time"
    );
    for (way, name) in WAYS {
        let c = measure(Driver::C, way)?;
        let ours = measure(Driver::Ours, way)?;
        for (kind, c, ours) in [
            ("hint", c.hint, ours.hint),
            ("inflate", c.inflate, ours.inflate),
            ("deflate", c.deflate, ours.deflate),
        ] {
            row(kind, name, "C", &c);
            row("", "", "ours", &ours);
        }
    }
    println!();
    println!("  Counts are exact; times are of this machine, now.");
    Ok(())
}

fn row(kind: &str, way: &str, driver: &str, work: &Work) {
    let counts = work.counts;
    println!(
        "  {kind:<10}{way:<16}{driver:<8}{:>8}{:>10}{:>9}{:>11}{:>8}{:>8}{:>12}",
        work.bytes / MIB,
        counts.requests,
        counts.notifications,
        counts.interrupts,
        counts.config,
        counts.exits(),
        format!("{:.1?}", work.time),
    );
}
