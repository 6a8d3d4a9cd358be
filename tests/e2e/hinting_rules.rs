// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the protocol of hint rounds (R1, R2 and R6 in docs/rules.md) with driver, device and VMM together.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Driver, Guest};
use harness::host::activity;
use harness::process::Signal;
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

#[test]
fn r1_the_daemon_sleeps_while_a_hint_round_waits_for_the_guest() -> Result<()> {
    /// Limits for an idle second: voluntary context switches and processor ticks. A polling loop exceeds them, even if
    /// it sleeps for a millisecond at a time.
    const SLEEPS: u64 = 5;
    const TICKS: u64 = 3;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
    guest.load(Driver::Ours)?;
    // The guest is stopped: the hint round starts and gets no block for a second.
    guest.vmm().stop()?;
    guest.daemon()?.qmp().hint_start()?;
    check_idle(&mut guest, SLEEPS, TICKS).context("while the guest is silent")?;
    guest.vmm().signal(Signal::SIGCONT)?;
    // The guest resumes, finishes the hint round, and keeps the hinted blocks.
    let hint_round = guest.daemon()?.qmp().wait_hint_status("finished")?;
    ensure!(
        hint_round.blocks > 0,
        "the guest hinted nothing after it was resumed: {hint_round:?}"
    );
    check_idle(&mut guest, SLEEPS, TICKS).context("while the guest holds its blocks")?;
    guest.power_off()?;
    Ok(())
}

/// Checks that the daemon does nothing. It has some work left at first, and a busy host may delay that; a daemon that
/// polls is never idle.
fn check_idle(guest: &mut Guest, voluntary_switches: u64, ticks: u64) -> Result<()> {
    let process = guest.daemon()?.process().id();
    let start = Instant::now();
    loop {
        let notifications = guest.daemon()?.notifications()?;
        let (before, since) = (activity(process)?, Instant::now());
        sleep(Duration::from_secs(1));
        let after = activity(process)?;
        // On a busy host the sleep may last longer.
        let seconds = since.elapsed().as_secs() + 1;
        let notified = guest.daemon()?.notifications()? - notifications;
        let done = after.since(&before);
        let is_idle = done.is_some_and(|done| {
            done.voluntary_switches <= voluntary_switches * seconds && done.ticks <= ticks * seconds
        });
        if is_idle {
            return Ok(());
        }
        ensure!(
            start.elapsed() < HANG_TIMEOUT,
            "the daemon did {done:?} in {seconds} seconds, with {notified} notifications"
        );
    }
}

#[test]
fn r2_a_hint_round_that_follows_a_cancelled_one_at_once_is_complete() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let (mut guest, before) =
            Builder::new(&artifacts, Vmm::Uml).boot_filled(16 * MIB, driver)?;
        for pause_us in [0, 0, 50, 200, 1000, 5000] {
            let qmp = guest.daemon()?.qmp();
            let first = qmp.hint_start()?;
            sleep(Duration::from_micros(pause_us));
            qmp.hint_stop()?;
            let second = qmp.hint_start()?;
            ensure!(first != second, "the id {first:#x} was used twice");
            let hint_round = qmp.wait_hint_status("finished")?;
            ensure!(
                hint_round.id == Some(second),
                "the round is {:x?}, not {second:#x}",
                hint_round.id
            );
            let hinted = qmp.hinted_ranges()?.bytes();
            // The C driver keeps the blocks of the cancelled hint round and does not hint them again.
            let enough = if driver == Driver::Ours {
                before.free / 10 * 9
            } else {
                0
            };
            ensure!(
                hinted >= enough,
                "{driver:?}: {hinted} of {before:?} bytes {pause_us} us after a cancelled round"
            );
            qmp.hint_done()?;
            guest.check_memory(before)?;
        }
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

#[test]
fn r6_after_a_sync_the_guest_hints_again_under_a_new_id() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, before) =
        Builder::new(&artifacts, Vmm::Uml).boot_filled(16 * MIB, Driver::Ours)?;
    let qmp = guest.daemon()?.qmp();
    let first = qmp.hint_start()?;
    qmp.wait_hint_status("finished")?;
    qmp.hint_sync()?;
    let again = qmp.wait_hint_status("finished")?;
    ensure!(again.id != Some(first), "the id {first:#x} outlived a sync");
    ensure!(
        qmp.hinted_ranges()?.bytes() >= before.free / 10 * 9,
        "the hints were lost: {again:?}"
    );
    qmp.hint_done()?;
    guest.check_and_power_off(before)?;
    Ok(())
}
