// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of hinting that show only when driver, device and VMM work together.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use tests::artifacts::Artifacts;
use tests::calls::{Fill, Free, Verify};
use tests::guest::{Builder, Driver, Guest};
use tests::host::activity;
use tests::vmm::Vmm;
use tests::MIB;

const BOTH_DRIVERS: [Driver; 2] = [Driver::Ours, Driver::C];

/// A guest of user-mode Linux whose free memory has been used, with a driver loaded, and what is free.
fn uml_guest(artifacts: &Artifacts, driver: Driver) -> Result<(Guest, u64)> {
    Builder::new(artifacts, Vmm::Uml).boot_used(16 * MIB, driver)
}

#[test]
fn r1_the_daemon_sleeps_while_a_round_waits_for_the_guest() -> Result<()> {
    /// What an idle second may cost; a loop, even one that sleeps a millisecond at a time, costs far more.
    const SLEEPS: u64 = 10;
    const TICKS: u64 = 5;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
    guest.load(Driver::Ours)?;
    // The guest stands still: the round begins and gets no block, for a second.
    guest.vmm().signal(tests::process::Signal::SIGSTOP)?;
    guest.daemon()?.qmp().hint_start()?;
    idle(&mut guest, SLEEPS, TICKS).context("while the guest is silent")?;
    guest.vmm().signal(tests::process::Signal::SIGCONT)?;
    // Then it goes on, finishes, and holds its blocks.
    let round = guest.daemon()?.qmp().wait_hint_status("finished")?;
    ensure!(
        round.blocks > 0,
        "the guest hinted nothing when it went on: {round:?}"
    );
    idle(&mut guest, SLEEPS, TICKS).context("while the guest holds its blocks")?;
    guest.power_off()?;
    Ok(())
}

fn idle(guest: &mut Guest, sleeps: u64, ticks: u64) -> Result<()> {
    let notifications = guest.daemon()?.notifications()?;
    let process = guest.daemon()?.process().id();
    sleep(Duration::from_millis(200));
    let before = activity(process)?;
    sleep(Duration::from_secs(1));
    let after = activity(process)?;
    let notified = guest.daemon()?.notifications()? - notifications;
    let (slept, ran) = (after.sleeps - before.sleeps, after.ticks - before.ticks);
    ensure!(
        slept <= sleeps,
        "the daemon woke up {slept} times in a second, with {notified} notifications"
    );
    ensure!(ran <= ticks, "the daemon ran for {ran} ticks in a second");
    Ok(())
}

#[test]
fn r2_a_round_that_follows_a_cancelled_one_at_once_is_whole() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for driver in BOTH_DRIVERS {
        let (mut guest, free) = uml_guest(&artifacts, driver)?;
        for pause_us in [0, 0, 50, 200, 1000, 5000] {
            let qmp = guest.daemon()?.qmp();
            let first = qmp.hint_start()?;
            sleep(Duration::from_micros(pause_us));
            qmp.hint_stop()?;
            let second = qmp.hint_start()?;
            ensure!(first != second, "the id {first:#x} was used twice");
            let round = qmp.wait_hint_status("finished")?;
            ensure!(
                round.id == Some(second),
                "the round is {:x?}, not {second:#x}",
                round.id
            );
            let hinted = qmp.hinted_ranges()?.bytes();
            // The C driver does not offer again what it holds of the first round, which was cancelled.
            let enough = if driver == Driver::Ours {
                free / 10 * 9
            } else {
                0
            };
            ensure!(
                hinted >= enough,
                "{driver:?}: {hinted} of {free} bytes {pause_us} us after a cancelled round"
            );
            qmp.hint_done()?;
            guest.check_free(free)?;
        }
        guest.farewell(free)?;
    }
    Ok(())
}

#[test]
fn r6_after_a_sync_the_guest_hints_again_under_a_new_id() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, free) = uml_guest(&artifacts, Driver::Ours)?;
    let qmp = guest.daemon()?.qmp();
    let first = qmp.hint_start()?;
    qmp.wait_hint_status("finished")?;
    qmp.hint_sync()?;
    let again = qmp.wait_hint_status("finished")?;
    ensure!(again.id != Some(first), "the id {first:#x} outlived a sync");
    ensure!(
        qmp.hinted_ranges()?.bytes() >= free / 10 * 9,
        "the hints were lost: {again:?}"
    );
    qmp.hint_done()?;
    guest.farewell(free)?;
    Ok(())
}

#[test]
fn r16_pages_return_when_a_round_is_done_and_when_it_is_cancelled() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for driver in BOTH_DRIVERS {
        let (mut guest, free) = uml_guest(&artifacts, driver)?;
        guest.hint_all()?;
        held(&mut guest, free)?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_free(free).context("after done")?;
        guest.hint_all()?;
        guest.daemon()?.qmp().hint_stop()?;
        held(&mut guest, free).context("a stop alone gives nothing back")?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_free(free).context("after stop and done")?;
        for _ in 0..20 {
            let qmp = guest.daemon()?.qmp();
            qmp.hint_start()?;
            qmp.hint_stop()?;
            qmp.hint_done()?;
        }
        guest
            .farewell(free)
            .context("after rounds that were cancelled at once")?;
    }
    Ok(())
}

fn held(guest: &mut Guest, free: u64) -> Result<()> {
    let now = guest.mem_info()?.free();
    ensure!(
        now < free / 2,
        "the guest has {now} of {free} bytes free while it should hold what it hinted"
    );
    Ok(())
}

#[test]
fn r16_pages_return_when_the_module_is_removed() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for driver in BOTH_DRIVERS {
        let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
        guest.fill_and_free(16 * MIB, 8)?;
        let free = guest.settled_free()?;
        guest.load(driver)?;
        guest.hint_all()?;
        held(&mut guest, free)?;
        guest.unload(driver)?;
        guest.farewell(free)?;
    }
    Ok(())
}

#[test]
fn r16_pages_return_when_the_daemon_is_gone() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, free) = uml_guest(&artifacts, Driver::Ours)?;
    guest.hint_all()?;
    held(&mut guest, free)?;
    guest.daemon()?.process().kill()?;
    // User-mode Linux notices, and takes the device away.
    guest.check_free(free)?;
    guest.unload(Driver::Ours)?;
    guest.check_free(free)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn r16_a_guest_in_qemu_can_use_its_pages_when_the_daemon_is_gone() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu).boot()?;
    let free = guest.settled_free()?;
    guest.load(Driver::Ours)?;
    guest.hint_all()?;
    held(&mut guest, free)?;
    guest.daemon()?.process().kill()?;
    // QEMU does not tell the guest; but who needs memory gets it.
    let filled = guest.call(Fill {
        bytes: free - 64 * MIB,
        keep_every: 1,
        seed: 9,
    })?;
    let found = guest.call(Verify {
        workload: filled.workload,
    })?;
    ensure!(found.wrong == 0, "{found:?}");
    guest.call(Free {
        workload: filled.workload,
    })?;
    guest.unload(Driver::Ours)?;
    guest.check_free(free)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn r17_a_hint_takes_no_page_away() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for driver in BOTH_DRIVERS {
        let (mut guest, free) = uml_guest(&artifacts, driver)?;
        let before = guest.memory_in_use()?;
        let hinted = guest.hint_all()?.bytes;
        let after = guest.memory_in_use()?;
        ensure!(
            after + MIB >= before,
            "{driver:?}: {hinted} bytes were hinted, and {} are gone",
            before - after
        );
        guest.daemon()?.qmp().hint_done()?;
        guest.farewell(free)?;
    }
    Ok(())
}
