// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks: our driver against the C driver, counted by our device; our migration against QEMU's own; and the
//! benchmarks of the guest-migration crate.

mod migration;

use anyhow::{ensure, Result};
use clap::{Args, ValueEnum};
use harness::artifacts::Artifacts;
use harness::calls::{ReadFile, Run};
use harness::driver_cost::{self, NotificationSuppression, WorkCost};
use harness::guest::{Builder, Driver, Guest};
use harness::vmm::Vmm;
use harness::MIB;

use crate::build::{self, Profile};
use crate::progress::say;
use crate::run;
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
    /// Only this.
    #[arg(long)]
    only: Option<Part>,
}

/// A part of the benchmark.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What the driver's work costs.
    Driver,
    /// What it costs to move a guest's memory.
    Migration,
    /// The speed of the dirty bitmap and of the stream.
    Crates,
}

/// Memory that the guest keeps when the balloon is inflated, in MiB.
const SPARE: u64 = 128;

const WAYS: [(NotificationSuppression, &str); 3] = [
    (NotificationSuppression::EventIdx, "event index"),
    (NotificationSuppression::Flag, "no event index"),
    (NotificationSuppression::Never, "no suppression"),
];

/// Runs the `bench` command.
pub fn command(options: &Options) -> Result<()> {
    let wanted = |part| options.only.is_none_or(|only| only == part);
    if wanted(Part::Crates) {
        say("the dirty bitmap and the stream, each beside the machine's own speed");
        run::inherit_output(build::cargo()?.args([
            "bench",
            "--quiet",
            "--package",
            "guest-migration",
        ]))?;
    }
    if wanted(Part::Driver) {
        let build_env = setup::ensure(&[Kernel::Uml])?;
        let artifacts = build::artifacts(&build_env, &[Kernel::Uml], Profile::Release)?;
        driver(&artifacts, options)?;
    }
    if wanted(Part::Migration) {
        let build_env = setup::ensure(&[Kernel::Stock])?;
        let artifacts = build::artifacts(&build_env, &[Kernel::Stock], Profile::Release)?;
        migration::table(&artifacts)?;
    }
    println!();
    println!("  Counts are exact; times are of this machine, now.");
    Ok(())
}

fn driver(artifacts: &Artifacts, options: &Options) -> Result<()> {
    let (memory, rounds) = (options.memory, usize::try_from(options.rounds)?);
    let size = (memory - SPARE).min(1024);
    say(format_args!(
        "{memory} MiB of user-mode Linux, our device, one driver after the other; medians of {rounds}"
    ));
    let measure = |driver, way| {
        driver_cost::measure_driver(artifacts, driver, way, memory * MIB, size * MIB, rounds)
    };
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
    fragmented(artifacts, memory * MIB, rounds)?;
    compaction_after_hinting(artifacts, memory * MIB)
}

/// The guest keeps one page in this many. The last value is one page per MiB.
const KEPT: [u64; 4] = [4, 16, 64, 256];
/// Memory that a guest leaves free when it fills its memory, so that its kernel and first process have enough.
const UNFILLED: u64 = 12 * MIB;
/// The orders of a huge page and of the largest free block on x86-64.
const HPAGE_PMD_ORDER: usize = 9;
const MAX_PAGE_ORDER: usize = 10;

/// Prints the costs of hinting fragmented memory, for each smallest order to hint.
fn fragmented(artifacts: &Artifacts, memory: u64, rounds: usize) -> Result<()> {
    println!();
    println!(
        "  {:<10}{:<8}{:>9}{:>9}{:>9}{:>8}{:>9}{:>11}{:>8}{:>12}{:>18}",
        "1 kept of",
        "driver",
        "MiB free",
        "hinted",
        "blocks",
        "%",
        "notified",
        "interrupts",
        "exits",
        "time",
        "MiB >= 2 MiB after"
    );
    for keep_every in KEPT {
        let mut guest = Builder::new(artifacts, Vmm::Uml).memory(memory).boot()?;
        guest.fragment(keep_every, UNFILLED, 11)?;
        let drivers = (0..=MAX_PAGE_ORDER).map(|order| (Driver::Ours, order));
        for (driver, order) in [(Driver::C, MAX_PAGE_ORDER)].into_iter().chain(drivers) {
            let parameters = match driver {
                Driver::Ours => format!("hint_min_order={order}"),
                Driver::C => String::new(),
            };
            let before = guest.memory_usage()?;
            let free = guest.free_blocks()?;
            guest.load_with(driver, &parameters)?;
            let mut rounds_done = Vec::new();
            for _ in 0..rounds {
                rounds_done.push(driver_cost::measure_hint_round(&mut guest)?);
                guest.daemon()?.qmp().hint_done()?;
                guest.check_memory_uncompacted(before)?;
            }
            guest.unload(driver)?;
            let after = guest.free_blocks()?;
            let work = WorkCost::median(rounds_done);
            let all = free.free_bytes_from_order(0);
            println!(
                "  {keep_every:<10}{:<8}{:>9}{:>9}{:>9}{:>8}{:>9}{:>11}{:>8}{:>12}{:>18}",
                match driver {
                    Driver::Ours => format!(">= {order}"),
                    Driver::C => "C".to_owned(),
                },
                all / MIB,
                work.bytes / MIB,
                work.counts.requests - 2,
                work.bytes * 100 / all.max(1),
                work.counts.notifications,
                work.counts.interrupts,
                work.counts.exits(),
                format!("{:.1?}", work.time),
                format!(
                    "{} -> {}",
                    free.free_bytes_from_order(HPAGE_PMD_ORDER) / MIB,
                    after.free_bytes_from_order(HPAGE_PMD_ORDER) / MIB
                ),
            );
        }
        guest.power_off()?;
    }
    Ok(())
}

/// Prints whether a hint round has later costs: how well compaction works after a hint round in fragmented memory, and
/// how many pageblocks are not movable.
fn compaction_after_hinting(artifacts: &Artifacts, memory: u64) -> Result<()> {
    const KEEP_EVERY: u64 = 64;
    println!();
    println!(
        "  {:<16}{:>18}{:>20}{:>22}",
        "1 kept of 64,", "", "MiB >= 2 MiB", "blocks that are not"
    );
    println!(
        "  {:<16}{:>18}{:>20}{:>22}",
        "hinted blocks", "at once", "after compaction", "movable"
    );
    let ours = [0, 2, 4, 6, MAX_PAGE_ORDER].map(|order| Some((Driver::Ours, order)));
    let all = [None, Some((Driver::C, MAX_PAGE_ORDER))];
    for hinting in all.into_iter().chain(ours) {
        let mut guest = Builder::new(artifacts, Vmm::Uml).memory(memory).boot()?;
        guest.fragment(KEEP_EVERY, UNFILLED, 12)?;
        if let Some((driver, order)) = hinting {
            let parameters = match driver {
                Driver::Ours => format!("hint_min_order={order}"),
                Driver::C => String::new(),
            };
            let mut before = guest.memory_usage()?;
            guest.load_with(driver, &parameters)?;
            driver_cost::measure_hint_round(&mut guest)?;
            use_kernel_memory(&mut guest)?;
            guest.daemon()?.qmp().hint_done()?;
            before.used += KERNEL_MEMORY;
            guest.check_memory_uncompacted(before)?;
        } else {
            use_kernel_memory(&mut guest)?;
        }
        let at_once = guest.free_blocks()?;
        guest.settled_memory_usage()?;
        let compacted = guest.free_blocks()?;
        let unmovable = unmovable_pageblocks(&mut guest)?;
        println!(
            "  {:<16}{:>18}{:>20}{:>22}",
            match hinting {
                None => "none".to_owned(),
                Some((Driver::C, _)) => "C".to_owned(),
                Some((Driver::Ours, order)) => format!(">= {order}"),
            },
            at_once.free_bytes_from_order(HPAGE_PMD_ORDER) / MIB,
            compacted.free_bytes_from_order(HPAGE_PMD_ORDER) / MIB,
            unmovable
        );
        guest.power_off()?;
    }
    Ok(())
}

/// An upper bound of the memory that [`use_kernel_memory`] takes.
const KERNEL_MEMORY: u64 = 64 * MIB;

/// Has the kernel allocate about 20 MiB that it cannot move, for the inodes and names of files.
fn use_kernel_memory(guest: &mut Guest) -> Result<()> {
    let script =
        "PATH=/bin; mkdir /files && cd /files && busybox seq 1 25000 | busybox xargs busybox touch";
    let finished = guest.call(Run {
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
    })?;
    ensure!(finished.status == Some(0), "no files: {finished:?}");
    Ok(())
}

/// Returns the number of pageblocks of each migrate type that is not movable, in the first zone.
fn unmovable_pageblocks(guest: &mut Guest) -> Result<String> {
    let text = guest.call(ReadFile {
        path: "/proc/pagetypeinfo".to_owned(),
    })?;
    let mut lines = text
        .lines()
        .skip_while(|line| !line.starts_with("Number of blocks type"));
    let names = lines.next().unwrap_or_default();
    let names = names.split_whitespace().skip(4);
    let counts = lines.next().unwrap_or_default();
    let counts = counts.split_whitespace().skip(4);
    let shown: Vec<_> = names
        .zip(counts)
        .filter(|(name, count)| *name != "Movable" && *count != "0")
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    Ok(shown.join(", "))
}

fn row(kind: &str, way: &str, driver: &str, work: &WorkCost) {
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
