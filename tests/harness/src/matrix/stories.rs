// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is done in a cell.

mod memory;
mod plugging;
mod restarts;
mod several;

use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::Cell;
use crate::artifacts::Artifacts;
use crate::check::Settled;
use crate::guest::{Builder, Device, Driver, Guest};
use crate::MIB;

pub use plugging::Dimm;
pub use restarts::Reset;

/// How long anything may take that moves much memory.
const LIMIT: Duration = Duration::from_secs(600);

/// What is done in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Story {
    /// Everything once, [`Guest::exercise_whole`].
    Exercise,
    /// The same, with memory on huge pages, if the host has them.
    OnHugePages,
    /// The same, with memory in a file on a disk.
    OnDisk,
    /// The same, with memory locked, if the host lets it be.
    Locked,
    /// The same, and a gigantic page is allocated with a balloon and in mid-round.
    GiganticPage,
    /// Our device cannot see the guest's memory: QEMU says so, and the guest comes to no harm. QEMU's own device works.
    Private,
    /// The balloon must be used through an IOMMU, which none can: QEMU or the driver says so.
    BehindIommu,
    /// A DIMM comes and goes.
    Dimm(Dimm),
    /// virtio-mem's memory comes and goes.
    VirtioMem,
    /// The machine is reset.
    Reset(Reset),
    /// Two devices.
    TwoBalloons,
    /// The balloon takes what only swapping frees.
    Swap,
}

/// Does what the cell says.
///
/// # Errors
///
/// If anything is not as it should be; [`super::NotHere`] if the host lacks something.
pub fn tell(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    if let (Some(series), Driver::Ours) = (cell.row.series, cell.entry.pair.driver()) {
        let kernel = artifacts.peers.get(series);
        ensure!(
            kernel.is_some_and(|kernel| kernel.our_driver.is_some()),
            "our driver was not built for series {series}"
        );
    }
    match cell.row.story {
        Story::Exercise => exercise(builder(artifacts, cell), cell),
        Story::OnHugePages => memory::on_huge_pages(artifacts, cell),
        Story::OnDisk => memory::on_disk(artifacts, cell),
        Story::Locked => memory::locked(artifacts, cell),
        Story::GiganticPage => memory::gigantic_page(artifacts, cell),
        Story::Private => memory::private(artifacts, cell),
        Story::BehindIommu => several::behind_iommu(artifacts, cell),
        Story::Dimm(dimm) => plugging::dimm(artifacts, cell, dimm),
        Story::VirtioMem => plugging::virtio_mem(artifacts, cell),
        Story::Reset(reset) => restarts::reset(artifacts, cell, reset),
        Story::TwoBalloons => several::two_balloons(artifacts, cell),
        Story::Swap => several::swap(artifacts, cell),
    }
}

/// The machine of a cell.
fn builder<'a>(artifacts: &'a Artifacts, cell: &'a Cell) -> Builder<'a> {
    let row = &cell.row;
    let device = cell.entry.pair.device();
    // QEMU's device leaves out of a migration what is hinted, and a kernel that clears memory at each allocation writes to it.
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
        if row.story == Story::BehindIommu {
            options.push("disable-legacy=on");
        }
        builder.device_options(&options)
    } else {
        builder.features(row.features).properties(row.properties)
    }
}

/// Boots a guest, some of whose free memory has contents, and returns it with what is free then.
fn boot(builder: Builder<'_>) -> Result<(Guest, Settled)> {
    /// What is filled of large guests, which are sparse.
    const FILLED: u64 = 512 * MIB;
    /// What is left of small ones.
    const SPARE: u64 = 24 * MIB;
    let mut guest = builder.boot()?;
    // Kernels before 7 do not have the control.
    let _ = guest.hurry_reporting();
    let free = guest.mem_info()?.free();
    guest.fill_and_free((free / 2).min(SPARE).max(free.saturating_sub(FILLED)), 30)?;
    let before = guest.settled()?;
    Ok((guest, before))
}

/// Boots a guest, loads the driver, exercises it, unloads it, and switches the guest off.
fn exercise(builder: Builder<'_>, cell: &Cell) -> Result<()> {
    let driver = cell.entry.pair.driver();
    let (mut guest, before) = boot(builder)?;
    guest.load(driver).context("loading the driver")?;
    guest.exercise_whole()?;
    guest.unload(driver)?;
    guest.farewell(before)
}
