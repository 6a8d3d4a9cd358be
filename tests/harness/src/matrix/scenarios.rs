// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The scenarios that cells run.

mod extra_devices;
mod memory;
mod memory_hotplug;
mod resets;

use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::Cell;
use crate::artifacts::Artifacts;
use crate::check::MemoryUsage;
use crate::guest::{Builder, Device, Driver, Guest};
use crate::MIB;

pub use memory_hotplug::DimmUnplug;
pub use resets::Reset;

/// The timeout of operations that move much memory.
const TIMEOUT: Duration = Duration::from_secs(600);

/// A scenario that a cell runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// [`Guest::exercise_fully`].
    Exercise,
    /// The same, with guest memory on huge pages, if the host has them.
    OnHugePages,
    /// The same, with guest memory in a file on a disk.
    OnDisk,
    /// The same, with locked guest memory, if the host allows it.
    Locked,
    /// The same, and the guest allocates a gigantic page with a balloon and during a hint round.
    GiganticPage,
    /// Our device cannot map the guest's memory: QEMU reports it, and the guest is unharmed. QEMU's own device works.
    Private,
    /// The balloon is behind an IOMMU, which no balloon supports: QEMU or the driver reports it.
    BehindIommu,
    /// A DIMM is plugged and unplugged.
    DimmUnplug(DimmUnplug),
    /// virtio-mem grows and shrinks.
    VirtioMem,
    /// The machine is reset.
    Reset(Reset),
    /// The machine has two balloons.
    TwoBalloons,
    /// The balloon takes memory that the guest can only free by swapping.
    Swap,
}

/// Runs the scenario of a cell.
///
/// # Errors
///
/// Fails if a check fails, or with [`super::HostUnsupported`] if the host lacks something.
pub fn run_scenario(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    if let (Some(series), Driver::Ours) = (cell.row.series, cell.entry.pair.driver()) {
        let kernel = artifacts.series_kernels.get(series);
        ensure!(
            kernel.is_some_and(|kernel| kernel.our_driver.is_some()),
            "our driver was not built for series {series}"
        );
    }
    match cell.row.scenario {
        Scenario::Exercise => exercise(builder(artifacts, cell), cell),
        Scenario::OnHugePages => memory::on_huge_pages(artifacts, cell),
        Scenario::OnDisk => memory::on_disk(artifacts, cell),
        Scenario::Locked => memory::locked(artifacts, cell),
        Scenario::GiganticPage => memory::gigantic_page(artifacts, cell),
        Scenario::Private => memory::private(artifacts, cell),
        Scenario::BehindIommu => extra_devices::behind_iommu(artifacts, cell),
        Scenario::DimmUnplug(dimm) => memory_hotplug::dimm(artifacts, cell, dimm),
        Scenario::VirtioMem => memory_hotplug::virtio_mem(artifacts, cell),
        Scenario::Reset(reset) => resets::reset(artifacts, cell, reset),
        Scenario::TwoBalloons => extra_devices::two_balloons(artifacts, cell),
        Scenario::Swap => extra_devices::swap(artifacts, cell),
    }
}

/// Returns the machine of a cell.
fn builder<'a>(artifacts: &'a Artifacts, cell: &'a Cell) -> Builder<'a> {
    let row = &cell.row;
    let device = cell.entry.pair.device();
    // A migration with QEMU's device skips hinted pages. A kernel that clears memory at each allocation writes to them.
    let arguments = match device {
        Device::QemuOwn if row.arguments.is_empty() => "init_on_alloc=0",
        _ => row.arguments,
    };
    let builder = Builder::new(artifacts, row.vmm)
        .device(device)
        .memory(row.memory)
        .kernel_arguments(arguments)
        .hardware(row.hardware.clone());
    let builder = match row.series {
        Some(series) => builder.series(series),
        None => builder,
    };
    if device == Device::QemuOwn {
        let mut options = row.properties.to_vec();
        options.push("free-page-reporting=on");
        if row.scenario == Scenario::BehindIommu {
            options.push("disable-legacy=on");
        }
        builder.device_options(&options)
    } else {
        builder.features(row.features).properties(row.properties)
    }
}

/// Boots a guest, fills and frees a part of its memory, and returns the guest with its memory usage.
fn boot(builder: Builder<'_>) -> Result<(Guest, MemoryUsage)> {
    /// The maximum that is filled, in bytes, because large guests are sparse.
    const FILLED: u64 = 512 * MIB;
    /// The memory that stays unfilled in small guests, in bytes.
    const SPARE: u64 = 24 * MIB;
    let mut guest = builder.boot()?;
    // Kernels before 7 do not have this control.
    let _ = guest.set_short_reporting_delay();
    let free = guest.mem_info()?.free();
    guest.fill_and_free((free / 2).min(SPARE).max(free.saturating_sub(FILLED)), 30)?;
    let before = guest.settled_memory_usage()?;
    Ok((guest, before))
}

/// Boots a guest, loads the driver, exercises it, unloads it, and switches the guest off.
fn exercise(builder: Builder<'_>, cell: &Cell) -> Result<()> {
    let driver = cell.entry.pair.driver();
    let (mut guest, before) = boot(builder)?;
    guest.load(driver).context("loading the driver")?;
    guest.exercise_fully()?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}
