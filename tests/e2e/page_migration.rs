// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests page migration: the kernel compacts memory or takes it offline, and balloon pages migrate.

use std::time::Instant;

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Free, PageUse, Release, ReleaseLowest, Run, Verify, WriteFile};
use harness::guest::{Builder, Driver, Guest, DEFAULT_HOST_TIMEOUT};
use harness::ranges::{PhysicalRange, RangeSet};
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

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
    let spread = guest.fill(free - SPARE, 128, 6)?;
    guest.call(Release {
        workload: spread.workload,
    })?;
    // In the lower part of memory every other page becomes free, and the balloon takes these pages. Then the rest
    // becomes free. Compaction migrates pages from low to high addresses.
    let pieces = guest.fill(free - 2 * SPARE, 2, 5)?;
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
    let kept = guest.fill(16 * MIB, 1, 6)?;

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

    guest.stop_daemon()?;
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
        "{} pages were migrated without the device",
        now - migrated
    );
    let pages = guest.counters()?.get("balloon_pages")?;
    ensure!(pages == BALLOON / 4096, "{pages} pages are in the balloon");

    // The device answers again, and the driver gets back the pages of abandoned migrations. All works as before.
    guest.continue_daemon()?;
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
    let filled = guest.fill(NODE / 2, 1, 3)?;
    guest.inflate_leaving(NODE / 2)?;
    guest.call(Free {
        workload: filled.workload,
    })?;
    let before = [
        guest.balloon_pages_on_node(0)?,
        guest.balloon_pages_on_node(1)?,
    ];
    let offline = guest.call(Run {
        argv: ["sh", "-c", OFFLINE].map(str::to_owned).to_vec(),
    })?;
    ensure!(offline.status == Some(0), "{offline:?}");
    let after = [
        guest.balloon_pages_on_node(0)?,
        guest.balloon_pages_on_node(1)?,
    ];
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
    let after = [
        guest.balloon_pages_on_node(0)?,
        guest.balloon_pages_on_node(1)?,
    ];
    ensure!(after == [0, 0], "of no balloon {after:?} pages are counted");
    // The kernel log is not checked: it describes each page that kept memory online.
    guest.power_off()?;
    Ok(())
}
