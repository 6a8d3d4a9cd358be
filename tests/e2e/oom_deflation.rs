// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests OOM deflation: a process that finds no free memory gets pages of the balloon.

use std::process::Command;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Free, Run, Verify, WriteFile};
use harness::check::MemoryUsage;
use harness::guest::{Builder, Driver, Guest, DEFAULT_HOST_TIMEOUT};
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// Memory that the balloon leaves free.
const LEFT: u64 = 64 * MIB;
/// Memory that a process needs then.
const WANTED: u64 = 128 * MIB;

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
    let target = guest.inflate_leaving(LEFT)?;
    // With DEFLATE_ON_OOM the kernel counts the balloon's pages as memory of the guest.
    let total = guest.mem_info()?.total();
    ensure!(
        total >= managed - MIB,
        "{total} of {managed} bytes are left"
    );

    let filled = guest.fill(WANTED, 1, 3)?;
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
        let target = guest.inflate_leaving(LEFT)?;
        // With overcommit the kernel detects the shortage only when the process uses the memory.
        guest.call(WriteFile {
            path: "/proc/sys/vm/overcommit_memory".to_owned(),
            text: "1".to_owned(),
        })?;
        let error = guest.fill(WANTED, 1, 3).err();
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
fn our_balloon_keeps_what_a_bound_process_cannot_use_in_qemu() -> Result<()> {
    balloon_keeps_other_nodes(Driver::Ours)
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
    guest.inflate_leaving(before.free / 4)?;
    let before = [
        guest.balloon_pages_on_node(0)?,
        guest.balloon_pages_on_node(1)?,
    ];
    ensure!(before[0] > 0 && before[1] > 0, "pages by node: {before:?}");
    let argv = ["sh", "-c", CPUSET].map(str::to_owned).to_vec();
    let run = guest.call(Run { argv })?;
    ensure!(run.status == Some(0), "{run:?}");
    // More memory than the node has.
    let error = guest.fill(NODE, 1, 3).err();
    let error = error.context("a process has memory that is not there")?;
    ensure!(format!("{error:#}").contains("is gone"), "{error:#}");
    ensure!(
        guest.vmstat_counter("oom_kill")? > 0,
        "no process was killed"
    );
    let after = [
        guest.balloon_pages_on_node(0)?,
        guest.balloon_pages_on_node(1)?,
    ];
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
    guest.inflate_leaving(LEFT)?;
    Ok((guest, before, whole))
}

#[test]
fn a_process_without_memory_does_not_wait_for_ever_for_the_device() -> Result<()> {
    let (mut guest, before, whole) = guest_without_memory(DEFAULT_HOST_TIMEOUT)?;

    guest.stop_daemon()?;
    let filled = guest.fill(WANTED, 1, 3);
    ensure!(filled.is_err(), "it has memory that the host did not give");
    ensure!(
        guest.vmstat_counter("oom_kill")? > 0,
        "no process was killed"
    );

    guest.continue_daemon()?;
    // The next OOM deflation starts only after the device has acknowledged the last one. There was none if the process
    // waited for page migration.
    if guest.counters()?.get("oom_deflations")? > 0 {
        guest.wait_counter("oom_deflated_pages", 1, HANG_TIMEOUT)?;
    }
    // On a busy host the default timeout may expire again.
    let deadline = Instant::now() + HANG_TIMEOUT;
    let filled = loop {
        match guest.fill(WANTED, 1, 4) {
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

    guest.stop_daemon()?;
    // The stall is longer than the default timeout.
    let later = format!("sleep 4; kill -CONT {}", guest.daemon()?.process().id());
    let mut later = Command::new("sh").args(["-c", &later]).spawn()?;
    let filled = guest.fill(WANTED, 1, 3);
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
