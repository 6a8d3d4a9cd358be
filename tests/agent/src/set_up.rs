// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file systems that every call relies on.

use std::fs;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, MsFlags};

const FILE_SYSTEMS: [(&str, &str); 5] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/tmp"),
    ("debugfs", "/sys/kernel/debug"),
];

/// Has the processors' own lists of free pages kept short. Linux leaves tens of MiB in them after a process has ended,
/// which are free, but not in `MemFree`: a test could not tell them from memory that was lost.
pub fn keep_free_pages_together() {
    // Best effort: a kernel without the control has no such lists to speak of.
    let _ = fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", "1000000");
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
