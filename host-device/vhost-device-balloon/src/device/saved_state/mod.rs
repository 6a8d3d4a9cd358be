// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's saved state (R9): what a new daemon needs to continue with the same guest driver.
//!
//! The format is a small JSON object with a version, for files and for QMP clients. It contains neither guest memory
//! nor the rings: the front end provides both again.

mod restore;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{open, Mode, OFlags};
use serde::{Deserialize, Serialize};
use shared_abi::features::Features;
use tempfile::NamedTempFile;
use thiserror::Error;

/// The version that is written, and the only one that is accepted.
pub const VERSION: u32 = 1;

/// Value of the field `device`.
const DEVICE: &str = "virtio-balloon";

/// The most bytes that are read from a file. A saved state has a few hundred.
const MAX_BYTES: u64 = 1 << 16;

/// Why a state cannot be saved or restored.
#[derive(Debug, Error)]
pub enum SavedStateError {
    /// The file cannot be read.
    #[error("device state {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the host.
        source: io::Error,
    },
    /// The file cannot be written. Its old content is unchanged, unless only the last step failed: the sync of the
    /// directory after the rename.
    #[error("device state cannot be written to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the host.
        source: io::Error,
    },
    /// The file is not a saved state.
    #[error("{path} is not a saved device state: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The error, and its position.
        why: String,
    },
    /// A newer or older program wrote the state.
    #[error("device state has version {0}; this daemon supports version {VERSION}")]
    Version(u64),
    /// The state is that of another kind of device.
    #[error("device state is of a '{0}', not of a '{DEVICE}'")]
    OtherDevice(String),
    /// The state names an unknown feature.
    #[error("device state has the unknown feature '{0}'")]
    UnknownFeature(String),
    /// The driver uses features that this daemon does not offer.
    #[error(
        "driver uses {0}, which is not offered: start with the feature options of the daemon that saved \
         the state"
    )]
    NotOffered(Features),
    /// The next hint id is outside the range of hint ids.
    #[error("device state has the next hint id {0:#x}, which is outside 0x80000000 to 0xffffffff")]
    NextId(u32),
    /// The command id is reserved.
    #[error("device state has the command id {0:#x}, which is reserved")]
    Command(u32),
}

/// The state that a device needs to continue in another process.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SavedState {
    /// The kind of device.
    device: String,
    /// The version of the format.
    version: u32,
    /// The names of the features that the driver accepted; `None` if there was no driver.
    negotiated_features: Option<Vec<String>>,
    /// Config space: the target number of 4 KiB pages in the balloon.
    num_pages: u32,
    /// Config space: the number of 4 KiB pages in the balloon, as reported by the driver.
    actual: u32,
    /// Config space: the value that the guest fills free pages with.
    poison_val: u32,
    /// Config space: the command id.
    command_id: u32,
    /// The id of the next hint round.
    next_hint_id: u32,
}

/// The fields that identify the format of the others.
#[derive(Deserialize)]
struct Header {
    device: String,
    version: u64,
}

impl SavedState {
    /// Reads a state from a file.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is not a saved state, or has another version or kind of device.
    pub fn read(path: &Path) -> Result<Self, SavedStateError> {
        let cannot = |source| SavedStateError::Read {
            path: path.into(),
            source,
        };
        let malformed = |why: String| SavedStateError::Malformed {
            path: path.into(),
            why,
        };
        let mut bytes = Vec::new();
        // Opening a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = open(path, flags, Mode::empty()).map_err(|error| cannot(error.into()))?;
        let file = File::from(file);
        if !file.metadata().map_err(cannot)?.is_file() {
            return Err(malformed("it is not a regular file".into()));
        }
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(cannot)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(malformed(format!("longer than {MAX_BYTES} bytes")));
        }
        let header: Header =
            serde_json::from_slice(&bytes).map_err(|why| malformed(why.to_string()))?;
        if header.device != DEVICE {
            return Err(SavedStateError::OtherDevice(
                header.device.chars().take(64).collect(),
            ));
        }
        if header.version != u64::from(VERSION) {
            return Err(SavedStateError::Version(header.version));
        }
        serde_json::from_slice(&bytes).map_err(|why| malformed(why.to_string()))
    }

    /// Writes the state to a file. Writes a temporary file in the same directory and renames it, so that the file
    /// holds either the complete state or its old content. A symbolic link is replaced.
    ///
    /// # Errors
    ///
    /// If the path is a socket, a FIFO, a device or a directory, which the rename would replace. If the host reports an
    /// error.
    pub fn write(&self, path: &Path) -> Result<(), SavedStateError> {
        self.try_write(path)
            .map_err(|source| SavedStateError::Write {
                path: path.into(),
                source,
            })
    }

    fn try_write(&self, path: &Path) -> io::Result<()> {
        let existing = fs::symlink_metadata(path).ok();
        if existing.is_some_and(|it| !it.is_file() && !it.is_symlink()) {
            return Err(io::Error::other("it exists and is not a regular file"));
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut file = NamedTempFile::new_in(directory)?;
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        // Makes the new name durable.
        File::open(directory)?.sync_all()
    }

    fn features(&self) -> Result<Option<Features>, SavedStateError> {
        let Some(names) = &self.negotiated_features else {
            return Ok(None);
        };
        names
            .iter()
            .try_fold(Features::NONE, |all, name| {
                Features::from_name(name)
                    .map(|feature| all | feature)
                    .ok_or_else(|| SavedStateError::UnknownFeature(name.chars().take(64).collect()))
            })
            .map(Some)
    }
}
