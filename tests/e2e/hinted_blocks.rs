// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests what the guest and its kernel can still do while the driver keeps hinted blocks.

use std::fs::File;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, PageUse, Run, Verify, WriteFile};
use harness::guest::{Builder, Driver, Guest};
use harness::ranges::{PhysicalRange, RangeSet};
use harness::scratch::Scratch;
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::zones::ZoneInfo;
use harness::{HANG_TIMEOUT, MIB};

/// Runs a shell script in the guest and returns its output.
fn shell(guest: &mut Guest, script: &str) -> Result<String> {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let done = guest.call(Run { argv })?;
    ensure!(done.status == Some(0), "{script}: {done:?}");
    Ok(done.stdout)
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
        shell(&mut guest, &make)?;
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
        shell(&mut guest, "rm -r /tmp/files")?;
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

/// Hibernates the guest and resumes it at once, during a hint round and with an inflated balloon, for each way in which
/// a kernel initialises memory. Afterwards the guest has its data, its balloon and its counters.
#[test]
fn a_guest_in_qemu_is_hibernated_while_blocks_are_hinted() -> Result<()> {
    for arguments in ["init_on_alloc=1", "init_on_alloc=0 init_on_free=1"] {
        hibernated(Driver::Ours, arguments).context(arguments)?;
    }
    Ok(())
}

fn hibernated(driver: Driver, arguments: &str) -> Result<()> {
    const SWAP: u64 = 1024 * MIB;
    const KEPT: u64 = 64 * MIB;
    const INFLATED: u64 = 64 * MIB;
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let disk = scratch.path("disk");
    File::create(&disk)?.set_len(SWAP)?;
    let drive = format!("if=none,id=disk,format=raw,file={}", disk.display());
    let features = ["stats", "free-page-hint", "page-poison"];
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .features(&features)
        .suspendable()
        .kernel_arguments(arguments)
        .hardware(Hardware {
            arguments: ["-drive", &drive, "-device", "nvme,drive=disk,serial=disk"]
                .map(str::to_owned)
                .to_vec(),
            ..Hardware::default()
        })
        .boot()?;
    shell(&mut guest, "mkswap /dev/nvme0n1 && swapon /dev/nvme0n1")?;
    guest.load(driver)?;
    let data = guest.call(Fill {
        bytes: KEPT,
        keep_every: 1,
        seed: 40,
    })?;
    guest.fill_and_free(96 * MIB, 41)?;
    let before = guest.settled_memory_usage()?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let target = whole - INFLATED;
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    let hint_round = guest.hint_all()?;
    println!(
        "{driver:?}, {arguments}: {} hinted of {before:?}",
        hint_round.bytes
    );
    guest.call(WriteFile {
        path: "/sys/power/disk".to_owned(),
        text: "test_resume".to_owned(),
    })?;
    let slept = WriteFile {
        path: "/sys/power/state".to_owned(),
        text: "disk".to_owned(),
    };
    let start = Instant::now();
    guest.agent().call_within(slept, HANG_TIMEOUT)?;
    println!("hibernated and woken in {:?}", start.elapsed());
    guest.wait_balloon_after_reload(target, HANG_TIMEOUT)?;
    let found = guest.call(Verify {
        workload: data.workload,
    })?;
    ensure!(found.wrong == 0 && found.pages == KEPT / 4096, "{found:?}");
    if driver == Driver::Ours {
        let counters = guest.counters()?;
        ensure!(
            counters.get("balloon_pages")? == INFLATED / 4096,
            "{counters:?}"
        );
    }
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory(before)?;
    let hinted = guest.hint_all()?.bytes;
    ensure!(
        hinted >= before.free / 10 * 6,
        "{hinted} of {before:?} were hinted"
    );
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory(before)?;
    guest.call(Free {
        workload: data.workload,
    })?;
    guest.kill()?;
    Ok(())
}

/// Memory that can be unplugged is hinted, and its memory blocks go offline during the hint round.
#[test]
fn memory_with_hinted_blocks_goes_offline_in_qemu() -> Result<()> {
    const PLUGGED: u64 = 512 * MIB;
    const FOLDER: &str = "/sys/devices/system/memory";
    let artifacts = Artifacts::load()?;
    let backend = format!("memory-backend-memfd,id=dimm,size={PLUGGED},share=on");
    let arguments = ["-object", &backend, "-device", "pc-dimm,memdev=dimm"];
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .kernel_arguments("memhp_default_state=online_kernel")
        .hardware(Hardware {
            hotplug_memory: 1024 * MIB,
            arguments: arguments.map(str::to_owned).to_vec(),
            ..Hardware::default()
        })
        .boot()?;
    guest.load(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    let hint_round = guest.hint_all()?;
    println!("{} hinted of {before:?}", hint_round.bytes);
    let list = format!("cd {FOLDER} && grep -l Normal */valid_zones && cat block_size_bytes");
    let listed = shell(&mut guest, &list)?;
    let mut memory_blocks: Vec<&str> = listed.split_whitespace().collect();
    let size = memory_blocks
        .pop()
        .context("no size of a block of memory")?;
    let size = u64::from_str_radix(size, 16)?;
    ensure!(
        memory_blocks.len() as u64 == PLUGGED / size,
        "{memory_blocks:?}"
    );
    let pages = guest.call(PageUse {})?;
    let mut expected = 0;
    for memory_block in memory_blocks {
        let memory_block = memory_block.trim_end_matches("/valid_zones");
        let number: u64 = memory_block.trim_start_matches("memory").parse()?;
        let range = PhysicalRange {
            start: number * size,
            length: size,
        };
        let range = RangeSet::from(vec![range]);
        let hinted = pages.ballooned.intersection(&range).bytes();
        let free = pages.free.intersection(&range).bytes();
        println!("{memory_block}: {hinted} of {size} bytes are hinted, {free} free");
        // A memory block with other kernel allocations in it cannot go offline.
        if hinted + free < size {
            continue;
        }
        expected += u64::from(hinted > size / 2);
        for text in ["offline", "online_kernel"] {
            let path = format!("{FOLDER}/{memory_block}/state");
            let text = text.to_owned();
            guest
                .call(WriteFile { path, text })
                .with_context(|| format!("{memory_block} has hinted and free pages only"))?;
        }
    }
    ensure!(
        expected > 0,
        "no block of memory had hinted and free pages only"
    );
    guest.daemon()?.qmp().hint_done()?;
    guest.check_and_power_off(before)
}

/// The shrinker reclaims hinted blocks for a process that needs memory. A kernel with `init_on_alloc`, as Debian's,
/// clears pages when it allocates them, so the driver does not. For other kernels the driver clears the pages before it
/// frees them.
#[test]
fn pages_are_cleared_once_in_qemu() -> Result<()> {
    const NEEDED: u64 = 100 * MIB;
    let artifacts = Artifacts::load()?;
    for (arguments, driver) in [
        ("init_on_alloc=1", Driver::C),
        ("init_on_alloc=1", Driver::Ours),
        ("init_on_alloc=0", Driver::C),
        ("init_on_alloc=0", Driver::Ours),
    ] {
        let builder = Builder::new(&artifacts, Vmm::Qemu).kernel_arguments(arguments);
        let (mut guest, before) = builder.boot_filled(64 * MIB, driver)?;
        guest.hint_all()?;
        let events = guest.vmstat_counters()?;
        let start = Instant::now();
        let filled = guest.call(Fill {
            bytes: NEEDED,
            keep_every: 1,
            seed: 42,
        })?;
        let took = start.elapsed();
        let after = guest.vmstat_counters()?;
        let more = |name: &str| {
            let count = |events: &std::collections::BTreeMap<String, u64>| {
                let counts = events.iter().filter(|(key, _)| key.starts_with(name));
                counts.map(|(_, count)| count).sum::<u64>()
            };
            count(&after).saturating_sub(count(&events))
        };
        println!(
            "{driver:?}, {arguments}: {NEEDED} bytes in {took:?}, {} stalls, {} scanned",
            more("allocstall"),
            more("slabs_scanned")
        );
        if driver == Driver::Ours {
            // The counters are not read atomically, and pages may be reclaimed meanwhile.
            let deadline = Instant::now() + HANG_TIMEOUT;
            let reclaimed = loop {
                let counters = guest.counters()?;
                let (reclaimed, zeroed) = (
                    counters.get("returned_pages")?,
                    counters.get("zeroed_pages")?,
                );
                let wanted = if arguments.ends_with('1') {
                    0
                } else {
                    reclaimed
                };
                if zeroed == wanted {
                    println!("{reclaimed} pages went back, {zeroed} were cleared");
                    break reclaimed;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{zeroed} pages were cleared of {reclaimed}"
                );
                sleep(Duration::from_millis(20));
            };
            ensure!(
                reclaimed > NEEDED / 4096 / 2,
                "only {reclaimed} pages went back"
            );
        }
        let workload = filled.workload;
        let found = guest.call(Verify { workload })?;
        ensure!(
            found.wrong == 0 && found.pages == NEEDED / 4096,
            "{found:?}"
        );
        guest.call(Free { workload })?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}
