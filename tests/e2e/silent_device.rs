// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the driver with a device that never answers: unload, kexec and suspend.

use std::time::Instant;

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{KernelLogRecord, WaitMemSettled};
use harness::check::kernel_warnings;
use harness::guest::{Builder, Driver};
use harness::scratch::Scratch;
use harness::silent_device::SilentDevice;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};
use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;

/// A host that never answers costs the guest only the pages in flight, and the module can be unloaded. The driver waits
/// for a host that must acknowledge pages for `host_timeout_ms`, two seconds here, and then resets the device.
#[test]
fn a_host_that_never_answers_leaves_the_guest_alive() -> Result<()> {
    const PAGES: u32 = 30_000;
    const CMD_ID: u32 = 0x8000_0000;
    let artifacts = Artifacts::load()?;
    let hint = Features::FREE_PAGE_HINT;
    let most = hint | Features::STATS_VQ | Features::DEFLATE_ON_OOM | Features::MUST_TELL_HOST;
    let all = (most | Features::REPORTING, PAGES, CMD_ID);
    let sorts = [(Features::NONE, PAGES, 0), (hint, 0, CMD_ID), all];
    for &vmm in Vmm::each() {
        // An emulated machine boots slowly, so it gets one case.
        let sorts = if vmm == Vmm::Uml { &sorts[..] } else { &[all] };
        for &(features, num_pages, cmd_id) in sorts {
            let scratch = Scratch::new()?;
            let config = ConfigSpace {
                num_pages,
                free_page_hint_cmd_id: cmd_id,
                ..ConfigSpace::default()
            };
            let silent_device = SilentDevice::start(&scratch, features, config)?;
            let mut guest = Builder::new(&artifacts, vmm)
                .external_device(silent_device.socket())
                .boot()?;
            guest.set_short_reporting_delay()?;
            let before = guest.settled_memory_usage()?;
            guest.load(Driver::Ours)?;
            // Inflation and hinting are both in progress.
            for (queue, wanted) in [("inflate", num_pages), ("free_page", cmd_id)] {
                if wanted > 0 {
                    guest.wait_counter(&format!("{queue}_notifications"), 1, HANG_TIMEOUT)?;
                }
            }
            // Fills a third of the memory that is left once the driver has all the pages in flight that it can have.
            let left = guest.call(WaitMemSettled {
                tolerance: MIB,
                stable_samples: 30,
                timeout_ms: HANG_TIMEOUT_MS,
            })?;
            guest.fill_and_free(left.free() - left.free() / 3, 24)?;
            let left = guest.settled_memory_usage()?.free;
            silent_device.wait_kick()?;
            let then = Instant::now();
            let what =
                || format!("{vmm:?}, features {features}, {num_pages} pages, round {cmd_id:#x}");
            guest.unload(Driver::Ours).with_context(what)?;
            let took = then.elapsed();
            println!(
                "{}: {} MiB in flight, unloaded in {took:?}",
                what(),
                (before.free - left) / MIB
            );
            guest.check_memory(before).with_context(what)?;
            // The device has not acknowledged the pages in flight. The driver warns about that, and about nothing else.
            let log = guest.kernel_log()?;
            let (expected, others): (Vec<_>, Vec<_>) = warnings_of_silent_device(&log)
                .into_iter()
                .partition(|text| text.contains("the device does not acknowledge deflation"));
            ensure!(others.is_empty(), "{}: {others:?}", what());
            ensure!(
                expected.len() == usize::from(num_pages > 0),
                "{}: {expected:?}",
                what()
            );
            guest.fill_and_verify(64 * MIB, 25)?;
            guest.check_log().with_context(what)?;
            guest.power_off()?;
        }
    }
    Ok(())
}

/// A device that never answers does not prevent kexec, with a report, requests and hints in flight. The new kernel has
/// all memory, and its driver can be unloaded.
#[test]
fn a_new_kernel_in_qemu_takes_over_from_a_silent_host() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let config = ConfigSpace {
        num_pages: 30_000,
        free_page_hint_cmd_id: 0x8000_0000,
        ..ConfigSpace::default()
    };
    let features = Features::FREE_PAGE_HINT
        | Features::STATS_VQ
        | Features::DEFLATE_ON_OOM
        | Features::MUST_TELL_HOST
        | Features::REPORTING;
    let silent_device = SilentDevice::start(&scratch, features, config)?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .external_device(silent_device.socket())
        .kernel_arguments("init_on_alloc=0")
        .kexec_kernel()
        .boot()?;
    guest.set_short_reporting_delay()?;
    guest.load(Driver::Ours)?;
    for queue in ["inflate", "free_page", "reporting"] {
        guest.wait_counter(&format!("{queue}_notifications"), 1, HANG_TIMEOUT)?;
    }
    let log = guest.kernel_log()?;
    let others = warnings_of_silent_device(&log);
    ensure!(others.is_empty(), "{others:?}");
    guest.kexec()?;
    let before = guest.settled_memory_usage()?;
    guest.fill_and_verify(before.free - 48 * MIB, 27)?;
    guest.load(Driver::Ours)?;
    guest.wait_counter("inflate_notifications", 1, HANG_TIMEOUT)?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.kill()?;
    Ok(())
}

/// Returns the kernel's warnings, without the one about a report that the device does not answer. The driver logs that
/// one after the total timeout, ten seconds by default, so a test may see it or not.
fn warnings_of_silent_device(log: &[KernelLogRecord]) -> Vec<&str> {
    const NO_ANSWER: &str = "the free pages of the last report stay with the device";
    let texts = kernel_warnings(log)
        .into_iter()
        .map(|line| line.text.as_str());
    texts.filter(|text| !text.contains(NO_ANSWER)).collect()
}

/// A device that never answers does not prevent suspend. The test does not offer reporting: with a report in flight the
/// kernel waits for its reporting, with any driver, and refuses to suspend after twenty seconds.
#[test]
fn a_guest_in_qemu_of_a_silent_host_sleeps() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let scratch = Scratch::new()?;
    let config = ConfigSpace {
        num_pages: 30_000,
        free_page_hint_cmd_id: 0x8000_0000,
        ..ConfigSpace::default()
    };
    let features = Features::FREE_PAGE_HINT | Features::STATS_VQ | Features::DEFLATE_ON_OOM;
    let silent_device = SilentDevice::start(&scratch, features, config)?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .external_device(silent_device.socket())
        .suspendable()
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    // The driver has made available all the pages that it could, and waits for the device.
    guest.fill_and_free(before.free / 2, 26)?;
    let then = Instant::now();
    guest.suspend_and_resume()?;
    let took = then.elapsed();
    println!("slept and woke in {took:?}");
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.kill()?;
    Ok(())
}
