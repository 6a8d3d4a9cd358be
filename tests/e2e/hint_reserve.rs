// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the reserve that hinting leaves to the guest: its size, and its place among zones, NUMA nodes and CMA.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::attempts::Attempts;
use harness::calls::{Fill, Free, LowestMemFree, Verify};
use harness::guest::{Builder, Driver, Guest};
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::zones::ZoneInfo;
use harness::MIB;

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

/// Hinting leaves CMA free, so contiguous allocations can still use it during a hint round. Other free memory is
/// hinted.
#[test]
fn hinting_keeps_out_of_cma_in_qemu() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for driver in [Driver::C, Driver::Ours] {
        let builder = Builder::new(&artifacts, Vmm::Qemu)
            .memory(1024 * MIB)
            .kernel_arguments("cma=256M init_on_alloc=0");
        let (mut guest, before) = builder.boot_filled(128 * MIB, driver)?;
        let contiguous = guest.mem_info()?.field("CmaFree");
        let zones_before = guest.zones()?.zones;
        let hint_round = guest.hint_all()?;
        let while_hinted = guest.mem_info()?.field("CmaFree");
        let zones = guest.zones()?.zones;
        println!(
            "{driver:?}: CmaFree {contiguous}, then {while_hinted}; {} hinted of {before:?}\n{}\n{}",
            hint_round.bytes,
            summary(&zones_before),
            summary(&zones)
        );
        ensure!(
            contiguous > 250 * MIB,
            "only {contiguous} bytes of CMA were free"
        );
        ensure!(
            contiguous.abs_diff(while_hinted) < MIB,
            "{driver:?}: CmaFree fell from {contiguous} to {while_hinted}"
        );
        let hintable = (before.free - contiguous) / 10 * 8;
        ensure!(
            driver == Driver::C || hint_round.bytes > hintable,
            "only {} bytes were hinted of {} outside of CMA",
            hint_round.bytes,
            before.free - contiguous
        );
        guest.daemon()?.qmp().hint_done()?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

/// Half of memory is `ZONE_MOVABLE`, which hinting does not use. Hinting leaves each other zone its floor, and the
/// whole reserve in zones that serve kernel allocations.
#[test]
fn the_reserve_is_where_the_kernel_can_use_it_in_qemu() -> Result<()> {
    const FILES: u32 = 15_000;
    /// Pages of the reserve that the guest's programs may use.
    const OWN_USE: u64 = 2 * MIB / 4096;
    let artifacts = Artifacts::load()?;
    for driver in [Driver::C, Driver::Ours] {
        let builder = Builder::new(&artifacts, Vmm::Qemu)
            .memory(1024 * MIB)
            .kernel_arguments("movablecore=512M");
        let (mut guest, before) = builder.boot_filled(128 * MIB, driver)?;
        let zones = guest.zones()?.zones;
        let hint_round = guest.hint_all()?;
        let while_hinted = guest.zones()?.zones;
        let events = guest.vmstat_counters()?;
        let start = Instant::now();
        let make = format!("mkdir /tmp/files && cd /tmp/files && seq 1 {FILES} | xargs touch");
        guest.shell(&make)?;
        let took = start.elapsed();
        let events_after = guest.vmstat_counters()?;
        println!(
            "{driver:?}: {} hinted of {before:?}; {FILES} files in {took:?}\nbefore {}\nheld   {}\nafter  {}",
            hint_round.bytes,
            summary(&zones),
            summary(&while_hinted),
            summary(&guest.zones()?.zones)
        );
        // Printed for information: the number of stalls depends on the scheduling of kswapd.
        for (name, count) in &events_after {
            let more = count.saturating_sub(events.get(name).copied().unwrap_or_default());
            let tells = ["allocstall", "scan", "kswapd"]
                .iter()
                .any(|part| name.contains(part));
            if more > 0 && tells {
                println!("  {name} {more}");
            }
        }
        if driver == Driver::Ours {
            let movable = zone(&while_hinted, "Movable")?;
            ensure!(
                movable.free + 1024 >= zone(&zones, "Movable")?.free,
                "movable pages were hinted: {while_hinted:?}"
            );
            check_reserves(&while_hinted)?;
            // The reserve must be in zones that serve kernel allocations.
            let reserve = guest.counters()?.get("hint_reserve_pages")?;
            let usable = while_hinted.iter().filter(|zone| zone.is_hintable());
            let left: u64 = usable
                .map(|zone| zone.free_for_kernel() + zone.pcp_pages)
                .sum();
            ensure!(
                left + OWN_USE >= reserve,
                "the reserve is {reserve} pages, and {left} are left that the kernel can use: {while_hinted:?}"
            );
        }
        guest.shell("rm -r /tmp/files")?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

/// With two NUMA nodes, each node keeps its part of the reserve.
#[test]
fn no_node_is_emptied_in_qemu() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for driver in [Driver::C, Driver::Ours] {
        let builder = Builder::new(&artifacts, Vmm::Qemu)
            .memory(1024 * MIB)
            .hardware(Hardware {
                numa_nodes: 2,
                ..Hardware::default()
            });
        let (mut guest, before) = builder.boot_filled(128 * MIB, driver)?;
        let zones = guest.zones()?.zones;
        let hint_round = guest.hint_all()?;
        let while_hinted = guest.zones()?.zones;
        println!(
            "{driver:?}: {} hinted of {before:?}\nbefore {}\nheld   {}",
            hint_round.bytes,
            summary(&zones),
            summary(&while_hinted)
        );
        if driver == Driver::Ours {
            check_reserves(&while_hinted)?;
            let total: u64 = while_hinted.iter().map(|zone| zone.managed).sum();
            for node in [0, 1] {
                let of_node = || while_hinted.iter().filter(|zone| zone.node == node);
                let free: u64 = of_node().map(ZoneInfo::free_for_kernel).sum();
                let managed: u64 = of_node().map(|zone| zone.managed).sum();
                // The reserve is at least 1/64 of memory.
                ensure!(
                    managed > total / 3 && free >= managed / 64,
                    "node {node} has {free} pages left of {managed}: {while_hinted:?}"
                );
            }
            ensure!(
                hint_round.bytes >= before.free / 10 * 8,
                "{hint_round:?} of {before:?}"
            );
        }
        guest.daemon()?.qmp().hint_done()?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

fn summary(zones: &[ZoneInfo]) -> String {
    let one = |zone: &ZoneInfo| {
        format!(
            "{}:{} free {} (CMA {}), min {} low {} high {} managed {} reserve {:?}; ",
            zone.node,
            zone.name,
            zone.free,
            zone.free_cma,
            zone.min,
            zone.low,
            zone.high,
            zone.managed,
            zone.lowmem_reserve
        )
    };
    zones.iter().map(one).collect()
}

/// Returns the zone with this name, of the first node that has one.
fn zone<'a>(zones: &'a [ZoneInfo], name: &str) -> Result<&'a ZoneInfo> {
    let found = zones.iter().find(|zone| zone.name == name);
    found.with_context(|| format!("there is no zone {name}: {zones:?}"))
}

/// Fails unless each zone that hinting uses keeps its floor: the midpoint of its minimum and low watermarks, plus its
/// `lowmem_reserve` against allocations that could use a higher zone.
fn check_reserves(zones: &[ZoneInfo]) -> Result<()> {
    /// The tolerance in pages, for the drift of per-processor counters and the guest's own programs.
    const OWN_USE: u64 = 200;
    for zone in zones.iter().filter(|zone| zone.is_hintable()) {
        ensure!(
            zone.free_for_kernel() + OWN_USE >= zone.hint_floor(),
            "{} pages should have been left of {zone:?}",
            zone.hint_floor()
        );
    }
    Ok(())
}
