// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests suspend and hibernation of a guest with a balloon, with hinted blocks and with reporting.

use std::fs::File;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, Verify, WriteFile};
use harness::guest::{Builder, Device, Driver};
use harness::scratch::Scratch;
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

#[test]
fn a_guest_in_qemu_sleeps_with_an_inflated_balloon_of_our_device() -> Result<()> {
    suspends_inflated(Device::Ours)
}

#[test]
fn a_guest_sleeps_with_an_inflated_balloon_of_qemus_device() -> Result<()> {
    suspends_inflated(Device::QemuOwn)
}

/// Suspends the guest (S3) with an inflated balloon and, with our device, with hinted blocks. After the resume the
/// driver fills the balloon again, and everything works.
///
/// The guest is suspended once, and then killed: with QEMU 11.1, a machine that Linux has resumed can neither suspend
/// again nor power off, with or without a balloon.
fn suspends_inflated(device: Device) -> Result<()> {
    const INFLATE_BY: u64 = 100 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::with_all_features(&artifacts, Vmm::Qemu, device)
        .suspendable()
        .boot()?;
    guest.set_short_reporting_delay()?;
    guest.fill_and_free(24 * MIB, 21)?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let target = guest.inflate_by(INFLATE_BY)?;
    if device == Device::Ours {
        let hint_round = guest.hint_all()?;
        ensure!(hint_round.bytes > 0, "nothing is held: {hint_round:?}");
    }
    let then = Instant::now();
    guest.suspend_and_resume()?;
    guest.wait_balloon_after_reload(target, HANG_TIMEOUT)?;
    println!("{device:?}: target again after {:?}", then.elapsed());
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    guest.check_memory_and_log(before)?;
    guest.kill()?;
    Ok(())
}

/// The driver reports free pages again after suspend and resume.
#[test]
fn reports_go_on_when_a_guest_in_qemu_has_slept() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .features(&["stats", "free-page-hint", "free-page-reporting"])
        .suspendable()
        .boot()?;
    guest.set_short_reporting_delay()?;
    guest.load(Driver::Ours)?;
    let enough = 64 * MIB / 4096;
    guest.wait_counter("reported_pages", enough, HANG_TIMEOUT)?;
    guest.suspend_and_resume()?;
    // Reports after this count happen after the sleep.
    let woken = guest.counters()?.get("reported_pages")?;
    // The kernel reports a page again only after the page has been in use.
    guest.fill_and_free(64 * MIB, 15)?;
    let after = guest.wait_counter("reported_pages", woken + enough, HANG_TIMEOUT)?;
    let failed = after.get("failed_reports")?;
    ensure!(failed <= 1, "{failed} reports failed: {after:?}");
    guest.unload(Driver::Ours)?;
    guest.check_log()?;
    // With QEMU 11.1, a machine that Linux has resumed does not power off.
    guest.kill()?;
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
    guest.shell("mkswap /dev/nvme0n1 && swapon /dev/nvme0n1")?;
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
