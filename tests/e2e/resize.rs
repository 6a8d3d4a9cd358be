// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the balloon when memory is short or fragmented: OOM deflation, page migration and MUST_TELL_HOST.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{
    DropCachesAndCompact, Fill, Free, PageUse, ReadFile, Release, ReleaseLowest, Run, Verify,
    WriteFile,
};
use harness::check::MemoryUsage;
use harness::guest::{Builder, Driver, Guest, DEFAULT_HOST_TIMEOUT};
use harness::process::Signal;
use harness::ranges::{PhysicalRange, RangeSet};
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// Memory that the balloon leaves free.
const LEFT: u64 = 64 * MIB;
/// Memory that a process needs then.
const WANTED: u64 = 128 * MIB;

/// Inflates the balloon until `left` bytes are free. Returns the target, the size of the guest with this balloon.
fn inflate_leaving(guest: &mut Guest, left: u64) -> Result<u64> {
    let before = guest.settled_memory_usage()?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let target = (whole - before.free.saturating_sub(left)) / MIB * MIB;
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    Ok(target)
}

fn fill(bytes: u64, keep_every: u64, seed: u64) -> Fill {
    Fill {
        bytes,
        keep_every,
        seed,
    }
}

#[test]
fn our_balloon_deflates_on_oom_in_user_mode_linux() -> Result<()> {
    deflates_on_oom(Vmm::Uml, Driver::Ours, &["stats", "deflate-on-oom"])
}

#[test]
fn our_balloon_deflates_on_oom_when_the_host_must_be_told_in_user_mode_linux() -> Result<()> {
    let features = ["stats", "deflate-on-oom", "must-tell-host"];
    deflates_on_oom(Vmm::Uml, Driver::Ours, &features)
}

#[test]
fn our_balloon_deflates_on_oom_in_qemu() -> Result<()> {
    deflates_on_oom(Vmm::Qemu, Driver::Ours, &["stats", "deflate-on-oom"])
}

#[test]
fn the_c_drivers_balloon_deflates_on_oom_in_user_mode_linux() -> Result<()> {
    deflates_on_oom(Vmm::Uml, Driver::C, &["stats", "deflate-on-oom"])
}

/// With DEFLATE_ON_OOM a process gets memory from the balloon that it could not get otherwise, and keeps it.
fn deflates_on_oom(vmm: Vmm, driver: Driver, features: &[&str]) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm).features(features).boot()?;
    let before = guest.settled_memory_usage()?;
    let managed = guest.mem_info()?.total();
    guest.load(driver)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let target = inflate_leaving(&mut guest, LEFT)?;
    // With DEFLATE_ON_OOM the kernel counts the balloon's pages as memory of the guest.
    let total = guest.mem_info()?.total();
    ensure!(
        total >= managed - MIB,
        "{total} of {managed} bytes are left"
    );

    let filled = guest.call(fill(WANTED, 1, 3))?;
    let verified = guest.call(Verify {
        workload: filled.workload,
    })?;
    ensure!(
        verified.pages == WANTED / 4096 && verified.wrong == 0,
        "{verified:?}"
    );
    ensure!(
        guest.vmstat_counter("oom_kill")? == 0,
        "somebody was killed"
    );
    // The driver updates `actual` after the process has its memory.
    let enough = target + (WANTED - LEFT) / 2;
    let actual = guest.balloon_qmp()?.wait_balloon_at_least(enough)?;
    if driver == Driver::Ours {
        let counters = guest.counters()?;
        let given = counters.get("oom_deflated_pages")? * 4096;
        ensure!(counters.get("oom_deflations")? > 0, "{counters:?}");
        ensure!(actual <= target + given, "{actual}, {target}: {counters:?}");
        // While memory is short the balloon does not inflate again. Once memory is free, it does.
        let still = guest.balloon_qmp()?.balloon_actual()?;
        ensure!(still >= actual, "{still} after {actual}");
        guest.call(Free {
            workload: filled.workload,
        })?;
        guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    } else {
        guest.call(Free {
            workload: filled.workload,
        })?;
    }
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

#[test]
fn a_balloon_without_deflate_on_oom_does_not_deflate() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let mut guest = Builder::new(&artifacts, Vmm::Uml)
            .features(&["stats"])
            .boot()?;
        let before = guest.settled_memory_usage()?;
        guest.load(driver)?;
        let target = inflate_leaving(&mut guest, LEFT)?;
        // With overcommit the kernel detects the shortage only when the process uses the memory.
        guest.call(WriteFile {
            path: "/proc/sys/vm/overcommit_memory".to_owned(),
            text: "1".to_owned(),
        })?;
        let error = guest.call(fill(WANTED, 1, 3)).err();
        let error = error.context("a process has memory that is not there")?;
        ensure!(format!("{error:#}").contains("is gone"), "{error:#}");
        ensure!(guest.vmstat_counter("oom_kill")? > 0, "{driver:?}: no kill");
        let actual = guest.balloon_qmp()?.balloon_actual()?;
        ensure!(actual == target, "{driver:?}: {actual} is not {target}");
        guest.unload(driver)?;
        guest.check_memory(before)?;
        guest.power_off()?;
    }
    Ok(())
}

#[test]
fn our_balloon_inflates_out_of_hinted_blocks_in_user_mode_linux() -> Result<()> {
    inflates_out_of_hinted_blocks(Vmm::Uml)
}

#[test]
fn our_balloon_inflates_out_of_hinted_blocks_in_qemu() -> Result<()> {
    inflates_out_of_hinted_blocks(Vmm::Qemu)
}

/// Hinted blocks are unused free memory: the balloon inflates out of them without a shortage and before DONE.
fn inflates_out_of_hinted_blocks(vmm: Vmm) -> Result<()> {
    const BEYOND_FREE: u64 = 64 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm).boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let hint_round = guest.hint_all()?;
    // More than the page allocator has free.
    let by = (guest.mem_info()?.free() + BEYOND_FREE) / MIB * MIB;
    ensure!(by <= hint_round.bytes, "only {hint_round:?} for {by}");
    let since = Instant::now();
    guest.balloon_qmp()?.set_balloon(whole - by)?;
    guest
        .balloon_qmp()?
        .wait_balloon(whole - by, HANG_TIMEOUT)?;
    println!("{by} bytes in {:?} in {vmm:?}", since.elapsed());
    let counters = guest.counters()?;
    ensure!(counters.get("shortages")? == 0, "{counters:?}");
    let inflated = counters.get("hinted_pages_inflated")? * 4096;
    ensure!(inflated >= BEYOND_FREE, "{counters:?}");
    let log = guest.kernel_log()?;
    ensure!(
        !log.iter().any(|line| line.text.contains("puff")),
        "{log:?}"
    );

    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory(before)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}

#[test]
fn our_balloon_comes_back_from_a_target_out_of_reach_in_user_mode_linux() -> Result<()> {
    balloon_comes_back(Vmm::Uml, Driver::Ours)
}

#[test]
fn our_balloon_comes_back_from_a_target_out_of_reach_in_qemu() -> Result<()> {
    balloon_comes_back(Vmm::Qemu, Driver::Ours)
}

#[test]
fn the_c_drivers_balloon_comes_back_from_a_target_out_of_reach_in_qemu() -> Result<()> {
    balloon_comes_back(Vmm::Qemu, Driver::C)
}

/// When the host withdraws a target that is out of reach, the guest gets all of its memory back. Prints how long that
/// takes. `VIRTIO_BALLOON_RS_TIMES` sets the number of attempts.
fn balloon_comes_back(vmm: Vmm, driver: Driver) -> Result<()> {
    const TIMES: u32 = 4;
    const OUT_OF_REACH: u64 = 8 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm).boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(driver)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let times = std::env::var("VIRTIO_BALLOON_RS_TIMES").ok();
    let times = times.map_or(Ok(vmm.repeats(TIMES)), |times| times.parse())?;
    let mut longest = Duration::ZERO;
    for _ in 0..times {
        if driver == Driver::Ours {
            let before = guest.counters()?.get("shortages")?;
            guest.balloon_qmp()?.set_balloon(OUT_OF_REACH)?;
            guest.wait_counter("shortages", before + 1, HANG_TIMEOUT)?;
        } else {
            guest.kernel_log()?;
            guest.balloon_qmp()?.set_balloon(OUT_OF_REACH)?;
            guest.wait_kernel_log("Out of puff", HANG_TIMEOUT)?;
        }
        let since = Instant::now();
        guest.balloon_qmp()?.set_balloon(whole)?;
        guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
        longest = longest.max(since.elapsed());
    }
    println!("{driver:?} in {vmm:?}: back within {longest:?}, {times} times");
    guest.check_memory(before)?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

#[test]
fn our_balloon_keeps_what_a_bound_process_cannot_use_in_qemu() -> Result<()> {
    balloon_keeps_other_nodes(Driver::Ours)
}

/// Returns the number of balloon pages on a node.
fn ballooned_on(guest: &mut Guest, node: u32) -> Result<u64> {
    // Folds the per-processor counters.
    guest.vmstat_counter("nr_balloon_pages")?;
    let path = format!("/sys/devices/system/node/node{node}/vmstat");
    let text = guest.call(ReadFile { path })?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("nr_balloon_pages "));
    Ok(value
        .context("the kernel counts no balloon pages")?
        .parse()?)
}

/// A process that a cpuset binds to one node gets the balloon pages of that node before the OOM killer runs. The
/// balloon pages of the other node stay in the balloon.
fn balloon_keeps_other_nodes(driver: Driver) -> Result<()> {
    const NODE: u64 = 384 * MIB;
    const CPUSET: &str = "mkdir -p /cgroup && mount -t cgroup2 none /cgroup && echo +cpuset >/cgroup/cgroup.subtree_control \
        && mkdir /cgroup/bound && echo 0 >/cgroup/bound/cpuset.mems && echo 1 >/cgroup/bound/cgroup.procs";
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .features(&["stats", "deflate-on-oom"])
        .memory(2 * NODE)
        .hardware(Hardware {
            numa_nodes: 2,
            ..Hardware::default()
        })
        .boot()?;
    guest.load(driver)?;
    let before = guest.settled_memory_usage()?;
    inflate_leaving(&mut guest, before.free / 4)?;
    let before = [ballooned_on(&mut guest, 0)?, ballooned_on(&mut guest, 1)?];
    ensure!(before[0] > 0 && before[1] > 0, "pages by node: {before:?}");
    let argv = ["sh", "-c", CPUSET].map(str::to_owned).to_vec();
    let run = guest.call(Run { argv })?;
    ensure!(run.status == Some(0), "{run:?}");
    // More memory than the node has.
    let error = guest.call(fill(NODE, 1, 3)).err();
    let error = error.context("a process has memory that is not there")?;
    ensure!(format!("{error:#}").contains("is gone"), "{error:#}");
    ensure!(guest.vmstat_counter("oom_kill")? > 0, "nobody was killed");
    let after = [ballooned_on(&mut guest, 0)?, ballooned_on(&mut guest, 1)?];
    println!("{driver:?}: balloon pages by node: {before:?}, then {after:?}");
    ensure!(
        after[1] > before[1] / 2,
        "balloon pages by node: {before:?}, then {after:?}"
    );
    if driver == Driver::Ours {
        let given = guest.counters()?.get("oom_deflated_pages")?;
        ensure!(given >= before[0] / 2, "{given} of {before:?}");
    }
    guest.power_off()?;
    Ok(())
}

/// Memory of one node goes offline, and the balloon pages in it migrate to the other node. They count for that node
/// afterwards, so OOM deflation finds them.
#[test]
fn balloon_pages_that_migrate_to_another_node_count_there_in_qemu() -> Result<()> {
    const NODE: u64 = 384 * MIB;
    const BOUND: &str = "mkdir -p /cgroup && mount -t cgroup2 none /cgroup && echo +cpuset >/cgroup/cgroup.subtree_control \
        && mkdir /cgroup/bound && echo 0 >/cgroup/bound/cpuset.mems && echo 1 >/cgroup/bound/cgroup.procs";
    const OFFLINE: &str = "for block in /sys/devices/system/node/node1/memory[0-9]*; do \
        echo offline 2>/dev/null >$block/state; done; true";
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .features(&["stats"])
        .memory(2 * NODE)
        .exact_memory()
        .hardware(Hardware {
            numa_nodes: 2,
            ..Hardware::default()
        })
        .boot()?;
    guest.load(Driver::Ours)?;
    let bind = guest.call(Run {
        argv: ["sh", "-c", BOUND].map(str::to_owned).to_vec(),
    })?;
    ensure!(bind.status == Some(0), "{bind:?}");
    // A process uses half of node 0 while the balloon inflates. Its memory is free afterwards and can take the pages of
    // node 1.
    let filled = guest.call(fill(NODE / 2, 1, 3))?;
    inflate_leaving(&mut guest, NODE / 2)?;
    guest.call(Free {
        workload: filled.workload,
    })?;
    let before = [ballooned_on(&mut guest, 0)?, ballooned_on(&mut guest, 1)?];
    let offline = guest.call(Run {
        argv: ["sh", "-c", OFFLINE].map(str::to_owned).to_vec(),
    })?;
    ensure!(offline.status == Some(0), "{offline:?}");
    let after = [ballooned_on(&mut guest, 0)?, ballooned_on(&mut guest, 1)?];
    let ballooned = guest.call(PageUse {})?.ballooned;
    let first: RangeSet = [PhysicalRange {
        start: 0,
        length: NODE,
    }]
    .into_iter()
    .collect();
    let lie = [
        ballooned.intersection(&first).bytes() / 4096,
        ballooned.difference(&first).bytes() / 4096,
    ];
    println!("balloon pages by node: {before:?}, then {after:?}, which lie on {lie:?}");
    ensure!(after[0] > before[0], "no page has moved to the first node");
    ensure!(after == lie, "{after:?} are counted, and {lie:?} are there");
    guest.unload(Driver::Ours)?;
    let after = [ballooned_on(&mut guest, 0)?, ballooned_on(&mut guest, 1)?];
    ensure!(after == [0, 0], "of no balloon {after:?} pages are counted");
    // The kernel log is not checked: it describes each page that kept memory online.
    guest.power_off()?;
    Ok(())
}

#[test]
fn our_balloons_pages_are_migrated_in_user_mode_linux() -> Result<()> {
    pages_are_migrated(Vmm::Uml, Driver::Ours, &["stats"])
}

#[test]
fn our_balloons_pages_are_migrated_when_the_host_must_be_told_in_user_mode_linux() -> Result<()> {
    pages_are_migrated(Vmm::Uml, Driver::Ours, &["stats", "must-tell-host"])
}

#[test]
fn our_balloons_pages_are_migrated_in_qemu() -> Result<()> {
    pages_are_migrated(Vmm::Qemu, Driver::Ours, &["stats"])
}

#[test]
fn the_c_drivers_balloons_pages_are_migrated_in_user_mode_linux() -> Result<()> {
    pages_are_migrated(Vmm::Uml, Driver::C, &["stats"])
}

#[test]
fn the_c_drivers_balloons_pages_are_migrated_in_qemu() -> Result<()> {
    pages_are_migrated(Vmm::Qemu, Driver::C, &["stats"])
}

/// The size of the balloon whose pages are migrated.
const BALLOON: u64 = 40 * MIB;
/// Memory that the guest keeps free meanwhile.
const SPARE: u64 = 24 * MIB;

/// Inflates a fragmented balloon: single pages, with single free pages in between. Returns the size of the guest before
/// and after.
fn inflate_fragmented(guest: &mut Guest, free: u64) -> Result<(u64, u64)> {
    // Compaction migrates pages only to places with used pages nearby.
    let spread = guest.call(fill(free - SPARE, 128, 6))?;
    guest.call(Release {
        workload: spread.workload,
    })?;
    // In the lower part of memory every other page becomes free, and the balloon takes these pages. Then the rest
    // becomes free. Compaction migrates pages from low to high addresses.
    let pieces = guest.call(fill(free - 2 * SPARE, 2, 5))?;
    guest.call(ReleaseLowest {
        workload: pieces.workload,
        pages: BALLOON / 4096,
    })?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let target = whole - BALLOON;
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    guest.call(Free {
        workload: pieces.workload,
    })?;
    Ok((whole, target))
}

fn compact(guest: &mut Guest) -> Result<()> {
    guest.call(WriteFile {
        path: "/proc/sys/vm/compact_memory".to_owned(),
        text: "1".to_owned(),
    })
}

/// Compacts until the kernel has migrated `migrated` balloon pages in all, and returns how many it has migrated. A page
/// that the device does not answer for in time is left to the next compaction.
fn compact_until(guest: &mut Guest, migrated: u64) -> Result<u64> {
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        compact(guest)?;
        let now = guest.vmstat_counter("balloon_migrate")?;
        if now >= migrated {
            return Ok(now);
        }
        ensure!(
            Instant::now() < deadline,
            "{now} pages were moved, and not {migrated}"
        );
    }
}

/// Compaction migrates the pages of a fragmented balloon, and the host gets the memory of their new locations.
fn pages_are_migrated(vmm: Vmm, driver: Driver, features: &[&str]) -> Result<()> {
    let artifacts = Artifacts::load()?;
    /// The minimum number of migrated pages. Nearly all of the balloon's 10240 pages are where compaction migrates
    /// from.
    const ENOUGH: u64 = 2000;
    // User-mode Linux maps each fragment with a host mapping, and a process may have only 65530, so memory is small.
    let mut guest = Builder::new(&artifacts, vmm)
        .features(features)
        .memory(256 * MIB)
        .exact_memory()
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(driver)?;
    let (whole, target) = inflate_fragmented(&mut guest, before.free)?;
    let kept = guest.call(fill(16 * MIB, 1, 6))?;

    let migrated_before = guest.vmstat_counter("balloon_migrate")?;
    let in_use = guest.host_memory_in_use()?;
    let migrated = compact_until(&mut guest, migrated_before + ENOUGH)? - migrated_before;
    println!("{driver:?} in {vmm:?}: {migrated} pages moved");
    // The new locations had contents, which the device has discarded. The old locations have none yet.
    let got = in_use.saturating_sub(guest.host_memory_in_use()?);
    ensure!(
        got >= migrated * 4096 / 2,
        "the host got {got} bytes for {migrated} pages"
    );
    let actual = guest.balloon_qmp()?.balloon_actual()?;
    ensure!(actual == target, "{actual} is not {target}");
    if driver == Driver::Ours {
        let counters = guest.counters()?;
        ensure!(
            counters.get("migrated_pages")? >= migrated
                && counters.get("balloon_pages")? == BALLOON / 4096,
            "{counters:?}"
        );
    }

    // The pages migrated only to free locations, and the balloon has as many pages as before.
    let verified = guest.call(Verify {
        workload: kept.workload,
    })?;
    ensure!(verified.wrong == 0, "{verified:?}");
    guest.call(Free {
        workload: kept.workload,
    })?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.check_memory(before)?;
    ensure!(
        guest.vmstat_counter("nr_balloon_pages")? == 0,
        "the kernel still counts pages in the balloon"
    );
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

#[test]
fn the_host_is_told_when_it_must_be_in_user_mode_linux() -> Result<()> {
    host_is_told(Vmm::Uml)
}

#[test]
fn the_host_is_told_when_it_must_be_in_qemu() -> Result<()> {
    host_is_told(Vmm::Qemu)
}

/// The driver accepts MUST_TELL_HOST, and a process that fills pages from the balloon finds none of them changed.
fn host_is_told(vmm: Vmm) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm)
        .features(&["stats", "must-tell-host"])
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let status = guest.daemon()?.virtio_status()?;
    ensure!(
        status
            .negotiated_features
            .iter()
            .any(|name| name == "must-tell-host"),
        "{status:?}"
    );
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    for seed in 0..3 {
        inflate_leaving(&mut guest, LEFT)?;
        guest.balloon_qmp()?.set_balloon(whole)?;
        // Starts while the balloon deflates, and uses pages that have left it.
        guest.call(DropCachesAndCompact {})?;
        let filled = guest.call(fill(LEFT / 2, 1, seed))?;
        guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
        let more = guest.call(fill(2 * WANTED, 1, seed + 10))?;
        for workload in [filled.workload, more.workload] {
            let verified = guest.call(Verify { workload })?;
            ensure!(verified.wrong == 0, "{verified:?}");
            guest.call(Free { workload })?;
        }
    }
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}

/// Stops the daemon, but not while user-mode Linux waits for its answer to a configuration write. That would stop the
/// whole guest, whose kernel has one thread. While the agent answers, no such write is in progress. The guest starts
/// none unless the device sends something.
fn stop_device(guest: &mut Guest) -> Result<()> {
    guest.mem_info()?;
    guest.daemon()?.process().stop()
}

fn continue_device(guest: &mut Guest) -> Result<()> {
    guest.daemon()?.process().signal(Signal::SIGCONT)
}

#[test]
fn compaction_ends_when_the_device_does_not_answer() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .features(&["stats"])
        .memory(256 * MIB)
        .exact_memory()
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load_with(Driver::Ours, DEFAULT_HOST_TIMEOUT)?;
    let (whole, target) = inflate_fragmented(&mut guest, before.free)?;

    stop_device(&mut guest)?;
    // The first compaction uses the answers that the device gave before it was stopped. Neither compaction would end if
    // the driver waited for the device without a timeout.
    let since = Instant::now();
    compact(&mut guest)?;
    let first = since.elapsed();
    let migrated = guest.vmstat_counter("balloon_migrate")?;
    compact(&mut guest)?;
    println!(
        "compaction took {first:?}, then {:?}",
        since.elapsed() - first
    );
    let now = guest.vmstat_counter("balloon_migrate")?;
    ensure!(
        now == migrated,
        "{} pages were moved by nobody",
        now - migrated
    );
    let pages = guest.counters()?.get("balloon_pages")?;
    ensure!(pages == BALLOON / 4096, "{pages} pages are in the balloon");

    // The device answers again, and the driver gets back the pages of abandoned migrations. All works as before.
    continue_device(&mut guest)?;
    guest.balloon_qmp()?.set_balloon(target - MIB)?;
    guest
        .balloon_qmp()?
        .wait_balloon(target - MIB, HANG_TIMEOUT)?;
    compact_until(&mut guest, migrated + 1)?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.check_memory(before)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}

/// Boots a guest whose driver must tell the host before it reuses pages, and inflates the balloon until [`LEFT`] bytes
/// are free. Returns the guest, its memory usage before, and its size without a balloon.
fn guest_without_memory(parameters: &str) -> Result<(Guest, MemoryUsage, u64)> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .features(&["stats", "deflate-on-oom", "must-tell-host"])
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load_with(Driver::Ours, parameters)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    inflate_leaving(&mut guest, LEFT)?;
    Ok((guest, before, whole))
}

#[test]
fn a_process_without_memory_does_not_wait_for_ever_for_the_device() -> Result<()> {
    let (mut guest, before, whole) = guest_without_memory(DEFAULT_HOST_TIMEOUT)?;

    stop_device(&mut guest)?;
    let filled = guest.call(fill(WANTED, 1, 3));
    ensure!(filled.is_err(), "it has memory that the host did not give");
    ensure!(guest.vmstat_counter("oom_kill")? > 0, "nobody was killed");

    continue_device(&mut guest)?;
    // The next OOM deflation starts only after the device has acknowledged the last one. There was none if the process
    // waited for page migration.
    if guest.counters()?.get("oom_deflations")? > 0 {
        guest.wait_counter("oom_deflated_pages", 1, HANG_TIMEOUT)?;
    }
    // On a busy host the default timeout may expire again.
    let deadline = Instant::now() + HANG_TIMEOUT;
    let filled = loop {
        match guest.call(fill(WANTED, 1, 4)) {
            Ok(filled) => break filled,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
    };
    let verified = guest.call(Verify {
        workload: filled.workload,
    })?;
    ensure!(verified.wrong == 0, "{verified:?}");
    guest.call(Free {
        workload: filled.workload,
    })?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.power_off()?;
    Ok(())
}

/// A host that stalls for less than `host_timeout_ms` causes no OOM kill.
#[test]
fn a_process_without_memory_waits_for_a_stalled_host_until_the_timeout() -> Result<()> {
    // The timeout is longer than the stall.
    let (mut guest, before, whole) = guest_without_memory("")?;

    stop_device(&mut guest)?;
    // The stall is longer than the default timeout.
    let later = format!("sleep 4; kill -CONT {}", guest.daemon()?.process().id());
    let mut later = Command::new("sh").args(["-c", &later]).spawn()?;
    let filled = guest.call(fill(WANTED, 1, 3));
    ensure!(later.wait()?.success(), "the device was not resumed");
    let workload = filled?.workload;
    let verified = guest.call(Verify { workload })?;
    ensure!(verified.wrong == 0, "{verified:?}");
    ensure!(
        guest.vmstat_counter("oom_kill")? == 0,
        "a process was killed"
    );
    guest.call(Free { workload })?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}

#[test]
fn the_device_is_bound_and_unbound_through_sysfs() -> Result<()> {
    const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_balloon_rs";

    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .features(&["stats", "free-page-hint", "deflate-on-oom"])
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let devices = guest.devices_with_counters()?;
    let [device] = devices.as_slice() else {
        bail!("not one device: {devices:?}");
    };
    guest.balloon_qmp()?.set_balloon(whole - BALLOON)?;
    for _ in 0..20 {
        // Unbinds also while the balloon inflates.
        guest.call(WriteFile {
            path: format!("{DRIVER}/unbind"),
            text: device.clone(),
        })?;
        guest.check_memory(before)?;
        guest.call(WriteFile {
            path: format!("{DRIVER}/bind"),
            text: device.clone(),
        })?;
    }
    guest
        .balloon_qmp()?
        .wait_balloon(whole - BALLOON, HANG_TIMEOUT)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}
