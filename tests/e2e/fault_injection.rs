// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the driver with memory allocations that fail. The debug kernel injects the failures.

use anyhow::{ensure, Context, Result};
use harness::attempts::Attempts;
use harness::calls::FailNthResult;
use harness::check::bug_reports;
use harness::debug_kernel::OWNER_TRACKING;
use harness::fault_injection::{FaultScope, CONFIG_FUNCTIONS, IRQ_FUNCTIONS};
use harness::guest::{Driver, Guest};
use harness::{HANG_TIMEOUT, MIB};

use crate::debug_kernel;

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
    let mut guest = debug_kernel::guest(OWNER_TRACKING)?;
    debug_kernel::load_and_exercise(&mut guest)?;
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
    let mut guest = debug_kernel::guest("")?;
    debug_kernel::load_and_exercise(&mut guest)?;
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
    debug_kernel::load_and_exercise(&mut guest)?;
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
    let mut guest = debug_kernel::guest("")?;
    // The first load fills caches that the kernel keeps, which are no leak.
    debug_kernel::load_and_exercise(&mut guest)?;
    guest.unload(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    debug_kernel::load_and_exercise(&mut guest)?;
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
