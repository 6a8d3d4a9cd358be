// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that need the debug kernel: leak checks (page owner, kmemleak), fault injection and page poisoning.

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::attempts::Attempts;
use harness::calls::FailNthResult;
use harness::check::bug_reports;
use harness::debug_kernel::OWNER_TRACKING;
use harness::fault_injection::{FaultScope, CONFIG_FUNCTIONS, IRQ_FUNCTIONS};
use harness::guest::{Builder, Driver, Guest};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};
use shared_abi::features::Features;

/// The guest's memory. The kernel reports free pages of a zone only while the zone has 32 blocks of the reporting order
/// free above its low watermark, so a smaller guest would report nothing.
const MEMORY: u64 = 256 * MIB;
/// All features that our device offers. [`FILL`] has the kernel clear the pages that it frees, so the driver accepts
/// all of them.
const FEATURES: [&str; 6] = [
    "must-tell-host",
    "stats",
    "deflate-on-oom",
    "free-page-hint",
    "page-poison",
    "free-page-reporting",
];
const FILL: &str = "init_on_free=1";

/// Boots a guest with the debug kernel and a device that offers [`FEATURES`].
fn guest(arguments: &str) -> Result<Guest> {
    let artifacts = Artifacts::load()?;
    let arguments = format!("{FILL} {arguments}");
    let mut guest = Builder::new(&artifacts, Vmm::Debug)
        .memory(MEMORY)
        .features(&FEATURES)
        .kernel_arguments(&arguments)
        .boot()?;
    guest.set_short_reporting_delay()?;
    Ok(guest)
}

/// Loads our driver, checks that it accepts all [`FEATURES`], and exercises the balloon.
fn load_and_exercise(guest: &mut Guest) -> Result<()> {
    guest.load(Driver::Ours)?;
    let agreed = guest.exercise()?;
    let names: Vec<_> = agreed.names().collect();
    ensure!(
        FEATURES.iter().all(|feature| names.contains(feature)),
        "the driver took only {names:?}"
    );
    Ok(())
}

#[test]
fn no_page_and_no_object_is_left_of_our_driver_on_the_debug_kernel() -> Result<()> {
    let mut guest = guest(OWNER_TRACKING)?;
    let before = guest.settled_memory_usage()?;
    load_and_exercise(&mut guest)?;
    let name = Driver::Ours.module_name();
    let code = guest.module_code(Driver::Ours)?;

    // The page owner attributes the balloon's pages to the driver.
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let target = whole - 16 * MIB;
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    let owned = guest.pages_owned(name, &code)?;
    let pages: u64 = owned.iter().map(|owner| owner.pages).sum();
    ensure!(
        pages >= 16 * MIB / 4096,
        "{pages} pages have an owner, of 16 MiB in the balloon"
    );

    // Unbinds with a full balloon, then in a hint round, then when idle.
    guest.unbind()?;
    guest.bind()?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.daemon()?.qmp().hint_start()?;
    guest.unbind()?;
    guest.bind()?;
    guest.unbind()?;
    let owned = guest.pages_owned(name, &code)?;
    ensure!(owned.is_empty(), "the driver has no device, but {owned:#?}");
    let leaks = guest.leaks()?;
    ensure!(leaks.is_empty(), "nothing points to {leaks:#?}");

    guest.unload(Driver::Ours)?;
    let owned = guest.pages_owned(name, &code)?;
    ensure!(owned.is_empty(), "the driver has gone, but {owned:#?}");
    let leaks = guest.leaks()?;
    ensure!(leaks.is_empty(), "nothing points to {leaks:#?}");
    guest.check_and_power_off(before)
}

/// Fails if the kernel log has a bug report. Messages of the allocators and the bus about failed allocations are no bug
/// reports. A warning of `trace_events.c` about a failed allocation is expected.
fn check_log(guest: &mut Guest) -> Result<()> {
    const OF_FAILURE: &str = "kernel/trace/trace_events.c";
    let log = guest.kernel_log()?;
    let mut bug_reports = bug_reports(&log);
    bug_reports.retain(|line| !line.text.contains(OF_FAILURE));
    ensure!(
        bug_reports.is_empty(),
        "the kernel reports: {bug_reports:#?}"
    );
    Ok(())
}

/// The number of injected allocation failures, and the number of these that failed the whole operation.
#[derive(Debug, Default)]
struct FaultCounts {
    failed: u32,
    refused: u32,
}

impl FaultCounts {
    /// Counts an outcome. Returns whether the operation had no allocation left to fail. Fails if the operation failed
    /// without an injected failure.
    fn ends_with(&mut self, outcome: &FailNthResult) -> Result<bool> {
        if outcome.injected {
            self.failed += 1;
            self.refused += u32::from(outcome.error.is_some());
        } else {
            ensure!(outcome.error.is_none(), "nothing failed, but {outcome:?}");
        }
        Ok(!outcome.injected)
    }
}

#[test]
fn probe_survives_the_failure_of_each_allocation_on_the_debug_kernel() -> Result<()> {
    /// Minimum counts, from a measurement: the driver's own allocations and the kernel's on its behalf. Lower counts
    /// mean that not all allocations were tried.
    const AT_LEAST: FaultCounts = FaultCounts {
        failed: 50,
        refused: 40,
    };
    let mut guest = guest(OWNER_TRACKING)?;
    load_and_exercise(&mut guest)?;
    let name = Driver::Ours.module_name();
    let code = guest.module_code(Driver::Ours)?;
    guest.unbind()?;

    guest.configure_fault_injection(&FaultScope::Code(code.clone()), &IRQ_FUNCTIONS)?;
    let mut count = FaultCounts::default();
    loop {
        let nth = count.failed + 1;
        let outcome = guest.bind_fail_nth(nth)?;
        check_log(&mut guest).with_context(|| format!("allocation {nth} failed"))?;
        if outcome.error.is_none() {
            guest.unbind()?;
        }
        if count.ends_with(&outcome)? {
            break;
        }
    }
    println!("of the driver's allocations {count:?}");
    ensure!(
        count.failed >= AT_LEAST.failed && count.refused >= AT_LEAST.refused,
        "only {count:?}"
    );

    let owned = guest.pages_owned(name, &code)?;
    ensure!(owned.is_empty(), "the driver has no device, but {owned:#?}");
    let leaks = guest.leaks()?;
    ensure!(leaks.is_empty(), "nothing points to {leaks:#?}");
    guest.bind()?;
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    check_log(&mut guest)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn loading_survives_the_failure_of_allocations_on_the_debug_kernel() -> Result<()> {
    /// Every third allocation is tried. Most are the module loader's and the driver core's. Another test covers each
    /// allocation of the probe.
    const ONE_OF: u32 = 3;
    const AT_LEAST: FaultCounts = FaultCounts {
        failed: 50,
        refused: 25,
    };
    let mut guest = guest("")?;
    load_and_exercise(&mut guest)?;
    guest.unload(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    guest.configure_fault_injection(&FaultScope::All, &IRQ_FUNCTIONS)?;
    let mut count = FaultCounts::default();
    loop {
        let nth = count.failed * ONE_OF + 1;
        let outcome = guest.load_fail_nth(nth)?;
        check_log(&mut guest).with_context(|| format!("allocation {nth} failed"))?;
        if outcome.error.is_none() {
            guest.unload(Driver::Ours)?;
        }
        if count.ends_with(&outcome)? {
            break;
        }
    }
    println!("one of {ONE_OF} allocations: {count:?}");
    ensure!(
        count.failed >= AT_LEAST.failed && count.refused >= AT_LEAST.refused,
        "only {count:?}"
    );
    load_and_exercise(&mut guest)?;
    guest.unload(Driver::Ours)?;
    guest.check_memory_with_tolerance(before, MIB)?;
    check_log(&mut guest)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn the_target_is_reached_after_allocations_failed_at_random_on_the_debug_kernel() -> Result<()> {
    const PERCENT: u32 = 30;
    const TIMES: usize = 6;
    /// The minimum number of injected failures.
    const AT_LEAST: u64 = 20;
    let mut guest = guest("")?;
    // The first load fills caches that the kernel keeps, which are no leak.
    load_and_exercise(&mut guest)?;
    guest.unload(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    load_and_exercise(&mut guest)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let low = whole - 64 * MIB;
    let code = guest.module_code(Driver::Ours)?;
    guest.configure_fault_injection(&FaultScope::Code(code), &CONFIG_FUNCTIONS)?;
    guest.set_fault_probability(PERCENT)?;
    let mut attempts = Attempts::default();
    for (time, target) in [low, whole].into_iter().cycle().enumerate() {
        let failed = guest.injected_failures()?;
        if time >= TIMES && failed >= AT_LEAST {
            break;
        }
        ensure!(
            time < TIMES || attempts.may_retry(failed),
            "only {failed} allocations failed"
        );
        guest.balloon_qmp()?.set_balloon(target)?;
        let qmp = guest.daemon()?.qmp();
        qmp.hint_start()?;
        qmp.wait_hint_status("finished")?;
        guest.statistics()?;
        guest.daemon()?.qmp().hint_done()?;
        check_log(&mut guest)?;
    }
    guest.balloon_qmp()?.set_balloon(low)?;
    let failed = guest.injected_failures()?;
    println!("{failed} allocations failed");
    guest.set_fault_probability(0)?;
    guest.balloon_qmp()?.wait_balloon(low, HANG_TIMEOUT)?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    guest.check_memory_with_tolerance(before, MIB)?;
    check_log(&mut guest)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn no_page_is_written_to_while_it_is_free_on_the_debug_kernel() -> Result<()> {
    let artifacts = Artifacts::load()?;
    // The kernel fills each freed page with a pattern and checks the pattern when it allocates the page.
    let mut guest = Builder::new(&artifacts, Vmm::Debug)
        .memory(MEMORY)
        .features(&FEATURES)
        .kernel_arguments("page_poison=1")
        .boot()?;
    guest.set_short_reporting_delay()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let agreed = guest.features()?;
    ensure!(agreed.contains(Features::PAGE_POISON), "{agreed}");
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    for target in [whole - 64 * MIB, whole] {
        guest.balloon_qmp()?.set_balloon(target)?;
        guest.balloon_qmp()?.wait_balloon(target, HANG_TIMEOUT)?;
    }
    let empty = guest.settled_memory_usage()?;
    guest.retry_full_hint_round(empty)?;
    guest.fill_and_free(24 * MIB, 12)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}
