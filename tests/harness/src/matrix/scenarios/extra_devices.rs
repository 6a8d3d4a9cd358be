// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Machines with two balloons, with swap, and with an unusable balloon.

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{Fill, Free, Verify, WaitBalloonDevices};
use serde_json::{json, Value};

use super::{boot, builder, TIMEOUT};
use crate::artifacts::Artifacts;
use crate::check::kernel_warnings;
use crate::daemon::Daemon;
use crate::guest::{Device, Guest};
use crate::matrix::Cell;
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::{HANG_TIMEOUT_MS, MIB};

/// A balloon behind an IOMMU.
///
/// The page numbers of a balloon are physical addresses, which an IOMMU must not translate. Our device does not offer
/// the feature, and QEMU does not start with it. A driver declines the feature, and QEMU's own device then refuses the
/// driver. The guest is unharmed.
pub fn behind_iommu(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    const QEMU_SAYS: &str = "iommu_platform=true is not supported by the device";
    const KERNEL_SAYS: &str = "device refuses features";
    if cell.entry.pair.device() == Device::Ours {
        let error = builder(artifacts, cell).boot().err();
        let error = error.context("QEMU has started")?;
        ensure!(format!("{error:#}").contains(QEMU_SAYS), "{error:#}");
        return Ok(());
    }
    let driver = cell.entry.pair.driver();
    let (mut guest, before) = boot(builder(artifacts, cell))?;
    guest.load(driver)?;
    let balloon = guest.balloon_device()?;
    ensure!(balloon.driver.is_none(), "{balloon:?}");
    let log = guest.kernel_log()?;
    let (refusals, others): (Vec<_>, Vec<_>) = kernel_warnings(&log)
        .into_iter()
        .partition(|line| line.text.contains(KERNEL_SAYS));
    ensure!(!refusals.is_empty() && others.is_empty(), "{log:?}");
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

/// Two balloons. Each one takes a quarter of the free memory, then answers a request for statistics and runs a hint
/// round. At the end, both deflate.
pub fn two_balloons(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    let driver = cell.entry.pair.driver();
    let scratch = Scratch::new()?;
    let mut second = Daemon::start(&artifacts.daemon, &scratch, cell.row.features, &[])?;
    let device = json!({
        "driver": "vhost-user-test-device-pci", "chardev": "second", "id": "second0",
        "virtio-id": 5, "num_vqs": 5, "vq_size": 128, "config_size": 16,
    });
    let mut hardware = cell.row.hardware.clone();
    hardware.arguments = vec![
        "-chardev".to_owned(),
        format!("socket,id=second,path={}", second.socket().display()),
        "-device".to_owned(),
        device.to_string(),
    ];
    let (mut guest, before) = boot(builder(artifacts, cell).hardware(hardware))?;
    guest.load(driver)?;
    guest.call(WaitBalloonDevices {
        count: 2,
        driver_ok: true,
        timeout_ms: HANG_TIMEOUT_MS,
    })?;
    second.wait_driver()?;
    let by = before.free / 4 / MIB * MIB;
    let wholes = [
        guest.balloon_qmp()?.balloon_actual()?,
        second.qmp().balloon_actual()?,
    ];
    let targets = wholes.map(|whole| whole - by);
    both(&mut guest, &mut second, targets)?;
    let left = guest.settled_memory_usage()?;
    ensure!(
        left.free.abs_diff(before.free - 2 * by) < 8 * MIB,
        "{left:?} of {before:?} is left with {by} in each balloon"
    );
    for first in [true, false] {
        let balloon = if first {
            guest.daemon()?.qmp()
        } else {
            second.qmp()
        };
        let statistics: Value = balloon.query("query-guest-stats")?;
        ensure!(
            statistics.pointer("/stats/stat-total-memory").is_some(),
            "{statistics}"
        );
        balloon.hint_start()?;
        let hint_round = balloon.wait_hint_status("finished")?;
        ensure!(hint_round.bytes > 0, "{hint_round:?}");
        balloon.hint_done()?;
        // The next hint round needs the free blocks of this one.
        guest.check_memory(left).context("after a round")?;
    }
    both(&mut guest, &mut second, wholes)?;
    guest.check_memory(before)?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

fn both(guest: &mut Guest, second: &mut Daemon, targets: [u64; 2]) -> Result<()> {
    let each = |balloon: &mut Qmp, target| balloon.set_balloon(target);
    each(guest.balloon_qmp()?, targets[0])?;
    each(second.qmp(), targets[1])?;
    guest.balloon_qmp()?.wait_balloon(targets[0], TIMEOUT)?;
    second.qmp().wait_balloon(targets[1], TIMEOUT)
}

/// A balloon with swap. A process keeps more memory than the balloon leaves, so a part of it is swapped out and must
/// come in again unchanged.
pub fn swap(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    let driver = cell.entry.pair.driver();
    let scratch = Scratch::new()?;
    let disk = scratch.path("swap");
    std::fs::File::create(&disk)?.set_len(512 * MIB)?;
    let mut hardware = cell.row.hardware.clone();
    hardware.arguments = vec![
        "-drive".to_owned(),
        format!("file={},if=none,id=swap,format=raw", disk.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=swap".to_owned(),
    ];
    let (mut guest, _) = boot(builder(artifacts, cell).hardware(hardware))?;
    guest.load_module("virtio_blk")?;
    for command in ["mkswap /dev/vda", "swapon /dev/vda"] {
        guest.shell(command)?;
    }
    let before = guest.settled_memory_usage()?;
    guest.load(driver)?;
    let filled = guest.call(Fill {
        bytes: before.free / 2,
        keep_every: 1,
        seed: 34,
    })?;
    let workload = filled.workload;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    // A quarter of the filled memory must be swapped out.
    let target = whole - (before.free / 8 * 5) / MIB * MIB;
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, TIMEOUT)?;
    let memory = guest.mem_info()?;
    let swapped = memory.field("SwapTotal") - memory.field("SwapFree");
    ensure!(
        swapped > before.free / 16,
        "only {swapped} bytes went to swap"
    );
    for _ in 0..2 {
        let found = guest.call(Verify { workload })?;
        ensure!(found.wrong == 0 && found.pages == filled.kept, "{found:?}");
        guest.balloon_qmp()?.set_balloon(whole)?;
        guest.balloon_qmp()?.wait_balloon(whole, TIMEOUT)?;
    }
    guest.call(Free { workload })?;
    guest.shell("swapoff /dev/vda")?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}
