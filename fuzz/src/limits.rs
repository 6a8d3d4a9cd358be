// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What no input may exceed: memory and file descriptors.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::sys;

/// The most memory that the code under test may allocate at once for one input, in bytes. The largest legitimate users
/// are a request with 65536 page frame numbers, and four channels of a migration with their buffers.
const MEMORY: usize = 16 << 20;

/// The file descriptors of this process, with what they refer to.
type Descriptors = BTreeMap<RawFd, PathBuf>;

/// The state of the process before an input.
pub struct Limits {
    allocated: usize,
    descriptors: Descriptors,
}

impl Limits {
    /// Starts the measurement.
    pub fn start() -> Self {
        let descriptors = descriptors();
        Self {
            descriptors,
            allocated: sys::restart_peak(),
        }
    }

    /// Checks the limits.
    pub fn check(self) {
        let used = sys::peak().saturating_sub(self.allocated);
        assert!(used <= MEMORY, "{used} bytes were allocated at once");
        let mut leaked = descriptors();
        leaked.retain(|fd, file| self.descriptors.get(fd) != Some(file));
        assert!(leaked.is_empty(), "descriptors leaked: {leaked:?}");
    }
}

fn descriptors() -> Descriptors {
    let Ok(folder) = fs::read_dir("/proc/self/fd") else {
        return Descriptors::new();
    };
    let names = folder.flatten().map(|entry| entry.path());
    names
        .filter_map(|path| {
            let fd = path.file_name()?.to_str()?.parse().ok()?;
            // The descriptor of the folder itself is closed by now.
            Some((fd, fs::read_link(&path).ok()?))
        })
        .filter(|(_, file)| !file.ends_with("fd"))
        .collect()
}
