// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What only the debug kernel can show: that nothing is left behind, and that allocations may fail.

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

/// With less the kernel does not report free pages: it wants 32 blocks of the largest order free.
const MEMORY: u64 = 256 * MIB;
/// All that our device offers. The kernel clears its pages when it frees them, so that the driver takes all of it.
const FEATURES: [&str; 6] = [
    "must-tell-host",
    "stats",
    "deflate-on-oom",
    "free-page-hint",
    "page-poison",
    "free-page-reporting",
];
const FILL: &str = "init_on_free=1";

/// A guest of the debug kernel, whose device offers all that there is.
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

/// Loads our driver, which takes every feature, and has it do everything.
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

    // The kernel knows the balloon's pages for the driver's.
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

    // The device is taken away with a full balloon, then in a round, then at rest.
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

/// The allocators and the bus say that they failed, and tracing warns. Anything else is a report.
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

/// How many allocations failed, one at a time, and in how many of these cases all of it did.
#[derive(Debug, Default)]
struct FaultCounts {
    failed: u32,
    refused: u32,
}

impl FaultCounts {
    /// Adds an outcome; whether there was no allocation left to fail.
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
    /// The driver's own objects and those that the kernel makes for it, as counted. Fewer would mean that not all were
    /// tried.
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
    /// Most of them are the module loader's and the driver core's; those of the probe fail one by one in another test.
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
    /// It ends when so many have failed.
    const AT_LEAST: u64 = 20;
    let mut guest = guest("")?;
    // What the kernel keeps of the first time is no loss.
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
    // The kernel writes a pattern to each page that is freed, and looks for it when the page is used again.
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
