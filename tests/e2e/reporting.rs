// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests free page reporting.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, Verify};
use harness::guest::{Builder, Device, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// Returns the number of 4 KiB pages in `bytes`.
const fn pages(bytes: u64) -> u64 {
    bytes / 4096
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
