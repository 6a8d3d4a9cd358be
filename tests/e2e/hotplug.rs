// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests unplugging the balloon device while the driver works.

use anyhow::{Context, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Device, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

#[test]
fn a_balloon_of_our_device_in_qemu_is_unplugged_while_it_works() -> Result<()> {
    unplugged(Device::Ours)
}

#[test]
fn a_balloon_of_qemus_device_is_unplugged_while_it_works() -> Result<()> {
    unplugged(Device::QemuOwn)
}

/// Unplugs the balloon while it inflates and, with our device, during a hint round. (QEMU's own device hints only
/// during a migration, when QEMU refuses to unplug.) Each time the guest gets its memory back, and the next balloon
/// works.
fn unplugged(device: Device) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::with_all_features(&artifacts, Vmm::Qemu, Device::None)
        .hotplug_slot()
        .boot()?;
    guest.fill_and_free(24 * MIB, 22)?;
    guest.load(Driver::Ours)?;
    let before = guest.settled_memory_usage()?;
    let features = ["stats", "free-page-hint"];
    for pages in [0, 1, 4096, 40_000] {
        guest.plug(device, &features, &[])?;
        let whole = guest.memory();
        guest.balloon_qmp()?.set_balloon(whole - 300 * MIB)?;
        guest.wait_counter("balloon_pages", pages, HANG_TIMEOUT)?;
        guest.unplug()?;
        guest
            .check_memory_and_log(before)
            .with_context(|| format!("pulled with {pages} pages"))?;
    }
    for blocks in [0, 1, 30, u64::MAX] {
        if device != Device::Ours {
            break;
        }
        guest.plug(device, &features, &[])?;
        let balloon = guest.balloon_qmp()?;
        balloon.hint_start()?;
        let hint_round = balloon.wait_hint("so many blocks", |now| {
            now.blocks >= blocks || now.status == "finished"
        })?;
        guest.unplug()?;
        guest
            .check_memory_and_log(before)
            .with_context(|| format!("pulled at {hint_round:?}"))?;
    }
    guest.plug(device, &features, &[])?;
    guest.exercise()?;
    guest.unplug()?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}
