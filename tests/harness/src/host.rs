// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Information from the host's kernel about its processors and processes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::sys::time_stamp_counter;

/// QEMU's accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accelerator {
    /// The environment variable (`kvm` or `tcg`) that overrides [`Accelerator::detect`].
    pub const VARIABLE: &'static str = "VIRTIO_BALLOON_RS_ACCEL";

    /// Returns the accelerator that [`Accelerator::VARIABLE`] names. Otherwise returns KVM if the processor supports
    /// virtualisation and `/dev/kvm` opens.
    ///
    /// The device file alone is not enough: it may exist on a machine that cannot run an ordinary kernel.
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

/// Returns the frequency of the host's time stamp counter in kHz. Returns `None` if the host has no such counter, or one
/// whose frequency changes.
///
/// The first call takes [`CALIBRATION`]. A busy host does not change the result.
pub fn time_stamp_counter_khz() -> Option<u64> {
    static KHZ: OnceLock<Option<u64>> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let processor = fs::read_to_string("/proc/cpuinfo").ok()?;
        processor
            .split_whitespace()
            .find(|flag| *flag == "constant_tsc")?;
        let (time, count) = simultaneous_sample()?;
        thread::sleep(CALIBRATION);
        let (end_time, end_count) = simultaneous_sample()?;
        let elapsed = end_time.duration_since(time).as_nanos();
        let khz = u128::from(end_count.checked_sub(count)?) * 1_000_000 / elapsed;
        u64::try_from(khz).ok()
    })
}

/// How long the time stamp counter is compared with the clock.
const CALIBRATION: Duration = Duration::from_millis(50);

/// Returns the time and the time stamp counter at that time: of many samples, the one that took least.
fn simultaneous_sample() -> Option<(Instant, u64)> {
    let mut best: Option<(Duration, Instant, u64)> = None;
    for _ in 0..1000 {
        let before = Instant::now();
        let count = time_stamp_counter()?;
        let took = before.elapsed();
        if best.is_none_or(|(least, _, _)| took < least) {
            best = Some((took, before, count));
        }
    }
    best.map(|(_, time, count)| (time, count))
}

/// What a process has done, by the ids of its threads.
#[derive(Clone, Debug, Default)]
pub struct Activity(BTreeMap<OsString, ThreadActivity>);

/// What a thread or process has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThreadActivity {
    /// The number of voluntary context switches. After each one, the thread was woken.
    pub voluntary_switches: u64,
    /// The processor time, in clock ticks.
    pub ticks: u64,
}

impl Activity {
    /// Returns what the process has done since `before`, summed over its threads. Returns `None` if a thread has ended:
    /// what it has done is unknown.
    #[must_use]
    pub fn since(&self, before: &Self) -> Option<ThreadActivity> {
        let has_ended = |thread: &OsString| !self.0.contains_key(thread);
        if before.0.keys().any(has_ended) {
            return None;
        }
        let mut total = ThreadActivity::default();
        for (thread, now) in &self.0 {
            let before = before.0.get(thread).copied().unwrap_or_default();
            total.voluntary_switches += now
                .voluntary_switches
                .checked_sub(before.voluntary_switches)?;
            total.ticks += now.ticks.checked_sub(before.ticks)?;
        }
        Some(total)
    }
}

/// Returns the activity of a process so far.
///
/// # Errors
///
/// Fails if the process has ended.
pub fn activity(process: u32) -> Result<Activity> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"))
        .with_context(|| format!("no process {process}"))?;
    let mut threads = BTreeMap::new();
    for task in tasks {
        let task = task?;
        // A thread may end at any time.
        let read = |name| fs::read_to_string(task.path().join(name)).ok();
        let Some((status, stat)) = read("status").zip(read("stat")) else {
            continue;
        };
        let voluntary_switches = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
            .and_then(|number| number.trim().parse().ok())
            .context("no count of switches")?;
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(str::parse::<u64>)
            .sum::<Result<_, _>>()
            .context("no count of ticks")?;
        let activity = ThreadActivity {
            voluntary_switches,
            ticks,
        };
        threads.insert(task.file_name(), activity);
    }
    Ok(Activity(threads))
}

/// Returns the size of the guest's memory file that is allocated on the host, in bytes. See [`guest_memory_file`].
///
/// # Errors
///
/// Fails if the process maps no memory file.
pub fn guest_memory_in_use(vmm: u32) -> Result<u64> {
    const BLOCK: u64 = 512;
    let file = fs::metadata(guest_memory_file(vmm)?).context("the guest's memory is gone")?;
    Ok(file.blocks() * BLOCK)
}

/// Returns the path of a guest's memory file, for opening: the largest deleted file or memfd that its VMM maps.
///
/// An open file without a mapping may belong to another guest: a VMM inherits the file descriptors that a device of
/// this process has received.
///
/// # Errors
///
/// Fails if the process maps no memory file.
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

/// Parses the inode and the path from a line of `/proc/PID/maps`.
fn mapped_file(line: &str) -> Option<(u64, &str)> {
    let mut rest = line;
    let mut inode = "";
    // The fields are addresses, permissions, offset, device, inode and path. The path may contain spaces.
    for _ in 0..5 {
        (inode, rest) = rest.trim_start().split_once(' ')?;
    }
    Some((inode.parse().ok()?, rest.trim_start()))
}

/// Returns a folder for a guest's memory file of `bytes` bytes: `/dev/shm` if it has room, `/tmp` otherwise.
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
