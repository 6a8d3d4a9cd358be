// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests live migration of guests that work, of guests that do not answer, and of guests without a driver.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{DropCachesAndCompact, Fill, Free, PageUse, Verify};
use harness::destination::Destination;
use harness::guest::{Builder, Driver, Guest};
use harness::host::guest_memory_file;
use harness::memory_image::MemoryImage;
use harness::migration::MigrationStatus;
use harness::pattern;
use harness::process::Signal;
use harness::ranges::RangeSet;
use harness::stress::{Stress, StressLoad};
use harness::stressed_guest::StressedGuest;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};
use serde_json::{json, Value};

/// The tests below rely on page flags to tell whether the guest uses a page. No flag may say so of a hinted page.
#[test]
fn r15_no_flag_says_that_a_hinted_page_is_in_use() -> Result<()> {
    /// Memory that the guest may use meanwhile.
    const OWN_USE: u64 = 4 * MIB;
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        for &driver in Driver::each() {
            if vmm == Vmm::Qemu && driver == Driver::C {
                // The C driver allocates hinted blocks as ours does. User-mode Linux covers the C driver.
                continue;
            }
            let mut guest = Builder::new(&artifacts, vmm).memory(256 * MIB).boot()?;
            guest.fill_and_free(16 * MIB, 10)?;
            match driver {
                // A reserve so large that the shrinker reclaims nothing while the flags are read.
                Driver::Ours => guest.load_with(driver, "hint_reserve_mib=16")?,
                Driver::C => guest.load(driver)?,
            }
            let before = guest.settled_memory_usage()?;
            guest.hint_all()?;
            let hinted = guest.daemon()?.qmp().hinted_ranges()?;
            let page_use = guest.call(PageUse {})?;
            let wrong = page_use.used.intersection(&hinted);
            ensure!(
                wrong.ranges().is_empty(),
                "{vmm:?}, {driver:?}: hinted, and in use: {:x?}",
                wrong.ranges()
            );
            ensure!(page_use.used.bytes() > 4 * MIB, "{}", page_use.used.bytes());
            guest.daemon()?.qmp().hint_done()?;
            guest.check_memory(before)?;
            // `check_memory` tolerates a few blocks that are not free yet.
            let deadline = Instant::now() + HANG_TIMEOUT;
            let lost = loop {
                guest.call(DropCachesAndCompact {})?;
                let done = guest.call(PageUse {})?;
                let lost = hinted.difference(&done.free);
                let zones = guest.zones()?;
                let pcp_pages = zones.pcp_pages() * zones.page_size();
                if lost.bytes() <= OWN_USE + pcp_pages {
                    break lost;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{vmm:?}, {driver:?}: hinted, and not free any more: {:x?}",
                    lost.ranges()
                );
                sleep(Duration::from_millis(100));
            };
            println!(
                "{vmm:?}, {driver:?}: {} bytes hinted, {} in use; {} of the former not free after the round",
                hinted.bytes(),
                page_use.used.bytes(),
                lost.bytes()
            );
            guest.check_and_power_off(before)?;
        }
    }
    Ok(())
}

/// The guest's memory, and the part that the workloads use.
const MEMORY: u64 = 256 * MIB;
const LOAD: u64 = 96 * MIB;
const INFLATE_BY: u64 = 24 * MIB;

/// The number of migrations of each kind of guest, unless the environment variable sets it.
const TIMES: u32 = 3;
const TIMES_VARIABLE: &str = "VIRTIO_BALLOON_RS_MIGRATIONS";

#[test]
fn r15_a_guest_that_works_is_migrated_with_our_drivers_hints_in_user_mode_linux() -> Result<()> {
    migrates_while_it_works(Vmm::Uml, Driver::Ours)
}

#[test]
fn r15_a_guest_that_works_is_migrated_with_the_c_driver_in_user_mode_linux() -> Result<()> {
    migrates_while_it_works(Vmm::Uml, Driver::C)
}

#[test]
fn r15_a_guest_that_works_is_migrated_with_our_drivers_hints_in_qemu() -> Result<()> {
    migrates_while_it_works(Vmm::Qemu, Driver::Ours)
}

#[test]
fn r15_a_guest_that_works_is_migrated_with_the_c_driver_in_qemu() -> Result<()> {
    migrates_while_it_works(Vmm::Qemu, Driver::C)
}

/// Migrates a guest several times while it works. Each time, while the source is paused, all pages of source and
/// destination are compared. Every other time the guest continues with the memory of the destination. The other times
/// it continues with its own memory, and its kernel must have the pages that differ as free pages.
fn migrates_while_it_works(vmm: Vmm, driver: Driver) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, vmm)
        .memory(MEMORY)
        .features(&[
            "must-tell-host",
            "stats",
            "free-page-hint",
            "free-page-reporting",
        ])
        .device_options(&["--discard-hinted"]);
    let builder = if vmm == Vmm::Qemu {
        builder.qmp_socket()
    } else {
        builder
    };
    let mut stressed_guest =
        StressedGuest::start(builder, driver, StressLoad::new(LOAD).with_rests(), 15)?;
    stressed_guest.guest.set_short_reporting_delay()?;
    for turn in 0..times()? {
        let before = stressed_guest.progress()?;
        migrate_once(&mut stressed_guest, driver, turn)
            .with_context(|| format!("migration {turn}"))?;
        let after = stressed_guest.progress()?;
        println!(
            "  meanwhile {} pages compared",
            after.compared - before.compared
        );
    }
    println!("{:?}", stressed_guest.end()?);
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

/// Returns the parameters of the migration with this number. Consecutive migrations differ.
fn parameters(turn: u32) -> Value {
    let (channels, compression) = match turn % 3 {
        0 => (1, "none"),
        1 => (4, "none"),
        _ => (2, "zstd"),
    };
    // A short downtime limit causes several iterations, however fast the transfer is. The guest writes between them.
    json!({
        "downtime-limit": 20, "max-rounds": 4, "multifd-channels": channels, "multifd-compression": compression,
        "verify": turn % 2 == 1,
        // A guest that gets little processor time answers late.
        "free-page-hint-wait": HANG_TIMEOUT_MS,
    })
}

fn migrate_once(stressed_guest: &mut StressedGuest, driver: Driver, turn: u32) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let guest = &mut stressed_guest.guest;
    let (adopt, resize) = (turn % 2 == 0, turn % 3 == 1);
    let mut destination = Destination::start(&artifacts.balloonctl, guest.memory())?;
    // Every third time the migration pauses the guest by stopping its processes, with either VMM.
    let qmp_socket = guest.vmm_qmp_socket().filter(|_| turn % 3 != 2);
    let qmp = guest.daemon()?.qmp();
    qmp.migrate_set_parameters(parameters(turn))?;
    let whole = qmp.balloon_actual()?;
    qmp.migrate(&destination.uri(), qmp_socket.as_deref())?;
    if resize {
        // Pages enter the balloon during the migration, and the device discards them.
        qmp.set_balloon(whole - INFLATE_BY)?;
    }
    let status = guest.finish_migration(&mut destination)?;
    ensure!(guest.is_paused()?, "the source is not paused");
    let comparison = guest.compare_memory(&destination)?;
    let tracking = status.tracking.clone().unwrap_or_default();
    let ram = status.ram;
    println!(
        "{:?}, {driver:?} driver, {} ({}): {} iterations, {} ms, {} paused; {} of {} pages have data; {} sent, {} of them again, {} as \
         zeros, {} hinted, {} skipped; {} differ",
        guest.vmm_kind(),
        tracking.mode,
        tracking.reason,
        status.rounds.len(),
        status.total_time,
        status.downtime.unwrap_or_default(),
        comparison.data_pages,
        ram.total / 4096,
        ram.normal,
        ram.resent,
        ram.duplicate,
        ram.hinted,
        ram.skipped,
        comparison.different.bytes() / 4096,
    );
    ensure!(ram.missed == 0, "writes were missed: {status:#?}");
    let differ = comparison.different.bytes() / 4096;
    ensure!(
        differ <= ram.skipped,
        "{differ} pages differ, and only {} were left out",
        ram.skipped
    );
    if tracking.mode == "content" {
        // A page that content tracking skips is zero on both sides.
        ensure!(
            differ == 0,
            "these differ: {:x?}",
            comparison.different.ranges()
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
        guest.adopt(&comparison, &destination)?;
    }
    guest.resume()?;
    if resize {
        let qmp = guest.daemon()?.qmp();
        qmp.wait_balloon(whole - INFLATE_BY, HANG_TIMEOUT)?;
        qmp.set_balloon(whole)?;
        qmp.wait_balloon(whole, HANG_TIMEOUT)?;
    }
    if !adopt {
        guest.check_different_pages_are_free(&comparison)?;
    }
    stressed_guest.check_unharmed()
}

/// Returns where a guest's memory holds the first `pages` pages of the workload with this seed. Stale copies, at
/// earlier places of these pages, are included.
fn places(memory_image: &MemoryImage, seed: u64, pages: u64) -> Result<RangeSet> {
    const WORD: usize = 8;
    let mut by_start = BTreeMap::new();
    for number in 0..pages {
        let mut start = [0; WORD];
        pattern::write(&mut start, seed, number);
        by_start.insert(start.to_vec(), number);
    }
    let mut places = Vec::new();
    for page in memory_image.data()?.pages() {
        let bytes = memory_image.read(page)?;
        let start = bytes.get(..WORD).unwrap_or_default();
        let number = by_start.get(start);
        if number.is_some_and(|number| pattern::holds(&bytes, seed, *number)) {
            places.push(page);
        }
    }
    Ok(places.into())
}

/// The tests above can fail: pages that the destination lacks are found to differ and to be in use, and a guest that
/// continues without them finds them wrong.
#[test]
fn r15_pages_that_the_destination_lacks_are_missed() -> Result<()> {
    const KEPT: u64 = 4 * MIB;
    const LOST: u64 = 200;
    const SEED: u64 = 18;
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, Vmm::Uml)
        .memory(160 * MIB)
        .device_options(&["--discard-hinted"]);
    let mut stressed_guest = StressedGuest::start(
        builder,
        Driver::Ours,
        StressLoad::new(32 * MIB).with_rests(),
        17,
    )?;
    // Pages of the other workloads may become free at any time. This workload keeps its pages.
    let kept = stressed_guest.guest.call(Fill {
        bytes: KEPT,
        keep_every: 1,
        seed: SEED,
    })?;
    let workload = kept.workload;
    for adopt in [false, true] {
        let guest = &mut stressed_guest.guest;
        let mut destination = Destination::start(&artifacts.balloonctl, guest.memory())?;
        guest.migrate_to(&mut destination)?;
        let memory_image = destination.memory_image()?;
        // Searched while the guest is paused, because compaction may migrate the pages before.
        let lost = places(&guest.memory_image()?, SEED, LOST)?;
        ensure!(lost.bytes() >= LOST * 4096, "only {} bytes", lost.bytes());
        for page in lost.pages() {
            memory_image.write(page.start, &[0; 4096])?;
        }
        let comparison = guest.compare_memory(&destination)?;
        let unseen = lost.difference(&comparison.different);
        ensure!(
            unseen.ranges().is_empty(),
            "lost, and not seen to differ: {:x?}",
            unseen.ranges()
        );
        if adopt {
            guest.adopt(&comparison, &destination)?;
        }
        guest.resume()?;
        if !adopt {
            let found = guest.check_different_pages_are_free(&comparison);
            println!("{found:?}");
            ensure!(found.is_err(), "no process uses the lost pages");
            stressed_guest.check_unharmed()?;
        }
        let found = stressed_guest.guest.call(Verify { workload })?;
        let missed = if adopt { LOST } else { 0 };
        ensure!(
            found.wrong == missed && found.pages == KEPT / 4096,
            "{missed} pages were to be wrong: {found:?}"
        );
    }
    stressed_guest.guest.call(Free { workload })?;
    stressed_guest.end().map(drop)
}

/// The migration tests rely on the workloads: each must detect pages that were changed outside the guest.
#[test]
fn r15_every_workload_sees_pages_that_are_lost() -> Result<()> {
    const PAUSE: Duration = Duration::from_millis(10);
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .memory(192 * MIB)
        .boot()?;
    let stress = Stress::start(&mut guest, StressLoad::new(32 * MIB), 1)?;
    stress.wait_compared(&mut guest, 1000, HANG_TIMEOUT)?;
    let memory_image = MemoryImage::open(&guest_memory_file(guest.vmm().id())?)?;
    let deadline = Instant::now() + HANG_TIMEOUT;
    let mut lost = 0;
    // A workload that had no page in use when pages were lost cannot detect the loss.
    let each = loop {
        lost += lose_patterns(&mut guest, &memory_image)?;
        sleep(PAUSE);
        let each = stress.progress(&mut guest)?;
        if each.iter().all(|one| one.wrong > 0) {
            break each;
        }
        ensure!(Instant::now() < deadline, "not all have seen it: {each:?}");
    };
    ensure!(lost > 1000, "only {lost} pages had a pattern");
    println!("{lost} pages were lost, free ones among them: {each:?}");
    ensure!(stress.end_and_verify(&mut guest).is_err());
    ensure!(guest.call(PageUse {})?.used.bytes() > MIB);
    guest.power_off()?;
    Ok(())
}

/// Zeroes the pages of a guest that hold patterns, in use or not, and returns their number.
fn lose_patterns(guest: &mut Guest, memory_image: &MemoryImage) -> Result<u64> {
    const PAGE: usize = 4096;
    let mut lost = 0;
    // The guest is stopped, because a page could change its use between the read and the write.
    guest.vmm().stop()?;
    for range in memory_image.data()?.ranges() {
        for (start, page) in (range.start..)
            .step_by(PAGE)
            .zip(memory_image.read(*range)?.chunks_exact(PAGE))
        {
            if pattern::is_pattern(page) {
                memory_image.write(start, &[0; PAGE])?;
                lost += 1;
            }
        }
    }
    guest.vmm().signal(Signal::SIGCONT)?;
    Ok(lost)
}

/// A guest that never answers delays its migration by `free-page-hint-wait`, and all of its memory arrives.
#[test]
fn r14_a_guest_that_never_answers_delays_its_migration_by_the_limit_at_most() -> Result<()> {
    /// Longer than the default limit.
    const WAIT: Duration = Duration::from_secs(3);
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    let parameters = json!({ "free-page-hint-wait": WAIT.as_millis() as u64, "max-rounds": 3 });
    stressed_guest
        .guest
        .daemon()?
        .qmp()
        .migrate_set_parameters(parameters)?;
    // The guest is stopped, so it never answers.
    stressed_guest.guest.vmm().stop()?;
    let mut destination = Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
    let status = stressed_guest.guest.migrate_to(&mut destination)?;
    let comparison = stressed_guest.guest.compare_memory(&destination)?;
    stressed_guest.guest.resume()?;
    stressed_guest.guest.vmm().signal(Signal::SIGCONT)?;
    let waits = status.rounds.iter().map(|iteration| iteration.hint_wait_us);
    let waits: Vec<_> = waits.map(Duration::from_micros).collect();
    println!("waited {waits:?} of {} ms in all", status.total_time);
    // Without a limit the wait would never end.
    ensure!(
        waits.first().is_some_and(|wait| *wait >= WAIT),
        "it waited for {waits:?}: {status:#?}"
    );
    ensure!(
        comparison.different.ranges().is_empty(),
        "{:x?}",
        comparison.different
    );
    stressed_guest.check_unharmed()?;
    stressed_guest.end().map(drop)
}

#[test]
fn a_guest_without_a_driver_is_migrated_without_hints() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut stressed_guest = StressedGuest::start_small(&artifacts, &[])?;
    stressed_guest.guest.unload(Driver::Ours)?;
    let mut destination = Destination::start(&artifacts.balloonctl, stressed_guest.guest.memory())?;
    stressed_guest.guest.start_migration(&destination.uri())?;
    let status = stressed_guest.guest.daemon()?.qmp().wait_migration_end()?;
    println!("{status:?}");
    ensure!(status.status == MigrationStatus::Completed, "{status:?}");
    destination.wait()?;
    let comparison = stressed_guest.guest.compare_memory(&destination)?;
    ensure!(comparison.different.ranges().is_empty(), "{comparison:?}");
    stressed_guest.guest.resume()?;
    stressed_guest.guest.load(Driver::Ours)?;
    stressed_guest.end().map(drop)
}
