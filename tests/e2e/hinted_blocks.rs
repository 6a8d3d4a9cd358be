// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that the guest gets its hinted blocks back (R16 in docs/rules.md).

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, Free, Verify};
use harness::guest::{Builder, Driver, Guest};
use harness::vmm::Vmm;
use harness::MIB;

#[test]
fn r16_pages_return_when_a_hint_round_is_done_and_when_it_is_cancelled() -> Result<()> {
    let artifacts = Artifacts::load()?;
    for &driver in Driver::each() {
        let (mut guest, before) =
            Builder::new(&artifacts, Vmm::Uml).boot_filled(16 * MIB, driver)?;
        guest.hint_all()?;
        check_hinted(&mut guest, before.free)?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory(before).context("after done")?;
        guest.hint_all()?;
        guest.daemon()?.qmp().hint_stop()?;
        check_hinted(&mut guest, before.free).context("a stop alone gives nothing back")?;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory(before).context("after stop and done")?;
        for _ in 0..20 {
            let qmp = guest.daemon()?.qmp();
            qmp.hint_start()?;
            qmp.hint_stop()?;
            qmp.hint_done()?;
        }
        guest
            .check_and_power_off(before)
            .context("after rounds that were cancelled at once")?;
    }
    Ok(())
}

fn check_hinted(guest: &mut Guest, free: u64) -> Result<()> {
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
    for &driver in Driver::each() {
        let mut guest = Builder::new(&artifacts, Vmm::Uml).boot()?;
        guest.fill_and_free(16 * MIB, 8)?;
        let before = guest.settled_memory_usage()?;
        guest.load(driver)?;
        guest.hint_all()?;
        check_hinted(&mut guest, before.free)?;
        guest.unload(driver)?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

#[test]
fn r16_pages_return_when_the_daemon_is_gone() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, before) =
        Builder::new(&artifacts, Vmm::Uml).boot_filled(16 * MIB, Driver::Ours)?;
    guest.hint_all()?;
    check_hinted(&mut guest, before.free)?;
    guest.daemon()?.process().kill()?;
    // User-mode Linux detects the end of the daemon and removes the device.
    guest.check_memory(before)?;
    guest.unload(Driver::Ours)?;
    guest.check_memory(before)?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn r16_a_guest_in_qemu_can_use_its_pages_when_the_daemon_is_gone() -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu).boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    guest.hint_all()?;
    check_hinted(&mut guest, before.free)?;
    guest.daemon()?.process().kill()?;
    // QEMU does not tell the guest. The shrinker reclaims hinted blocks for processes that need memory.
    let filled = guest.call(Fill {
        bytes: before.free - 64 * MIB,
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
    guest.check_memory(before)?;
    guest.power_off()?;
    Ok(())
}
