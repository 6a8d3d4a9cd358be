// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that hints are correct: kept pages are never hinted, and nearly all free memory is.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::calls::{Fill, KeptPages, Release, Verify};
use harness::guest::{Builder, Driver};
use harness::vmm::Vmm;
use harness::MIB;

/// The guest keeps one page in this many: about one per two blocks of the largest order.
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

/// The guest keeps pages all over its memory. None of them is hinted, and all keep their contents while the memory
/// around them is hinted and reused.
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
    let settled_memory_usage = guest.settled_memory_usage()?;
    let hint_round = guest.hint_all()?;
    let hinted = guest.daemon()?.qmp().hinted_ranges()?;
    ensure!(hinted.bytes() > 0, "nothing was hinted: {hint_round:?}");
    ensure!(
        hinted.bytes() == hint_round.pages_cleared * 4096,
        "{} bytes of clear bits, {hint_round:?}",
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
    guest.check_memory_uncompacted(settled_memory_usage)?;
    // Other processes use the hinted memory. The kept pages must not change.
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

/// While the driver keeps the hinted blocks, the kernel's memory use exceeds its earlier use by the hinted bytes,
/// within a tolerance.
fn hinted_is_what_was_free(vmm: Vmm, driver: Driver) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let (mut guest, before) = Builder::new(&artifacts, vmm).boot_filled(24 * MIB, driver)?;
    let hint_round = guest.hint_all()?;
    let hinted = guest.daemon()?.qmp().hinted_ranges()?.bytes();
    println!(
        "{before:?}; hinted {hinted} in {} blocks",
        hint_round.blocks
    );
    // The counters of our driver are zero after loading.
    let reclaimed = match driver {
        Driver::Ours => Some(0),
        Driver::C => None,
    };
    guest.wait_hinted_memory_use(before.used, hinted, reclaimed, 0)?;
    ensure!(
        hinted >= before.free / 10 * 9,
        "{hinted} bytes were hinted of {before:?} that were free"
    );
    guest.daemon()?.qmp().hint_done()?;
    guest.check_and_power_off(before)
}

#[test]
fn fragmented_memory_of_a_guest_in_qemu_is_hinted_as_well() -> Result<()> {
    fragmented_memory_is_hinted_as_well(Vmm::Qemu)
}

#[test]
fn fragmented_memory_of_user_mode_linux_is_hinted_as_well() -> Result<()> {
    fragmented_memory_is_hinted_as_well(Vmm::Uml)
}

/// With one kept page in each MiB there is hardly a free block of the largest order, and the C driver hints almost
/// nothing. Our driver hints the free blocks of order `hint_min_order` and above.
fn fragmented_memory_is_hinted_as_well(vmm: Vmm) -> Result<()> {
    const LARGEST: usize = 10;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm)
        .kernel_arguments("init_on_alloc=0")
        .boot()?;
    let workloads = guest.fragment(256, 16 * MIB, 20)?;
    if Driver::each().contains(&Driver::C) {
        guest.load(Driver::C)?;
        let before = guest.memory_usage()?;
        let free = guest.free_blocks()?;
        let theirs = guest.hint_all()?.bytes;
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory_uncompacted(before)?;
        guest.unload(Driver::C)?;
        println!(
            "free {}, in the largest blocks {}; the C driver hinted {theirs}",
            free.free_bytes_from_order(0),
            free.free_bytes_from_order(LARGEST)
        );
        ensure!(
            theirs * 100 < free.free_bytes_from_order(0) * 5,
            "the memory is not fragmented: {free:?}"
        );
    }
    for order in [0, 4, 6] {
        guest.load_with(Driver::Ours, &format!("hint_min_order={order}"))?;
        let before = guest.memory_usage()?;
        let free = guest.free_blocks()?;
        let hint_round = guest.hint_all()?;
        let large_enough = free.free_bytes_from_order(order);
        println!("order {order}: {large_enough} are free; {hint_round:?}");
        ensure!(
            hint_round.bytes * 100 >= large_enough * 80,
            "{hint_round:?} of {large_enough} bytes that were free in blocks of order {order} or more"
        );
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory_uncompacted(before)?;
        guest.unload(Driver::Ours)?;
    }
    for workload in workloads {
        let found = guest.call(Verify { workload })?;
        ensure!(found.wrong == 0 && found.pages > 0, "{found:?}");
    }
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}
