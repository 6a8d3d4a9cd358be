// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hints are right, not only many.

use anyhow::{ensure, Result};
use tests::artifacts::Artifacts;
use tests::calls::{BuddyInfo, Fill, KeptPages, Release, Verify};
use tests::guest::{Builder, Driver, Guest};
use tests::vmm::Vmm;
use tests::MIB;

/// One page of so many is kept: then nearly every block of the largest order holds one.
const KEEP_EVERY: u64 = 2000;

#[test]
fn our_drivers_hints_spare_what_a_guest_in_qemu_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Qemu, Driver::Ours)
}

#[test]
fn the_c_drivers_hints_spare_what_a_guest_in_qemu_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Qemu, Driver::C)
}

#[test]
fn our_drivers_hints_spare_what_a_guest_in_user_mode_linux_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Uml, Driver::Ours)
}

#[test]
fn the_c_drivers_hints_spare_what_a_guest_in_user_mode_linux_keeps() -> Result<()> {
    hints_spare_what_is_kept(Vmm::Uml, Driver::C)
}

/// The guest keeps pages all over its memory. None of them is hinted, and all keep what they hold, though all the memory
/// around them is hinted and given back.
fn hints_spare_what_is_kept(vmm: Vmm, driver: Driver) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm).boot()?;
    guest.load(driver)?;
    let bytes = guest.mem_info()?.free() - 32 * MIB;
    let dense = guest.call(Fill {
        bytes: bytes / 4,
        keep_every: 2,
        seed: 3,
    })?;
    let sparse = guest.call(Fill {
        bytes: bytes / 4 * 3,
        keep_every: KEEP_EVERY,
        seed: 4,
    })?;
    let workloads = [dense.workload, sparse.workload];
    for workload in workloads {
        guest.call(Release { workload })?;
    }
    guest.settled_free()?;
    let round = guest.hint_all()?;
    let hinted = guest.daemon()?.qmp().hinted_ranges()?;
    ensure!(hinted.bytes() > 0, "nothing was hinted: {round:?}");
    ensure!(
        hinted.bytes() == round.pages_cleared * 4096,
        "{} bytes of clear bits, {round:?}",
        hinted.bytes()
    );
    for workload in workloads {
        let kept = guest.call(KeptPages { workload })?;
        let wrong = hinted.intersection(&kept);
        ensure!(
            wrong.ranges().is_empty(),
            "kept pages were hinted: {:x?}",
            wrong.ranges()
        );
    }
    guest.daemon()?.qmp().hint_done()?;
    // Others use what was hinted; the pages that were kept are as they were.
    guest.fill_and_free(64 * MIB, 5)?;
    for workload in workloads {
        let found = guest.call(Verify { workload })?;
        ensure!(
            found.wrong == 0 && found.pages > 0,
            "workload {workload}: {found:?}"
        );
    }
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn our_driver_hints_what_the_buddy_lists_of_a_guest_in_qemu_hold() -> Result<()> {
    hinted_is_what_was_free(Vmm::Qemu, Driver::Ours)
}

#[test]
fn the_c_driver_hints_what_the_buddy_lists_of_a_guest_in_qemu_hold() -> Result<()> {
    hinted_is_what_was_free(Vmm::Qemu, Driver::C)
}

#[test]
fn our_driver_hints_what_the_buddy_lists_of_user_mode_linux_hold() -> Result<()> {
    hinted_is_what_was_free(Vmm::Uml, Driver::Ours)
}

/// While a round holds its blocks, the free lists have shrunk by just what was hinted.
fn hinted_is_what_was_free(vmm: Vmm, driver: Driver) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, free) = Builder::new(&artifacts, vmm).boot_used(24 * MIB, driver)?;
    let before = free_in_lists(&mut guest)?;
    let round = guest.hint_all()?;
    let hinted = guest.daemon()?.qmp().hinted_ranges()?.bytes();
    let after = free_in_lists(&mut guest)?;
    let missing = before.saturating_sub(after);
    println!("MemFree {free}, free in lists {before}, then {after}: {missing} fewer; hinted {hinted} in {} blocks", round.blocks);
    ensure!(
        missing.abs_diff(hinted) < 4 * MIB,
        "{hinted} bytes were hinted, {missing} left the free lists"
    );
    ensure!(
        hinted >= free / 10 * 9,
        "{hinted} bytes were hinted of {free} that were free"
    );
    guest.daemon()?.qmp().hint_done()?;
    guest.farewell(free)
}

fn free_in_lists(guest: &mut Guest) -> Result<u64> {
    let page_size = guest.agent().hello().page_size;
    let zones = guest.call(BuddyInfo {})?;
    Ok(zones.iter().map(|zone| zone.free_from(0, page_size)).sum())
}
