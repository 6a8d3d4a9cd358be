// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests kexec of a guest with a balloon: the new kernel takes over the device.

use std::time::Instant;

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Device, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

#[test]
fn a_new_kernel_in_qemu_takes_over_a_balloon_of_our_device() -> Result<()> {
    a_new_kernel_takes_over(Device::Ours)
}

#[test]
fn a_new_kernel_takes_over_a_balloon_of_qemus_device() -> Result<()> {
    a_new_kernel_takes_over(Device::QemuOwn)
}

/// The guest starts another kernel (kexec) with an inflated balloon and, with our device, with hinted blocks. The new
/// kernel has all memory, and its driver fills the balloon again.
fn a_new_kernel_takes_over(device: Device) -> Result<()> {
    const INFLATE_BY: u64 = 100 * MIB;
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::with_all_features(&artifacts, Vmm::Qemu, device)
        .kexec_kernel()
        .boot()?;
    guest.load(Driver::Ours)?;
    let target = guest.inflate_by(INFLATE_BY)?;
    if device == Device::Ours {
        let hint_round = guest.hint_all()?;
        ensure!(hint_round.bytes > 0, "nothing is held: {hint_round:?}");
    }
    guest.check_log()?;
    let then = Instant::now();
    guest.kexec()?;
    println!("{device:?}: a new kernel after {:?}", then.elapsed());
    guest.set_short_reporting_delay()?;
    let before = guest.settled_memory_usage()?;
    let filled = guest.fill_and_verify(before.free - 48 * MIB, 23)?;
    ensure!(
        filled.pages * 4096 > guest.memory() / 10 * 7,
        "only {} pages could be filled",
        filled.pages
    );
    guest.load(Driver::Ours)?;
    guest.wait_balloon_after_reload(target, HANG_TIMEOUT)?;
    if device == Device::Ours {
        guest.daemon()?.qmp().hint_done()?;
    }
    guest.exercise()?;
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}
