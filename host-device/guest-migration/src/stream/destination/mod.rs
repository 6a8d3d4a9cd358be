// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory files that a stream is received into, and the markers beside them while they are incomplete.

mod digest_chunk;
mod incomplete_files;
mod incomplete_marker;
mod open_files;
mod ram_block_file;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::destination_error::DestinationError;
use super::format::RamBlockEntry;

pub(super) use incomplete_files::IncompleteFiles;
pub(super) use open_files::OpenFiles;

/// The memory files for the RAM blocks of a stream.
///
/// A file that does not exist is created. An existing file must be empty or as long as its RAM block; its content is
/// discarded. A waiting VMM may have mapped it already. Zero pages, and pages that the stream does not contain, are
/// holes at the end.
///
/// The marker `PATH.incomplete` exists beside each file from before the first write until the stream is received and
/// verified. After a failure the marker stays, and contains the reason.
#[derive(Debug, Clone, Default)]
pub struct Destination {
    /// The file for a stream with one RAM block of any name.
    only: Option<PathBuf>,
    named: Vec<(String, PathBuf)>,
}

impl Destination {
    /// Creates a destination without files. [`with_ram_block`](Self::with_ram_block) adds them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a destination of one file, for a stream with one RAM block of any name.
    pub fn with_file(path: impl Into<PathBuf>) -> Self {
        Self {
            only: Some(path.into()),
            named: Vec::new(),
        }
    }

    /// Adds the file for the RAM block `name`.
    #[must_use]
    pub fn with_ram_block(mut self, name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        self.named.push((name.into(), path.into()));
        self
    }

    /// Returns the path of the marker beside an incomplete memory file.
    pub fn marker(path: &Path) -> PathBuf {
        let mut name = OsString::from(path);
        name.push(".incomplete");
        name.into()
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let named = self.named.iter().map(|(_, path)| path);
        self.only.iter().chain(named)
    }

    /// Returns the path for each RAM block, in the order of `blocks`.
    fn assign(&self, blocks: &[RamBlockEntry]) -> Result<Vec<PathBuf>, DestinationError> {
        if let Some(path) = &self.only {
            if blocks.len() == 1 && self.named.is_empty() {
                return Ok(vec![path.clone()]);
            }
            let names: Vec<_> = blocks.iter().map(|block| block.name.as_str()).collect();
            return Err(DestinationError::NeedNames {
                blocks: blocks.len(),
                names: names.join(", "),
            });
        }
        let unused = |(name, _): &&(String, PathBuf)| blocks.iter().all(|it| it.name != *name);
        if let Some((name, _)) = self.named.iter().find(unused) {
            return Err(DestinationError::UnusedFile(name.clone()));
        }
        blocks
            .iter()
            .map(|block| {
                let named = self.named.iter().find(|(name, _)| *name == block.name);
                let names: Vec<_> = self.named.iter().map(|(name, _)| name.as_str()).collect();
                named.map(|(_, path)| path.clone()).ok_or_else(|| {
                    DestinationError::NoFileForBlock {
                        block: block.name.clone(),
                        given: names.join(", "),
                    }
                })
            })
            .collect()
    }
}
