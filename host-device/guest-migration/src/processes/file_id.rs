// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The identity of a file in `/proc/PID/maps`.

use std::fs::File;
use std::io;

use rustix::fs::{fstat, major, minor};
use serde::{Deserialize, Serialize};

/// Identifies a file in `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FileId {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) inode: u64,
}

impl FileId {
    /// Returns the identity of `file`.
    ///
    /// # Errors
    ///
    /// If the file cannot be examined.
    pub fn of(file: &File) -> io::Result<Self> {
        Ok(Self::from_stat(&fstat(file)?))
    }

    pub(super) fn from_stat(stat: &rustix::fs::Stat) -> Self {
        Self {
            major: major(stat.st_dev),
            minor: minor(stat.st_dev),
            inode: stat.st_ino,
        }
    }
}
