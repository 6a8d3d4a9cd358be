// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that hints are correct: kept pages are never hinted, nearly all free memory is, and the guest keeps its
//! reserve.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::attempts::Attempts;
use harness::calls::{Fill, Free, KeptPages, LowestMemFree, Release, Verify};
use harness::guest::{Builder, Driver, Guest};
use harness::vmm::Vmm;
use harness::zones::ZoneInfo;
use harness::MIB;

/// The guest keeps one page in this many: about one per two blocks of the largest order.
const KEEP_EVERY: u64 = 2000;

#[test]
fn our_drivers_hints_spare_what_a_guest_in_qemu_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Qemu, Driver::Ours)
}

#[test]
fn the_c_drivers_hints_spare_what_a_guest_in_qemu_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Qemu, Driver::C)
}

#[test]
fn our_drivers_hints_spare_what_a_guest_in_user_mode_linux_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Uml, Driver::Ours)
}

#[test]
fn the_c_drivers_hints_spare_what_a_guest_in_user_mode_linux_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Uml, Driver::C)
}

/// The guest keeps pages all over its memory. None of them is hinted, and all keep their contents while the memory
/// around them is hinted and reused.
fn hints_spare_what_is_kept(vmm: Vmm, driver: Driver) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm).boot()?;
    guest.load(driver)?;
    let bytes = guest.mem_info()?.free() - 32 * MIB;
    let dense = guest.call(Fill {
        bytes: bytes / 4,
        keep_every: 2,
        seed: 3,
    })?;
    let sparse = guest.call(Fill {
        bytes: bytes / 4 * 3,
        keep_every: KEEP_EVERY,
        seed: 4,
    })?;
    let workloads = [dense.workload, sparse.workload];
    for workload in workloads {
        guest.call(Release { workload })?;
    }
    let settled_memory_usage = guest.settled_memory_usage()?;
    let hint_round = guest.hint_all()?;
    let hinted = guest.daemon()?.qmp().hinted_ranges()?;
    ensure!(hinted.bytes() > 0, "nothing was hinted: {hint_round:?}");
    ensure!(
        hinted.bytes() == hint_round.pages_cleared * 4096,
        "{} bytes of clear bits, {hint_round:?}",
        hinted.bytes()
    );
    for workload in workloads {
        let kept = guest.call(KeptPages { workload })?;
        let wrong = hinted.intersection(&kept);
        ensure!(
            wrong.ranges().is_empty(),
            "kept pages were hinted: {:x?}",
            wrong.ranges()
        );
    }
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory_uncompacted(settled_memory_usage)?;
    // Other processes use the hinted memory. The kept pages must not change.
    guest.fill_and_free(64 * MIB, 5)?;
    for workload in workloads {
        let found = guest.call(Verify { workload })?;
        ensure!(
            found.wrong == 0 && found.pages > 0,
            "workload {workload}: {found:?}"
        );
    }
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn our_driver_hints_what_the_buddy_lists_of_a_guest_in_qemu_hold() -> Result<()> {
    hinted_is_what_was_free(Vmm::Qemu, Driver::Ours)
}

#[test]
fn the_c_driver_hints_what_the_buddy_lists_of_a_guest_in_qemu_hold() -> Result<()> {
    hinted_is_what_was_free(Vmm::Qemu, Driver::C)
}

#[test]
fn our_driver_hints_what_the_buddy_lists_of_user_mode_linux_hold() -> Result<()> {
    hinted_is_what_was_free(Vmm::Uml, Driver::Ours)
}

/// While the driver keeps the hinted blocks, the kernel's memory use exceeds its earlier use by the hinted bytes,
/// within a tolerance.
fn hinted_is_what_was_free(vmm: Vmm, driver: Driver) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, before) = Builder::new(&artifacts, vmm).boot_filled(24 * MIB, driver)?;
    let hint_round = guest.hint_all()?;
    let hinted = guest.daemon()?.qmp().hinted_ranges()?.bytes();
    println!(
        "{before:?}; hinted {hinted} in {} blocks",
        hint_round.blocks
    );
    // The counters of our driver are zero after loading.
    let reclaimed = match driver {
        Driver::Ours => Some(0),
        Driver::C => None,
    };
    guest.wait_hinted_memory_use(before.used, hinted, reclaimed, 0)?;
    ensure!(
        hinted >= before.free / 10 * 9,
        "{hinted} bytes were hinted of {before:?} that were free"
    );
    guest.daemon()?.qmp().hint_done()?;
    guest.check_and_power_off(before)
}

#[test]
fn fragmented_memory_of_a_guest_in_qemu_is_hinted_as_well() -> Result<()> {
    fragmented_memory_is_hinted_as_well(Vmm::Qemu)
}

#[test]
fn fragmented_memory_of_user_mode_linux_is_hinted_as_well() -> Result<()> {
    fragmented_memory_is_hinted_as_well(Vmm::Uml)
}

/// With one kept page in each MiB there is hardly a free block of the largest order, and the C driver hints almost
/// nothing. Our driver hints the free blocks of order `hint_min_order` and above.
fn fragmented_memory_is_hinted_as_well(vmm: Vmm) -> Result<()> {
    const LARGEST: usize = 10;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm)
        .kernel_arguments("init_on_alloc=0")
        .boot()?;
    let workloads = guest.fragment(256, 16 * MIB, 20)?;
    if Driver::each().contains(&Driver::C) {
        guest.load(Driver::C)?;
        let before = guest.memory_usage()?;
        let free = guest.free_blocks()?;
        let theirs = guest.hint_all()?.bytes;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory_uncompacted(before)?;
        guest.unload(Driver::C)?;
        println!(
            "free {}, in the largest blocks {}; the C driver hinted {theirs}",
            free.free_bytes_from_order(0),
            free.free_bytes_from_order(LARGEST)
        );
        ensure!(
            theirs * 100 < free.free_bytes_from_order(0) * 5,
            "the memory is not fragmented: {free:?}"
        );
    }
    for order in [0, 4, 6] {
        guest.load_with(Driver::Ours, &format!("hint_min_order={order}"))?;
        let before = guest.memory_usage()?;
        let free = guest.free_blocks()?;
        let hint_round = guest.hint_all()?;
        let large_enough = free.free_bytes_from_order(order);
        println!("order {order}: {large_enough} are free; {hint_round:?}");
        ensure!(
            hint_round.bytes * 100 >= large_enough * 80,
            "{hint_round:?} of {large_enough} bytes that were free in blocks of order {order} or more"
        );
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory_uncompacted(before)?;
        guest.unload(Driver::Ours)?;
    }
    for workload in workloads {
        let found = guest.call(Verify { workload })?;
        ensure!(found.wrong == 0 && found.pages > 0, "{found:?}");
    }
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn hinting_leaves_a_reserve_to_a_guest_in_user_mode_linux() -> Result<()> {
    hinting_leaves_a_reserve(Vmm::Uml)
}

#[test]
fn hinting_leaves_a_reserve_to_a_guest_in_qemu() -> Result<()> {
    hinting_leaves_a_reserve(Vmm::Qemu)
}

/// During hint rounds the guest keeps its reserve. A process that needs more memory gets it without the OOM killer.
fn hinting_leaves_a_reserve(vmm: Vmm) -> Result<()> {
    /// The part of the reserve that the guest's programs and the per-processor page lists may use meanwhile.
    const OWN_USE: u64 = 2 * MIB;
    /// How long each hint round keeps its blocks: while free memory is sampled, and while a process needs memory.
    const HOLD: Duration = Duration::from_millis(50);
    const LONG_HOLD: Duration = Duration::from_millis(500);
    const NEEDED: u64 = 100 * MIB;
    /// Sampling continues until both counts exceed these values.
    const HINT_ROUNDS: u64 = 2;
    const SAMPLES: u64 = 100;
    /// The minimum number of times that a process needs memory.
    const TIMES: u32 = 3;
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, vmm).kernel_arguments("init_on_alloc=0");
    let (mut guest, before) = builder.boot_filled(24 * MIB, Driver::Ours)?;
    let reserve = documented_reserve(&mut guest)?;

    let (lowest, hint_rounds) = guest.with_hint_rounds(HOLD, |guest, hint_rounds| {
        let mut attempts = Attempts::default();
        let mut lowest = guest.call(LowestMemFree { duration_ms: 1000 })?;
        while lowest.samples <= SAMPLES || hint_rounds.load(Relaxed) <= HINT_ROUNDS {
            let more = guest.call(LowestMemFree { duration_ms: 200 })?;
            lowest.free = lowest.free.min(more.free);
            lowest.samples += more.samples;
            let progress = lowest.samples.min(SAMPLES + 1) + hint_rounds.load(Relaxed);
            ensure!(
                attempts.may_retry(progress),
                "{lowest:?}, {hint_rounds:?} rounds"
            );
        }
        Ok(lowest)
    })?;
    let counters = guest.counters()?;
    println!("reserve {reserve}; {hint_rounds} rounds; {lowest:?}; {counters:?}");
    ensure!(
        counters.get("hint_reserve_pages")? * 4096 == reserve,
        "{reserve} bytes are the documented reserve, and not the driver's: {counters:?}"
    );
    ensure!(
        counters.get("hint_free_pages_low")? * 4096 >= reserve,
        "the driver took of the reserve of {reserve} bytes: {counters:?}"
    );
    ensure!(
        (reserve - OWN_USE..before.free / 2).contains(&lowest.free),
        "{} bytes were left of {before:?}, and {reserve} are the reserve",
        lowest.free
    );

    let alone = use_memory(&mut guest, NEEDED)?;
    // Repeats until the shrinker has reclaimed hinted blocks for a process. A process that gets no memory hangs, and
    // its call fails.
    let (worst, hint_rounds) = guest.with_hint_rounds(LONG_HOLD, |guest, hint_rounds| {
        let mut attempts = Attempts::default();
        let mut worst = Duration::ZERO;
        for time in 1.. {
            worst = worst.max(use_memory(guest, NEEDED)?);
            let reclaimed = guest.counters()?.get("returned_pages")?;
            if time >= TIMES && reclaimed > 0 && hint_rounds.load(Relaxed) > 0 {
                break;
            }
            ensure!(
                time < TIMES || attempts.may_retry(0),
                "{hint_rounds:?} rounds, {reclaimed} pages taken back"
            );
        }
        Ok(worst)
    })?;
    let reclaimed = guest.counters()?.get("returned_pages")?;
    println!("{NEEDED} bytes in {alone:?}, with {hint_rounds} rounds in {worst:?}; {reclaimed} pages taken back");
    guest.check_and_power_off(before)
}

/// Returns the documented default reserve in bytes. It is three times the sum of the high watermarks, but at most 1/20
/// and at least 1/64 of memory. It is at least the sum of the midpoints of the minimum and low watermarks, even above
/// 1/20. It is also at least the sum of the floors of the zones that hinting uses.
fn documented_reserve(guest: &mut Guest) -> Result<u64> {
    let page_size = guest.agent().hello().page_size;
    let zones = guest.zones()?.zones;
    let middle: u64 = zones.iter().map(|zone| (zone.min + zone.low) / 2).sum();
    let high: u64 = zones.iter().map(|zone| zone.high).sum();
    let usable = zones.iter().filter(|zone| zone.is_hintable());
    let floors: u64 = usable.map(ZoneInfo::hint_floor).sum();
    let total = guest.mem_info()?.total() / page_size;
    let reserve = (3 * high).min(total / 20).max(middle).max(total / 64);
    Ok(reserve.max(floors) * page_size)
}

/// Returns the time that a process needs to fill `bytes` of memory and verify them.
fn use_memory(guest: &mut Guest, bytes: u64) -> Result<Duration> {
    let start = Instant::now();
    let filled = guest.call(Fill {
        bytes,
        keep_every: 1,
        seed: 30,
    })?;
    let workload = filled.workload;
    let found = guest.call(Verify { workload })?;
    let took = start.elapsed();
    ensure!(found.wrong == 0 && found.pages == bytes / 4096, "{found:?}");
    guest.call(Free { workload })?;
    Ok(took)
}
