// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The demonstration: a guest with the stock Debian kernel, our driver and our device, with progress messages and
//! tables.

mod migration;

use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use clap::Args;
use harness::calls::{Fill, Free};
use harness::check::MemoryUsage;
use harness::guest::{Builder, Driver, Guest};
use harness::host::Accelerator;
use harness::vmm::Vmm;
use harness::MIB;

use crate::build::{self, Profile};
use crate::progress::say;
use crate::setup::{self, Kernel};

/// The options of `demo`.
#[derive(Args)]
pub struct Options {
    /// The guest's memory, in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(256..=65536))]
    memory: u64,
}

/// Memory that a guest leaves free when it fills its memory, so that its kernel and first process have enough.
const SPARE: u64 = 16 * MIB;
const BALLOON_LIMIT: Duration = Duration::from_secs(60);
/// The limits for the figures, in percent.
const HINTED_AT_LEAST: u64 = 90;
const RELEASED_AT_LEAST: u64 = 95;

#[derive(Default)]
struct Figures {
    guest_memory: u64,
    free: u64,
    hint_blocks: u64,
    hint_bytes: u64,
    pages_total: u64,
    pages_cleared: u64,
    hint_duration: Duration,
    asked: u64,
    taken: u64,
    host_before: u64,
    host_inflated: u64,
    host_after: u64,
}

/// Runs the `demo` command.
pub fn command(options: &Options) -> Result<()> {
    let build_env = setup::ensure(&[Kernel::Stock])?;
    let artifacts = build::artifacts(&build_env, &[Kernel::Stock], Profile::Release)?;
    let how = match Accelerator::detect() {
        Accelerator::Kvm => "with KVM",
        Accelerator::Tcg => "emulated, since this machine cannot virtualise",
    };
    say(format_args!(
        "booting {} MiB of stock Debian kernel in QEMU, {how}",
        options.memory
    ));
    let start = Instant::now();
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .memory(options.memory * MIB)
        .device_options(&["--discard-hinted"])
        .boot()?;
    let release = guest.agent().hello().release.clone();
    say(format_args!(
        "guest: Linux {release} is up after {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    let figures = show(&mut guest)?;
    let outcomes = migration::with_and_without_hints(&mut guest, &artifacts, options.memory * MIB)?;
    guest.power_off()?;
    say("guest: off");
    print(&figures);
    migration::print(&outcomes);
    check_thresholds(&figures)?;
    migration::check_thresholds(&outcomes)
}

fn show(guest: &mut Guest) -> Result<Figures> {
    guest.load(Driver::Ours)?;
    let accepted = guest
        .daemon()?
        .virtio_status()?
        .negotiated_features
        .join(", ");
    say(format_args!(
        "guest: virtio_balloon_rs.ko is loaded; it and the device agreed on {accepted}"
    ));
    let mut figures = Figures {
        guest_memory: guest.balloon_qmp()?.balloon_actual()?,
        ..Figures::default()
    };
    use_memory(guest)?;
    let before = guest.settled_memory_usage()?;
    figures.free = before.free;
    let (free, in_use) = (mib(figures.free), mib(guest.host_memory_in_use()?));
    say(format_args!(
        "guest: {free} are free again; host: {in_use} are in use, for it cannot know"
    ));
    hint(guest, before, &mut figures)?;
    balloon(guest, &mut figures)?;
    guest.check_log().context("the guest's kernel log")?;
    say("guest: nothing amiss in the kernel log");
    Ok(figures)
}

fn use_memory(guest: &mut Guest) -> Result<()> {
    let bytes = guest.mem_info()?.free().saturating_sub(SPARE);
    let filled = guest.call(Fill {
        bytes,
        keep_every: 0,
        seed: 1,
    })?;
    say(format_args!("guest: a process has filled {}", mib(bytes)));
    guest.call(Free {
        workload: filled.workload,
    })
}

fn hint(guest: &mut Guest, before: MemoryUsage, figures: &mut Figures) -> Result<()> {
    let qmp = guest.daemon()?.qmp();
    let id = qmp.hint_start()?;
    say(format_args!(
        "host: a hint round begins, command id {id:#x}"
    ));
    let hint_round = qmp.wait_hint_status("finished")?;
    (figures.hint_blocks, figures.hint_bytes) = (hint_round.blocks, hint_round.bytes);
    (figures.pages_cleared, figures.pages_total) =
        (hint_round.pages_cleared, hint_round.pages_total);
    figures.hint_duration = Duration::from_micros(hint_round.duration_us);
    let (bytes, took) = (mib(hint_round.bytes), figures.hint_duration);
    say(format_args!(
        "host: the guest has hinted {bytes} in {} blocks, in {took:.1?}",
        hint_round.blocks
    ));
    say(format_args!(
        "guest: it holds them, with {} free",
        mib(guest.mem_info()?.free())
    ));
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory(before)?;
    say(format_args!(
        "guest: the hint round is done, {} are free; host: {} are in use, because hinted pages were discarded",
        mib(guest.mem_info()?.free()),
        mib(guest.host_memory_in_use()?)
    ));
    Ok(())
}

fn balloon(guest: &mut Guest, figures: &mut Figures) -> Result<()> {
    use_memory(guest)?;
    let before = guest.settled_memory_usage()?;
    figures.host_before = guest.host_memory_in_use()?;
    // Everything free except what the guest needs to keep running.
    figures.asked = before.free.saturating_sub(4 * SPARE) / MIB * MIB;
    let target = figures.guest_memory - figures.asked;
    say(format_args!("host: balloon target {}", mib(figures.asked)));
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, BALLOON_LIMIT)?;
    figures.taken = figures.guest_memory - guest.balloon_qmp()?.balloon_actual()?;
    figures.host_inflated = guest.host_memory_in_use()?;
    let in_use = mib(figures.host_inflated);
    say(format_args!(
        "host: it has taken {}; {in_use} are in use",
        mib(figures.taken)
    ));
    guest.balloon_qmp()?.set_balloon(figures.guest_memory)?;
    guest
        .balloon_qmp()?
        .wait_balloon(figures.guest_memory, BALLOON_LIMIT)?;
    guest.check_memory(before)?;
    figures.host_after = guest.host_memory_in_use()?;
    let free = mib(guest.mem_info()?.free());
    say(format_args!(
        "guest: the balloon is empty, {free} are free; host: {} are in use",
        mib(figures.host_after)
    ));
    Ok(())
}

fn print(figures: &Figures) {
    let share = percent(figures.pages_cleared, figures.pages_total);
    let rows = [
        ("guest memory", mib(figures.guest_memory)),
        ("free, by the guest", mib(figures.free)),
        (
            "hinted",
            format!(
                "{} in {} blocks",
                mib(figures.hint_bytes),
                figures.hint_blocks
            ),
        ),
        (
            "hinted, of what was free",
            format!("{:.1} %", percent(figures.hint_bytes, figures.free)),
        ),
        ("RAM that is not sent", format!("{share:.1} %")),
        (
            "duration of the hint round",
            format!("{:.1?}", figures.hint_duration),
        ),
        ("taken by the balloon", mib(figures.taken)),
        ("host memory in use before", mib(figures.host_before)),
        ("host memory in use inflated", mib(figures.host_inflated)),
        ("host memory in use after", mib(figures.host_after)),
    ];
    println!();
    for (name, value) in rows {
        println!("  {name:<28} {value:>22}");
    }
    println!();
}

fn check_thresholds(figures: &Figures) -> Result<()> {
    let mut short = Vec::new();
    if figures.hint_bytes * 100 < figures.free * HINTED_AT_LEAST {
        short.push(format!(
            "less than {HINTED_AT_LEAST} % of free memory was hinted"
        ));
    }
    let released = figures.host_before.saturating_sub(figures.host_inflated);
    if released * 100 < figures.taken * RELEASED_AT_LEAST {
        short.push(format!(
            "the host got less than {RELEASED_AT_LEAST} % of what the balloon took"
        ));
    }
    ensure!(
        figures.taken == figures.asked && figures.taken > 0,
        "the balloon took {} bytes",
        figures.taken
    );
    if !short.is_empty() {
        bail!("{}", short.join("; "));
    }
    Ok(())
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes / MIB)
}

// The figures are only displayed, so rounding does not matter.
#[allow(clippy::cast_precision_loss)]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}
