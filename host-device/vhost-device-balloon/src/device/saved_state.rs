// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's saved state (R9): what a fresh daemon needs so that a guest's driver can go on with it.
//!
//! It is a small JSON object with a version, made for files and for the operator's eyes. Memory is not in it, nor
//! are the rings: the front end gives both again.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shared_abi::command::{CommandId, HintId};
use shared_abi::features::Features;
use tempfile::NamedTempFile;
use thiserror::Error;
use tracing::info;

use super::hinting::Hinting;
use super::Device;

/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// What `device` says.
const DEVICE: &str = "virtio-balloon";
/// The most bytes of a file that are looked at. A state has some hundred.
const MAX_BYTES: u64 = 1 << 16;

/// Why a state cannot be saved, or a saved one cannot be taken.
#[derive(Debug, Error)]
pub enum SavedStateError {
    /// The file cannot be read.
    #[error("the device state in {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The file cannot be written. What was there before is untouched.
    #[error("the device state cannot be written to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The file is no state.
    #[error("{path} is not a saved device state: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        why: String,
    },
    /// A newer or older program wrote it.
    #[error("the device state has version {0}; this program knows version {VERSION}")]
    Version(u64),
    /// Of something else.
    #[error("the device state is that of a '{0}', not of a '{DEVICE}'")]
    OtherDevice(String),
    /// A feature without a meaning.
    #[error("the device state names the feature '{0}', which does not exist")]
    UnknownFeature(String),
    /// The guest's driver uses what this daemon does not offer.
    #[error(
        "the guest's driver uses {0}, which is not offered here: start with the options of the daemon that saved \
         the state"
    )]
    NotOffered(Features),
    /// The ids go on from where no id is.
    #[error(
        "the device state has the next hint id {0:#x}, which is outside 0x80000000 to 0xffffffff"
    )]
    NextId(u32),
    /// A command that no device of this kind shows.
    #[error("the device state has the command id {0:#x}, which is reserved")]
    Command(u32),
}

/// What a device has to keep when another process takes over.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SavedState {
    /// What it is the state of.
    device: String,
    /// The format's version.
    version: u32,
    /// The names of the features that the driver accepted; none if there was no driver.
    negotiated_features: Option<Vec<String>>,
    /// Config space: how many 4 KiB pages the balloon shall hold.
    num_pages: u32,
    /// Config space: how many it holds, as the driver says.
    actual: u32,
    /// Config space: what the guest fills its free pages with.
    poison_val: u32,
    /// Config space: the command id that it shows.
    command_id: u32,
    /// The id that the next round of hinting gets.
    next_hint_id: u32,
}

/// Only the part that says how to read the rest.
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
    /// If the file cannot be read, is no state, or is one of another version or device.
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
        let file = File::open(path).map_err(cannot)?;
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(cannot)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(malformed(format!("it is longer than {MAX_BYTES} bytes")));
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

    /// Writes the state to a file: under another name beside it first, so that there is either the whole of it or
    /// what was there before.
    ///
    /// # Errors
    ///
    /// If the host refuses.
    pub fn write(&self, path: &Path) -> Result<(), SavedStateError> {
        self.try_write(path)
            .map_err(|source| SavedStateError::Write {
                path: path.into(),
                source,
            })
    }

    fn try_write(&self, path: &Path) -> io::Result<()> {
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
        // The new name, too, is to survive the host.
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

impl Device {
    /// The state to be saved (R9).
    pub fn saved_state(&self) -> SavedState {
        let names = |features: Features| features.names().map(str::to_owned).collect();
        SavedState {
            device: DEVICE.into(),
            version: VERSION,
            negotiated_features: self.negotiated_features.map(names),
            num_pages: self.config.num_pages,
            actual: self.config.actual,
            poison_val: self.config.poison_val,
            command_id: self.hinting.cmd_id().number(),
            next_hint_id: self.hinting.next_id().number(),
        }
    }

    /// Goes on where the device was whose state was saved, with the same driver. To be called before the first
    /// front end comes.
    ///
    /// Ids go on where they were (R8). A round that was under way then is over: its migration has ended or failed,
    /// and the driver is shown DONE, so that it takes back what it holds (R16).
    ///
    /// # Errors
    ///
    /// If the state has a value that no device has, or its driver uses what is not offered here.
    pub fn restore(&mut self, saved: &SavedState) -> Result<(), SavedStateError> {
        let features = saved.features()?;
        let missing = features.unwrap_or_default().without(self.offered_features);
        if !missing.is_empty() {
            return Err(SavedStateError::NotOffered(missing));
        }
        let next =
            HintId::new(saved.next_hint_id).ok_or(SavedStateError::NextId(saved.next_hint_id))?;
        let over = match CommandId::from_number(saved.command_id) {
            CommandId::Stop => false,
            CommandId::Done | CommandId::Hint(_) => true,
            CommandId::Reserved(number) => return Err(SavedStateError::Command(number)),
        };
        self.negotiated_features = features;
        self.config.num_pages = saved.num_pages;
        self.config.actual = saved.actual;
        self.config.poison_val = saved.poison_val;
        self.hinting = Hinting::from_saved_state(next, over);
        info!(
            "goes on from a saved state: {} pages in the balloon, next hint id {:#x}",
            saved.actual, saved.next_hint_id
        );
        Ok(())
    }
}
