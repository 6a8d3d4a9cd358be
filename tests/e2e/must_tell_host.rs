// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests MUST_TELL_HOST: the guest uses a page of the balloon only after the device has acknowledged it.

use anyhow::{ensure, Result};
use harness::artifacts::Artifacts;
use harness::calls::{DropCachesAndCompact, Free, Verify};
use harness::guest::{Builder, Driver};
use harness::vmm::Vmm;
use harness::{HANG_TIMEOUT, MIB};

/// Memory that the balloon leaves free.
const LEFT: u64 = 64 * MIB;
/// Memory that a process needs then.
const WANTED: u64 = 128 * MIB;

#[test]
fn the_host_is_told_when_it_must_be_in_user_mode_linux() -> Result<()> {
    host_is_told(Vmm::Uml)
}

#[test]
fn the_host_is_told_when_it_must_be_in_qemu() -> Result<()> {
    host_is_told(Vmm::Qemu)
}

/// The driver accepts MUST_TELL_HOST, and a process that fills pages from the balloon finds none of them changed.
fn host_is_told(vmm: Vmm) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, vmm)
        .features(&["stats", "must-tell-host"])
        .boot()?;
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let status = guest.daemon()?.virtio_status()?;
    ensure!(
        status
            .negotiated_features
            .iter()
            .any(|name| name == "must-tell-host"),
        "{status:?}"
    );
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    for seed in 0..3 {
        guest.inflate_leaving(LEFT)?;
        guest.balloon_qmp()?.set_balloon(whole)?;
        // Starts while the balloon deflates, and uses pages that have left it.
        guest.call(DropCachesAndCompact {})?;
        let filled = guest.fill(LEFT / 2, 1, seed)?;
        guest.balloon_qmp()?.wait_balloon(whole, HANG_TIMEOUT)?;
        let more = guest.fill(2 * WANTED, 1, seed + 10)?;
        for workload in [filled.workload, more.workload] {
            let verified = guest.call(Verify { workload })?;
            ensure!(verified.wrong == 0, "{verified:?}");
            guest.call(Free { workload })?;
        }
    }
    guest.unload(Driver::Ours)?;
    guest.check_and_power_off(before)
}
