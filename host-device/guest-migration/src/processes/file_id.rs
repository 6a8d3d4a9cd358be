// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The identity of a file in `/proc/PID/maps`.

use rustix::fs::{major, minor};

/// Identifies a file in `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct FileId {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) inode: u64,
}

impl FileId {
    pub(super) fn from_stat(stat: &rustix::fs::Stat) -> Self {
        Self {
            major: major(stat.st_dev),
            minor: minor(stat.st_dev),
            inode: stat.st_ino,
        }
    }
}
