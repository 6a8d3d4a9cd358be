// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Our driver's work beside the C driver's, counted by our device in one run.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use tests::daemon::Daemon;
use tests::guest::{Builder, Driver, Guest};
use tests::vmm::Vmm;
use tests::MIB;

use crate::build::{self, Profile};
use crate::progress::say;
use crate::setup::{self, Kernel};

/// The options of `bench`.
#[derive(Args)]
pub struct Options {
    /// The guest's memory, in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(256..=16384))]
    memory: u64,
}

struct Figures {
    driver: &'static str,
    free: u64,
    hinted: u64,
    blocks: u64,
    hint_notifications: u64,
    hint_time: Duration,
    inflated: u64,
    inflate_notifications: u64,
    inflate_time: Duration,
}

/// Does what `bench` says.
pub fn command(options: &Options) -> Result<()> {
    let set_up = setup::ensure(&[Kernel::Uml])?;
    let artifacts = build::artifacts(&set_up, &[Kernel::Uml], Profile::Release)?;
    say(format_args!(
        "{} MiB of user-mode Linux, our device, one driver after the other",
        options.memory
    ));
    let mut all = Vec::new();
    for driver in [Driver::C, Driver::Ours] {
        let mut guest = Builder::new(&artifacts, Vmm::Uml)
            .memory(options.memory * MIB)
            .boot()?;
        all.push(measure(&mut guest, driver)?);
        guest.power_off()?;
    }
    print(&all);
    Ok(())
}

fn measure(guest: &mut Guest, driver: Driver) -> Result<Figures> {
    guest.load(driver)?;
    let free = guest.settled_free()?;
    let before = notifications(guest.daemon()?, "free")?;
    guest.daemon()?.qmp().hint_start()?;
    let round = guest.daemon()?.qmp().wait_hint_status("finished")?;
    let hint_notifications = notifications(guest.daemon()?, "free")? - before;
    guest.daemon()?.qmp().hint_done()?;
    guest.check_free(free)?;

    let whole = guest.balloon()?.balloon_actual()?;
    let inflated = free / 2 / MIB * MIB;
    let before = notifications(guest.daemon()?, "inflate")?;
    let start = Instant::now();
    guest.balloon()?.balloon(whole - inflated)?;
    guest
        .balloon()?
        .wait_balloon(whole - inflated, Duration::from_secs(120))?;
    let inflate_time = start.elapsed();
    let inflate_notifications = notifications(guest.daemon()?, "inflate")? - before;
    Ok(Figures {
        driver: driver.module(),
        free,
        hinted: round.bytes,
        blocks: round.blocks,
        hint_notifications,
        hint_time: Duration::from_micros(round.duration_us),
        inflated,
        inflate_notifications,
        inflate_time,
    })
}

fn notifications(daemon: &mut Daemon, queue: &str) -> Result<u64> {
    let queues = daemon.virtio_status()?.queues;
    Ok(queues
        .iter()
        .filter(|status| status.name.starts_with(queue))
        .map(|status| status.notifications)
        .sum())
}

fn print(all: &[Figures]) {
    let row = |name: &str, value: &dyn Fn(&Figures) -> String| {
        let cells: Vec<_> = all
            .iter()
            .map(|figures| format!("{:>20}", value(figures)))
            .collect();
        println!("  {name:<34}{}", cells.concat());
    };
    println!();
    row("", &|figures| figures.driver.to_owned());
    row("free memory", &|figures| mib(figures.free));
    row("hinted", &|figures| mib(figures.hinted));
    row("  in blocks", &|figures| figures.blocks.to_string());
    row("  notifications", &|figures| {
        figures.hint_notifications.to_string()
    });
    row("  time", &|figures| format!("{:.1?}", figures.hint_time));
    row("inflated", &|figures| mib(figures.inflated));
    row("  notifications", &|figures| {
        figures.inflate_notifications.to_string()
    });
    row("  time", &|figures| format!("{:.1?}", figures.inflate_time));
    println!();
    println!("  Counts are exact; times are of this machine, now.");
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes / MIB)
}
