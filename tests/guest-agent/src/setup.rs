// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Setup of the guest: file systems, early modules, per-CPU lists and processor affinity.

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

/// Keeps the per-CPU lists of free pages short.
///
/// After a process has ended, Linux leaves tens of MiB on these lists. These pages are free, but not in `MemFree`: a
/// test could not tell them from lost memory.
pub fn shorten_pcp_lists() {
    // Best effort: a kernel without the control has only short lists.
    let _ = fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", "1000000");
}

/// Pins this process, its future children and the kernel's compaction threads to the first processor if
/// [`ONE_PROCESSOR_VARIABLE`] is set. Other kernel threads keep all processors.
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

/// Loads the modules that the connection to the host needs, for kernels that do not have them built in.
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

/// Mounts the kernel's file systems. Skips a file system that the kernel lacks or has already mounted.
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
