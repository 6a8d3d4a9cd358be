// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests binding and unbinding the driver through sysfs.

use anyhow::{bail, Context, Result};
use harness::artifacts::Artifacts;
use harness::calls::WriteFile;
use harness::guest::{Builder, Device, Driver, Guest};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

#[test]
fn the_driver_is_unbound_and_bound_while_it_works() -> Result<()> {
    const INFLATE_BY: u64 = 100 * MIB;
    let artifacts = Artifacts::load()?;
    for &vmm in Vmm::each() {
        let mut guest = Builder::with_all_features(&artifacts, vmm, Device::Ours).boot()?;
        guest.set_short_reporting_delay()?;
        guest.load(Driver::Ours)?;
        // Measured while unbound: pages in a report count as used.
        let name = guest.balloon_device()?.name;
        rebind(&mut guest, "unbind", &name)?;
        let before = guest.settled_memory_usage()?;
        rebind(&mut guest, "bind", &name)?;
        guest.daemon()?.wait_driver()?;
        let whole = guest.balloon_qmp()?.balloon_actual()?;
        let times = vmm.repeats(if vmm == Vmm::Uml { 40 } else { 6 });
        for time in 0..times {
            let name = guest.balloon_device()?.name;
            let balloon = guest.balloon_qmp()?;
            balloon.set_balloon(whole - INFLATE_BY)?;
            if time % 2 == 1 {
                balloon.hint_start()?;
            }
            rebind(&mut guest, "unbind", &name)?;
            guest
                .check_memory(before)
                .with_context(|| format!("{vmm:?}, time {time}"))?;
            guest.balloon_qmp()?.set_balloon(whole)?;
            rebind(&mut guest, "bind", &name)?;
            guest.daemon()?.wait_driver()?;
        }
        guest.exercise()?;
        guest.unload(Driver::Ours)?;
        guest.check_and_power_off(before)?;
    }
    Ok(())
}

fn rebind(guest: &mut Guest, what: &str, name: &str) -> Result<()> {
    guest.call(WriteFile {
        path: format!(
            "/sys/bus/virtio/drivers/{}/{what}",
            Driver::Ours.module_name()
        ),
        text: name.to_owned(),
    })
}

#[test]
fn the_device_is_bound_and_unbound_through_sysfs() -> Result<()> {
    const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_balloon_rs";
    const INFLATE_BY: u64 = 40 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .features(&["stats", "free-page-hint", "deflate-on-oom"])
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    let devices = guest.devices_with_counters()?;
    let [device] = devices.as_slice() else {
        bail!("not one device: {devices:?}");
    };
    guest.balloon_qmp()?.set_balloon(whole - INFLATE_BY)?;
    for _ in 0..20 {
        // Unbinds also while the balloon inflates.
        guest.call(WriteFile {
            path: format!("{DRIVER}/unbind"),
            text: device.clone(),
        })?;
        guest.check_memory(before)?;
        guest.call(WriteFile {
            path: format!("{DRIVER}/bind"),
            text: device.clone(),
        })?;
    }
    guest
        .balloon_qmp()?
        .wait_balloon(whole - INFLATE_BY, HANG_TIMEOUT)?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}
