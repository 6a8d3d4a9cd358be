// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host's kernel says about its processors and processes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// How QEMU runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor's virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accelerator {
    /// The environment variable (`kvm` or `tcg`) that overrides [`Accelerator::detect`].
    pub const VARIABLE: &'static str = "VIRTIO_BALLOON_RS_ACCEL";

    /// KVM if the processor says that it can virtualise and `/dev/kvm` opens. The device alone proves nothing: it may be
    /// there on a machine that cannot run an ordinary kernel.
    #[must_use]
    pub fn detect() -> Self {
        match std::env::var(Self::VARIABLE).as_deref() {
            Ok("kvm") => return Self::Kvm,
            Ok("tcg") => return Self::Tcg,
            _ => {}
        }
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let able = processor
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm");
        let opens = || {
            fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_ok()
        };
        if able && opens() {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }
}

/// Where a process stands: what it has used up so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// How often its threads went to sleep of their own will, hence were woken.
    pub voluntary_switches: u64,
    /// Processor time, in clock ticks.
    pub ticks: u64,
}

/// The activity of a process, over all its threads.
///
/// # Errors
///
/// If it is no more.
pub fn activity(process: u32) -> Result<Activity> {
    let mut total = Activity::default();
    let tasks = fs::read_dir(format!("/proc/{process}/task"))
        .with_context(|| format!("no process {process}"))?;
    for task in tasks {
        let task = task?.path();
        let status = fs::read_to_string(task.join("status"))?;
        let voluntary_switches = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        total.voluntary_switches += voluntary_switches
            .and_then(|number| number.trim().parse::<u64>().ok())
            .context("no count of switches")?;
        let stat = fs::read_to_string(task.join("stat"))?;
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(str::parse::<u64>);
        total.ticks += ticks.sum::<Result<u64, _>>().context("no count of ticks")?;
    }
    Ok(total)
}

/// Bytes that the memory file of a guest occupies on the host: the largest deleted file or memfd that its VMM holds.
///
/// # Errors
///
/// If the process holds none.
pub fn guest_memory_in_use(vmm: u32) -> Result<u64> {
    const BLOCK: u64 = 512;
    let file = fs::metadata(guest_memory_file(vmm)?).context("the guest's memory is gone")?;
    Ok(file.blocks() * BLOCK)
}

/// The memory file of a guest, as a path that can be opened: the largest deleted file or memfd that its VMM maps.
///
/// What it only holds may be another guest's, and come from this process: a device in a test gets descriptors that are
/// not closed when a VMM is started.
///
/// # Errors
///
/// If the process maps none.
pub fn guest_memory_file(vmm: u32) -> Result<PathBuf> {
    let folder = format!("/proc/{vmm}/fd");
    let maps = format!("/proc/{vmm}/maps");
    let maps = fs::read_to_string(&maps).with_context(|| format!("cannot read {maps}"))?;
    let mapped: BTreeSet<(u64, &str)> = maps.lines().filter_map(mapped_file).collect();
    let mut largest = None;
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {folder}"))? {
        let path = entry?.path();
        let (Ok(target), Ok(file)) = (fs::read_link(&path), fs::metadata(&path)) else {
            continue;
        };
        let target = target.to_string_lossy();
        if target.ends_with(DELETED) && mapped.contains(&(file.ino(), &*target)) {
            largest = largest.max(Some((file.len(), path)));
        }
    }
    largest
        .map(|(_, path)| path)
        .with_context(|| format!("process {vmm} maps no memory file"))
}

const DELETED: &str = " (deleted)";

/// The inode and the path in a line of `/proc/PID/maps`.
fn mapped_file(line: &str) -> Option<(u64, &str)> {
    let mut rest = line;
    let mut inode = "";
    // Addresses, permissions, offset, device, inode; and then the path, which may hold spaces.
    for _ in 0..5 {
        (inode, rest) = rest.trim_start().split_once(' ')?;
    }
    Some((inode.parse().ok()?, rest.trim_start()))
}

/// A folder in memory with room for `bytes`, where a VMM may put a guest's memory file.
#[must_use]
pub fn memory_folder(bytes: u64) -> &'static Path {
    let folder = Path::new("/dev/shm");
    let room = nix::sys::statvfs::statvfs(folder)
        .map_or(0, |fs| fs.blocks_available() * fs.fragment_size());
    if room > bytes {
        folder
    } else {
        Path::new("/tmp")
    }
}
