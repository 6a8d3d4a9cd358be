// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests each driver with each device: load, inflate, deflate, a hint round and unload, all of it twice.

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Device, Driver, Guest};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// The size of the balloon, from the acceptance criteria.
const INFLATE_BY: u64 = 100 * MIB;
const SPARE: u64 = 24 * MIB;

#[test]
fn our_driver_with_our_device_in_qemu() -> Result<()> {
    work_through(Vmm::Qemu, Driver::Ours, Device::Ours)
}

#[test]
fn our_driver_with_qemus_device() -> Result<()> {
    work_through(Vmm::Qemu, Driver::Ours, Device::QemuOwn)
}

#[test]
fn the_c_driver_with_our_device_in_qemu() -> Result<()> {
    work_through(Vmm::Qemu, Driver::C, Device::Ours)
}

#[test]
fn the_c_driver_with_qemus_device() -> Result<()> {
    work_through(Vmm::Qemu, Driver::C, Device::QemuOwn)
}

#[test]
fn our_driver_with_our_device_in_user_mode_linux() -> Result<()> {
    work_through(Vmm::Uml, Driver::Ours, Device::Ours)
}

#[test]
fn the_c_driver_with_our_device_in_user_mode_linux() -> Result<()> {
    work_through(Vmm::Uml, Driver::C, Device::Ours)
}

fn work_through(vmm: Vmm, driver: Driver, device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    // With `init_on_alloc` the kernel clears the blocks that the driver allocates for hints. QEMU then sends these
    // pages again as zero pages, and its counts do not show the hints.
    let arguments = if device == Device::QemuOwn {
        "init_on_alloc=0"
    } else {
        ""
    };
    let mut guest = Builder::new(&artifacts, vmm)
        .device(device)
        .kernel_arguments(arguments)
        .boot()?;
    guest.kernel_log()?;
    for (time, seed) in [("first", 1), ("second", 2)] {
        // Gives the free memory contents, so it occupies memory of the host that hints and inflation can release.
        guest.fill_and_free(SPARE, seed)?;
        let before = guest.settled_memory_usage()?;
        guest.load(driver)?;
        inflate_and_deflate(&mut guest).with_context(|| format!("{time} time"))?;
        hint(&mut guest, device).with_context(|| format!("{time} time"))?;
        guest.unload(driver)?;
        guest
            .check_memory_and_log(before)
            .with_context(|| format!("after the {time} unloading"))?;
    }
    guest.power_off()?;
    Ok(())
}

fn inflate_and_deflate(guest: &mut Guest) -> Result<()> {
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let before = guest.settled_memory_usage()?;
    let in_use = guest.host_memory_in_use()?;
    guest.balloon_qmp()?.set_balloon(whole - INFLATE_BY)?;
    guest
        .balloon_qmp()?
        .wait_balloon(whole - INFLATE_BY, HANG_TIMEOUT)?;
    let less = before.free.saturating_sub(guest.mem_info()?.free());
    ensure!(
        less > INFLATE_BY - 8 * MIB,
        "the guest gave only {less} bytes of its free memory"
    );
    let freed = in_use.saturating_sub(guest.host_memory_in_use()?);
    ensure!(
        freed >= INFLATE_BY / 100 * 95,
        "the host got only {freed} bytes back"
    );
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
    guest.check_memory(before)
}

fn hint(guest: &mut Guest, device: Device) -> Result<()> {
    if device == Device::Ours {
        return guest.full_hint_round().map(drop);
    }
    let before = guest.settled_memory_usage()?;
    guest.start_qemu_migration()?;
    let hinted = guest.finish_qemu_migration()?.skipped();
    ensure!(
        hinted >= before.free / 10 * 9,
        "{hinted} bytes were hinted of {before:?} that were free"
    );
    guest.check_memory(before)
}
