// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests whose memory is moved while they work.

use anyhow::{ensure, Context, Result};
use serde_json::json;
use tests::artifacts::Artifacts;
use tests::calls::{DropMemoryCaches, PageUse};
use tests::destination::Destination;
use tests::guest::{Builder, Driver};
use tests::stress::Load;
use tests::vmm::Vmm;
use tests::working::Working;
use tests::MIB;

/// What the proofs below rest on: the flags of a page tell whether somebody relies on what it holds.
#[test]
fn r15_no_flag_says_that_a_hinted_page_is_in_use() -> Result<()> {
    /// What the guest may use for itself meanwhile.
    const OWN_USE: u64 = 4 * MIB;
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        for &driver in Driver::each() {
            if vmm == Vmm::Qemu && driver == Driver::C {
                // Its blocks are the kernel's as much as ours are: user-mode Linux shows that.
                continue;
            }
            let (mut guest, free) = Builder::new(&artifacts, vmm)
                .memory(256 * MIB)
                .boot_used(16 * MIB, driver)?;
            guest.hint_all()?;
            let hinted = guest.daemon()?.qmp().hinted_ranges()?;
            let held = guest.call(PageUse {})?;
            let wrong = held.used.intersection(&hinted);
            ensure!(
                wrong.ranges().is_empty(),
                "{vmm:?}, {driver:?}: hinted, and in use: {:x?}",
                wrong.ranges()
            );
            ensure!(held.used.bytes() > 4 * MIB, "{}", held.used.bytes());
            guest.daemon()?.qmp().hint_done()?;
            guest.check_free(free)?;
            guest.call(DropMemoryCaches {})?;
            let done = guest.call(PageUse {})?;
            let lost = hinted.without(&done.free);
            println!(
                "{vmm:?}, {driver:?}: {} bytes hinted, {} in use; {} of the former not free after the round",
                hinted.bytes(),
                held.used.bytes(),
                lost.bytes()
            );
            ensure!(
                lost.bytes() <= OWN_USE,
                "{vmm:?}, {driver:?}: hinted, and not free any more: {:x?}",
                lost.ranges()
            );
            guest.farewell(free)?;
        }
    }
    Ok(())
}

/// How much a guest has, and how much of it is worked on.
const MEMORY: u64 = 256 * MIB;
const LOAD: u64 = 96 * MIB;

/// How often each kind of guest is moved: a few times, or as often as the environment says.
const TIMES: u32 = 3;
const TIMES_VARIABLE: &str = "VIRTIO_BALLOON_RS_MIGRATIONS";

#[test]
fn r15_a_guest_that_works_is_moved_with_our_drivers_hints_in_user_mode_linux() -> Result<()> {
    is_moved_while_it_works(Vmm::Uml, Driver::Ours)
}

#[test]
fn r15_a_guest_that_works_is_moved_with_the_c_driver_in_user_mode_linux() -> Result<()> {
    is_moved_while_it_works(Vmm::Uml, Driver::C)
}

#[test]
fn r15_a_guest_that_works_is_moved_with_our_drivers_hints_in_qemu() -> Result<()> {
    is_moved_while_it_works(Vmm::Qemu, Driver::Ours)
}

#[test]
fn r15_a_guest_that_works_is_moved_with_the_c_driver_in_qemu() -> Result<()> {
    is_moved_while_it_works(Vmm::Qemu, Driver::C)
}

/// Moves a guest again and again while it works. Each time, with the source paused, both sides are compared to the last page.
/// Every other time the guest goes on with what the destination got, and the other times with its own memory, whereupon its
/// kernel says that it has no use for pages that differ.
fn is_moved_while_it_works(vmm: Vmm, driver: Driver) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, vmm)
        .memory(MEMORY)
        .device_options(&["--discard-hinted"]);
    let builder = if vmm == Vmm::Qemu {
        builder.operators()
    } else {
        builder
    };
    let mut working = Working::start(builder, driver, Load::of(LOAD), 15)?;
    // However fast it is sent, the guest is to write meanwhile, and there are to be rounds.
    let parameters = json!({ "downtime-limit": 20, "max-rounds": 4 });
    working
        .guest
        .daemon()?
        .qmp()
        .migrate_parameters(parameters)?;
    for turn in 0..times()? {
        let before = working.so_far()?;
        is_moved(&mut working, driver, turn % 2 == 0)
            .with_context(|| format!("migration {turn}"))?;
        let after = working.so_far()?;
        println!(
            "  meanwhile {} pages compared",
            after.compared - before.compared
        );
    }
    println!("{:?}", working.end()?);
    Ok(())
}

fn times() -> Result<u32> {
    match std::env::var(TIMES_VARIABLE) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{TIMES_VARIABLE} is not a number")),
        Err(_) => Ok(TIMES),
    }
}

fn is_moved(working: &mut Working, driver: Driver, adopt: bool) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let guest = &mut working.guest;
    let mut destination = Destination::start(&artifacts.balloonctl, guest.memory())?;
    let status = guest.migrate_to(&mut destination)?;
    ensure!(guest.is_paused()?, "the source is not paused");
    let outcome = guest.outcome(&destination)?;
    let tracking = status.tracking.clone().unwrap_or_default();
    let ram = status.ram;
    println!(
        "{:?}, {driver:?} driver, {} ({}): {} rounds, {} ms, {} paused; {} of {} pages have data; {} sent, {} of them again, {} as \
         zeros, {} hinted, {} skipped; {} differ",
        guest.kind(),
        tracking.mode,
        tracking.reason,
        status.rounds.len(),
        status.total_time,
        status.downtime.unwrap_or_default(),
        outcome.data,
        ram.total / 4096,
        ram.normal,
        ram.resent,
        ram.duplicate,
        ram.hinted,
        ram.skipped,
        outcome.different.bytes() / 4096,
    );
    ensure!(ram.missed == 0, "writes were missed: {status:#?}");
    let differ = outcome.different.bytes() / 4096;
    ensure!(
        differ <= ram.skipped,
        "{differ} pages differ, and only {} were left out",
        ram.skipped
    );
    if tracking.mode == "content" {
        // What it leaves out is zero on both sides.
        ensure!(
            differ == 0,
            "these differ: {:x?}",
            outcome.different.ranges()
        );
        ensure!(
            tracking.free_page_hint == (driver == Driver::Ours),
            "{tracking:?}"
        );
    }
    if tracking.free_page_hint {
        ensure!(ram.hinted > 0, "no page was spared: {ram:?}");
    } else {
        ensure!(ram.hinted == 0 && ram.skipped == 0, "{ram:?}");
        ensure!(
            tracking.reason.contains("hints are ignored"),
            "it does not say why there are no hints: {tracking:?}"
        );
    }
    if adopt {
        guest.adopt(&outcome, &destination)?;
    }
    guest.resume()?;
    if !adopt {
        guest.check_different_are_free(&outcome)?;
    }
    working.is_unharmed()
}
