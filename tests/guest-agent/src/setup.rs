// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file systems that every call relies on.

use std::fs::{self, File};

use anyhow::{Context, Result};
use guest_agent::protocol::{EARLY_MODULES, ONE_PROCESSOR_VARIABLE};
use nix::errno::Errno;
use nix::kmod::{finit_module, ModuleInitFlags};
use nix::mount::{mount, MsFlags};
use nix::sched::{sched_setaffinity, CpuSet};
use nix::unistd::Pid;

const FILE_SYSTEMS: [(&str, &str); 5] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/tmp"),
    ("debugfs", "/sys/kernel/debug"),
];

/// Has the processors' own lists of free pages kept short. Linux leaves tens of MiB in them after a process has ended,
/// which are free, but not in `MemFree`: a test could not tell them from memory that was lost.
pub fn shorten_pcp_lists() {
    // Best effort: a kernel without the control has no such lists to speak of.
    let _ = fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", "1000000");
}

/// Keeps this process with all that it will start, and the kernel's threads for compaction, on the first processor if
/// [`ONE_PROCESSOR_VARIABLE`] says so. Other work of the kernel has all of them.
pub fn pin_to_first_cpu() -> Result<()> {
    if std::env::var_os(ONE_PROCESSOR_VARIABLE).is_none() {
        return Ok(());
    }
    let mut first = CpuSet::new();
    first.set(0).context("there is no first processor")?;
    let this = Pid::from_raw(0);
    sched_setaffinity(this, &first).context("cannot stay on the first processor")?;
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|it| it.parse().ok()) else {
            continue;
        };
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.starts_with("kcompactd") {
            sched_setaffinity(Pid::from_raw(pid), &first)
                .with_context(|| format!("cannot keep {} on one processor", name.trim()))?;
        }
    }
    Ok(())
}

/// Loads the modules without which a kernel that has little built in does not find the way to the host.
pub fn load_early_modules() -> Result<()> {
    let entries = fs::read_dir(EARLY_MODULES).with_context(|| format!("no {EARLY_MODULES}"))?;
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        finit_module(&file, c"", ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
}

/// Mounts the kernel's file systems; one that this kernel does not have is passed over.
pub fn mount_all() -> Result<()> {
    for (kind, target) in FILE_SYSTEMS {
        if !target.starts_with("/sys/") {
            fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
        }
        match mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        ) {
            Ok(()) | Err(Errno::ENODEV | Errno::EBUSY | Errno::ENOENT) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot mount {kind} on {target}"))
            }
        }
    }
    Ok(())
}
