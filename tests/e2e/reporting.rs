// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests free page reporting, and the driver's counters in debugfs, tracepoints and module parameters.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, ReadFile, Run, Verify, WriteFile};
use harness::guest::{Builder, Device, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// Returns the number of 4 KiB pages in `bytes`.
const fn pages(bytes: u64) -> u64 {
    bytes / 4096
}

#[test]
fn the_drivers_counters_agree_with_the_devices() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
    guest.load(Driver::Ours)?;
    let before = guest.counters()?;
    ensure!(before.get("balloon_pages")? == 0, "{before:?}");
    ensure!(before.get("rounds_started")? == 0, "{before:?}");

    let qmp = guest.daemon()?.qmp();
    let whole = qmp.balloon_actual()?;
    qmp.set_balloon(whole - 100 * MIB)?;
    qmp.wait_balloon(whole - 100 * MIB, HANG_TIMEOUT)?;
    qmp.hint_start()?;
    let hint_round = qmp.wait_hint_status("finished")?;
    // The driver counts a hint round after it has sent STOP.
    let after = guest.wait_counter("rounds_finished", 1, HANG_TIMEOUT)?;
    ensure!(after.get("balloon_pages")? == pages(100 * MIB), "{after:?}");
    ensure!(after.get("target_pages")? == pages(100 * MIB), "{after:?}");
    ensure!(after.get("inflate_requests")? >= 100, "{after:?}");
    ensure!(after.get("rounds_started")? == 1, "{after:?}");
    ensure!(after.get("rounds_finished")? == 1, "{after:?}");
    ensure!(
        after.get("hinted_blocks")? == hint_round.blocks
            && after.get("hinted_bytes")? == hint_round.bytes,
        "{after:?}, {hint_round:?}"
    );
    let by_order: u64 = (0..16)
        .map(|order| after.get(&format!("hinted_blocks_order_{order}")))
        .sum::<Result<_>>()?;
    ensure!(by_order == hint_round.blocks, "{after:?}");
    ensure!(
        after.get("hint_free_pages_low")? >= after.get("hint_reserve_pages")?,
        "the reserve was taken: {after:?}"
    );
    for queue in guest.daemon()?.virtio_status()?.queues {
        let key = format!("{}_notifications", queue.name.replace('-', "_"));
        let counted = guest.counters()?.get(&key)?;
        // The device wakes up once when the queue starts, and it may merge notifications. The driver sends a
        // notification only for a request.
        ensure!(
            queue.notifications <= counted + 1 && counted <= queue.requests,
            "{key} {counted}, and the device has {queue:?}"
        );
        ensure!((counted > 0) == (queue.requests > 0), "{key} {counted}");
    }
    let qmp = guest.daemon()?.qmp();
    qmp.hint_done()?;
    qmp.set_balloon(whole)?;
    qmp.wait_balloon(whole, HANG_TIMEOUT)?;
    let end = guest.counters()?;
    ensure!(end.get("balloon_pages")? == 0, "{end:?}");
    ensure!(end.get("deflate_requests")? >= 100, "{end:?}");
    guest.unload(Driver::Ours)?;
    ensure!(
        guest.devices_with_counters()?.is_empty(),
        "a folder is left"
    );
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn our_driver_reports_free_pages_to_our_device_in_user_mode_linux() -> Result<()> {
    reports_free_pages(Vmm::Uml, Device::Ours)
}

#[test]
fn our_driver_reports_free_pages_to_our_device_in_qemu() -> Result<()> {
    reports_free_pages(Vmm::Qemu, Device::Ours)
}

#[test]
fn our_driver_reports_free_pages_to_qemus_device() -> Result<()> {
    reports_free_pages(Vmm::Qemu, Device::QemuOwn)
}

/// Free pages of the guest return to the host without a request, and the guest can use them again.
fn reports_free_pages(vmm: Vmm, device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let builder = Builder::new(&artifacts, vmm).device(device);
    let builder = match device {
        Device::QemuOwn => builder.device_options(&["free-page-reporting=on"]),
        _ => builder.features(&["stats", "free-page-hint", "free-page-reporting"]),
    };
    let mut guest = builder.boot()?;
    guest.set_short_reporting_delay()?;
    guest.fill_and_free(16 * MIB, 11)?;
    let before = guest.settled_memory_usage()?;
    let on_host = guest.host_memory_in_use()?;
    guest.load(Driver::Ours)?;
    let enough = before.free / 10 * 8;
    guest.wait_host_memory_in_use(on_host.saturating_sub(enough), HANG_TIMEOUT)?;
    // The device discards pages before it answers, and so before the driver counts them.
    let counters = guest.wait_counter("reported_pages", pages(enough), HANG_TIMEOUT)?;
    ensure!(counters.get("failed_reports")? == 0, "{counters:?}");
    ensure!(
        counters.get("reported_blocks")? > counters.get("reporting_notifications")?,
        "a notification for each block: {counters:?}"
    );
    // The guest can use reported pages at any time.
    let filled = guest.call(Fill {
        bytes: before.free / 2,
        keep_every: 1,
        seed: 12,
    })?;
    let workload = filled.workload;
    let found = guest.call(Verify { workload })?;
    ensure!(found.wrong == 0 && found.pages > 0, "{found:?}");
    guest.call(Free { workload })?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn parameters_are_clamped_and_keep_hinting_off_the_reserve() -> Result<()> {
    const RESERVE: u64 = 200 * MIB;
    /// Pages of the reserve that the guest's own programs may have used since. The driver's counter is exact.
    const OWN_USE: u64 = 2 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
    for (parameters, min_order, expected_warning) in [
        ("hint_reserve_mib=200 hint_min_order=8", 8, None),
        (
            "hint_reserve_mib=200 hint_min_order=77",
            10,
            Some("hint_min_order=77"),
        ),
        (
            "hint_reserve_mib=200 hint_min_order=8 host_timeout_ms=0",
            8,
            Some("host_timeout_ms=0 is out of range (1 to 600000); using 1"),
        ),
    ] {
        guest.load_with(Driver::Ours, parameters)?;
        let before = guest.settled_memory_usage()?;
        let qmp = guest.daemon()?.qmp();
        qmp.hint_start()?;
        let hint_round = qmp.wait_hint_status("finished")?;
        let left = guest.mem_info()?.free();
        ensure!(
            (RESERVE - OWN_USE..=RESERVE + 16 * MIB).contains(&left),
            "{left} bytes were left of {before:?}: {hint_round:?}"
        );
        let counters = guest.counters()?;
        ensure!(
            counters.get("hint_reserve_pages")? == pages(RESERVE),
            "{counters:?}"
        );
        ensure!(
            counters.get("hint_free_pages_low")? >= pages(RESERVE),
            "{counters:?}"
        );
        for order in 0..min_order {
            let blocks = counters.get(&format!("hinted_blocks_order_{order}"))?;
            ensure!(blocks == 0, "{blocks} blocks of order {order} were hinted");
        }
        guest.daemon()?.qmp().hint_done()?;
        guest.unload(Driver::Ours)?;
        guest.check_memory(before)?;
        match expected_warning {
            None => guest.check_log()?,
            Some(expected_warning) => {
                let log = guest.kernel_log()?;
                ensure!(
                    log.iter().any(|line| line.text.contains(expected_warning)),
                    "{log:?}"
                );
            }
        }
    }
    for wrong in [
        "hint_min_order=-1",
        "hint_reserve_mib=much",
        "hint_min_order=256",
        "host_timeout_ms=-1",
    ] {
        ensure!(
            guest.load_with(Driver::Ours, wrong).is_err(),
            "the module takes {wrong}"
        );
    }
    guest.power_off()?;
    Ok(())
}

/// Runs in QEMU only: the stock kernel has tracepoints, user-mode Linux has none.
#[test]
fn tracepoints_show_hinting_and_resizing_in_qemu() -> Result<()> {
    const TRACING: &str = "/sys/kernel/tracing";
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu).boot()?;
    guest.load(Driver::Ours)?;
    let argv = ["mount", "-t", "tracefs", "tracefs", TRACING].map(str::to_owned);
    guest.call(Run {
        argv: argv.to_vec(),
    })?;
    guest.call(WriteFile {
        path: format!("{TRACING}/events/virtio_balloon_rs/enable"),
        text: "1".to_owned(),
    })?;
    let qmp = guest.daemon()?.qmp();
    let id = qmp.hint_start()?;
    let hint_round = qmp.wait_hint_status("finished")?;
    qmp.hint_done()?;
    let whole = qmp.balloon_actual()?;
    qmp.set_balloon(whole - 4 * MIB)?;
    qmp.wait_balloon(whole - 4 * MIB, HANG_TIMEOUT)?;
    let path = format!("{TRACING}/trace");
    let trace = guest.call(ReadFile { path })?;
    let count = |text: &str| trace.lines().filter(|line| line.contains(text)).count();
    let blocks = count("balloon_hint_block: virtio");
    ensure!(
        blocks as u64 == hint_round.blocks,
        "{blocks} lines: {hint_round:?}"
    );
    ensure!(count(&format!(" id={id:#x} reserve=")) == 1, "{trace}");
    ensure!(count("balloon_hint_stop: virtio") == 1, "{trace}");
    for event in ["balloon_request", "balloon_acknowledge"] {
        // The driver may take the pages of a request from hinted blocks. The request is smaller when these blocks run
        // out.
        let lines = trace.lines().filter(|line| line.contains(event));
        let inflated = lines.filter_map(|line| line.split_once("queue=inflate pages="));
        let pages: Option<u64> = inflated
            .map(|(_, pages)| pages.trim().parse::<u64>().ok())
            .sum();
        ensure!(
            pages == Some(1024),
            "{pages:?} of {event} for 4 MiB:\n{trace}"
        );
    }
    guest.unload(Driver::Ours)?;
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

/// Tests reporting by a guest that fills its free pages. Without PAGE_POISON the driver accepts no reporting. With it
/// the driver reports, and the device discards the pages if the fill value is 0.
fn reporting_of_a_guest_that_fills_its_free_pages(
    vmm: Vmm,
    arguments: &str,
    poison: u32,
) -> Result<()> {
    let artifacts = Artifacts::load()?;
    for (offered, accepted) in [
        (&["free-page-reporting"][..], false),
        (&["free-page-reporting", "page-poison"][..], true),
    ] {
        let mut guest = Builder::new(&artifacts, vmm)
            .features(offered)
            .kernel_arguments(arguments)
            .boot()?;
        guest.set_short_reporting_delay()?;
        guest.fill_and_free(16 * MIB, 13)?;
        let before = guest.settled_memory_usage()?;
        let on_host = guest.host_memory_in_use()?;
        guest.load(Driver::Ours)?;
        let status = guest.daemon()?.virtio_status()?;
        ensure!(
            status.has_feature("free-page-reporting") == accepted
                && status.has_feature("page-poison") == accepted
                && status.poison == accepted.then_some(poison),
            "{offered:?}: {status:?}"
        );
        if accepted {
            guest.wait_counter("reported_pages", pages(before.free / 10 * 8), HANG_TIMEOUT)?;
            // A page counts each time it is reported, so the counter does not show how much the device has discarded.
            let enough = if poison == 0 { before.free / 10 * 7 } else { 0 };
            let at_most = match enough {
                0 => u64::MAX,
                enough => on_host.saturating_sub(enough),
            };
            let now = guest.wait_host_memory_in_use(at_most, HANG_TIMEOUT)?;
            let released = on_host.saturating_sub(now);
            ensure!(
                (enough..=enough + before.free / 2).contains(&released),
                "{released} bytes were released of {before:?} that were free"
            );
        }
        // A kernel that poisons free pages checks the pattern when it allocates them, and logs a changed page.
        guest.fill_and_free(16 * MIB, 14)?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

#[test]
fn a_guest_that_clears_its_free_pages_reports_them_only_with_page_poison() -> Result<()> {
    reporting_of_a_guest_that_fills_its_free_pages(Vmm::Uml, "init_on_free=1", 0)
}

#[test]
fn a_guest_with_the_debug_kernel_that_poisons_its_free_pages_reports_them_only_with_page_poison(
) -> Result<()> {
    /// The kernel's `PAGE_POISON` byte, four times.
    const POISON: u32 = 0xaaaa_aaaa;
    reporting_of_a_guest_that_fills_its_free_pages(Vmm::Uml, "page_poison=1", POISON)
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
    let enough = pages(64 * MIB);
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
