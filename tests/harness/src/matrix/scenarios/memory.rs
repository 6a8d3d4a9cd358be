// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Machines with other backends of guest memory, and a guest that allocates a gigantic page.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{ReadFile, WriteFile};
use nix::fcntl::{Flock, FlockArg};

use super::{boot, builder, exercise, TIMEOUT};
use crate::artifacts::Artifacts;
use crate::guest::{Device, Guest};
use crate::matrix::{Cell, HostUnsupported};
use crate::vmm::hardware::MemoryBackend;
use crate::MIB;

/// Huge pages that the host has reserved. The previous number is restored on drop.
struct HugePages {
    before: String,
    // Only one at a time, also among several runs of the tests, because the number belongs to the host.
    _alone: Flock<File>,
}

const HOST_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Reserves huge pages for `bytes` bytes, in addition to those that the host already has.
    fn reserve(bytes: u64) -> Result<Self> {
        let not_here =
            |what: &dyn std::fmt::Display| HostUnsupported(format!("{HOST_HUGE_PAGES}: {what}"));
        let file = File::open(HOST_HUGE_PAGES).map_err(|error| not_here(&error))?;
        let alone =
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| not_here(&error))?;
        let before = fs::read_to_string(HOST_HUGE_PAGES).map_err(|error| not_here(&error))?;
        let had: u64 = before
            .trim()
            .parse()
            .context("a strange number of huge pages")?;
        let wanted = had + bytes / (2 * MIB);
        // From here on, drop restores the number, also after an error.
        let this = Self {
            before,
            _alone: alone,
        };
        fs::write(HOST_HUGE_PAGES, wanted.to_string()).map_err(|error| not_here(&error))?;
        let now = fs::read_to_string(HOST_HUGE_PAGES)?;
        if now.trim() != wanted.to_string() {
            return Err(not_here(&format!("{} of {wanted} pages", now.trim())).into());
        }
        Ok(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(HOST_HUGE_PAGES, &self.before) {
            eprintln!("{HOST_HUGE_PAGES}: {error}");
        }
    }
}

pub fn on_huge_pages(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    let _pages = HugePages::reserve(cell.row.memory)?;
    exercise(builder(artifacts, cell), cell)
}

/// A folder on a disk, according to the file system hierarchy.
const ON_DISK: &str = "/var/tmp";

pub fn on_disk(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    let folder = tempfile::tempdir_in(ON_DISK)
        .map_err(|error| HostUnsupported(format!("{ON_DISK}: {error}")))?;
    if is_in_memory(folder.path())? {
        return Err(HostUnsupported(format!("{ON_DISK} lies in memory")).into());
    }
    let mut hardware = cell.row.hardware.clone();
    hardware.memory = MemoryBackend::File(folder.path().join("memory"));
    exercise(builder(artifacts, cell).hardware(hardware), cell)
}

fn is_in_memory(path: &Path) -> Result<bool> {
    let kind = nix::sys::statfs::statfs(path)?.filesystem_type();
    Ok(kind == nix::sys::statfs::TMPFS_MAGIC)
}

pub fn locked(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    let limits = fs::read_to_string("/proc/self/limits").context("no limits")?;
    let locked = limits
        .lines()
        .find(|line| line.starts_with("Max locked memory"));
    let soft = locked.and_then(|line| line.split_whitespace().nth(3));
    if soft != Some("unlimited") && !nix::unistd::geteuid().is_root() {
        return Err(HostUnsupported(format!("no more than {soft:?} bytes may be locked")).into());
    }
    exercise(builder(artifacts, cell), cell)
}

/// Guest memory that QEMU does not share. When a driver is ready, our device reports the problem, and the driver never
/// gets an answer. It can be unloaded, and the guest has all its memory.
pub fn private(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    const DAEMON_SAYS: &str = "shares no guest memory";
    if cell.entry.pair.device() != Device::Ours {
        return exercise(builder(artifacts, cell), cell);
    }
    let driver = cell.entry.pair.driver();
    let (mut guest, before) = boot(builder(artifacts, cell))?;
    guest.load_module(driver.module_name())?;
    let output = guest.daemon()?.process().output().clone();
    output.wait_for(
        DAEMON_SAYS,
        |line| line.contains(DAEMON_SAYS) && line.contains("share=on"),
        TIMEOUT,
    )?;
    let status = guest.daemon()?.virtio_status()?;
    ensure!(status.status != "running", "{status:?}");
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

/// The guest's control of gigantic pages.
const GIGANTIC_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";

/// A gigantic page from the guest's only area for one. The guest allocates the page without a driver, with a quarter of
/// the free memory in the balloon, whose pages may be in the area, and during a hint round.
pub fn gigantic_page(artifacts: &Artifacts, cell: &Cell) -> Result<()> {
    let (mut guest, before) = boot(builder(artifacts, cell))?;
    let driver = cell.entry.pair.driver();
    allocate_gigantic_page(&mut guest).context("without a driver")?;
    guest.load(driver)?;
    let whole = guest.balloon_qmp()?.balloon_actual()?;
    // As much as is free outside the area, so that pages of the balloon are in the area.
    let target = whole - (before.free - 1024 * MIB) / MIB * MIB;
    let quarter = whole - before.free / 4 / MIB * MIB;
    guest.balloon_qmp()?.set_balloon(target)?;
    guest.balloon_qmp()?.wait_balloon(target, TIMEOUT)?;
    guest.balloon_qmp()?.set_balloon(quarter)?;
    guest.balloon_qmp()?.wait_balloon(quarter, TIMEOUT)?;
    allocate_gigantic_page(&mut guest).context("with a balloon")?;
    guest.balloon_qmp()?.set_balloon(whole)?;
    guest.balloon_qmp()?.wait_balloon(whole, TIMEOUT)?;
    guest.hint_all()?;
    allocate_gigantic_page(&mut guest).context("in mid-round")?;
    guest.daemon()?.qmp().hint_done()?;
    guest.check_memory(before)?;
    guest.exercise_fully()?;
    guest.unload(driver)?;
    guest.check_and_power_off(before)
}

fn allocate_gigantic_page(guest: &mut Guest) -> Result<()> {
    let mut write = |text: &str| {
        guest.call(WriteFile {
            path: GIGANTIC_PAGES.to_owned(),
            text: text.to_owned(),
        })
    };
    write("1")?;
    let path = GIGANTIC_PAGES.to_owned();
    let got = guest.call(ReadFile { path })?;
    ensure!(got.trim() == "1", "the guest got no gigantic page: {got:?}");
    guest.call(WriteFile {
        path: GIGANTIC_PAGES.to_owned(),
        text: "0".to_owned(),
    })
}
