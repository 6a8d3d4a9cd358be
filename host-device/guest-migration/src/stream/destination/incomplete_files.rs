// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Marks the files of a destination as incomplete, and opens them.

use super::incomplete_marker::IncompleteMarker;
use super::open_files::OpenFiles;
use super::ram_block_file::{open, RamBlockFile};
use super::Destination;
use crate::stream::destination_error::DestinationError;
use crate::stream::format::RamBlockEntry;

impl Destination {
    /// Marks all files as incomplete, without opening them.
    pub(in crate::stream) fn mark_incomplete(self) -> Result<IncompleteFiles, DestinationError> {
        if self.paths().next().is_none() {
            return Err(DestinationError::NoFile);
        }
        for (index, (name, _)) in self.named.iter().enumerate() {
            if self.named.iter().skip(index + 1).any(|it| it.0 == *name) {
                return Err(DestinationError::DuplicateFile(name.clone()));
            }
        }
        let markers = self.paths().map(|path| IncompleteMarker::create(path));
        let markers = markers.collect::<Result<_, _>>()?;
        Ok(IncompleteFiles {
            destination: self,
            markers,
        })
    }
}

/// A destination whose files are marked as incomplete.
#[derive(Debug)]
pub(in crate::stream) struct IncompleteFiles {
    destination: Destination,
    markers: Vec<IncompleteMarker>,
}

impl IncompleteFiles {
    /// Opens the file of each RAM block, and makes it one hole as long as the RAM block.
    pub fn open(&self, blocks: &[RamBlockEntry]) -> Result<OpenFiles, DestinationError> {
        let paths = self.destination.assign(blocks)?;
        // All files are checked before the content of any is discarded.
        let files = blocks
            .iter()
            .zip(&paths)
            .map(|(block, path)| open(block, path))
            .collect::<Result<Vec<_>, _>>()?;
        let parts = blocks.iter().zip(paths).zip(files);
        let slots = parts
            .map(|((block, path), file)| {
                let slot = RamBlockFile {
                    file,
                    path,
                    pages: block.pages,
                };
                slot.clear().map(|()| slot)
            })
            .collect::<Result<_, _>>()?;
        Ok(OpenFiles { slots })
    }

    /// Removes the markers: the files are complete.
    pub fn complete(&self) -> Result<(), DestinationError> {
        self.markers.iter().try_for_each(IncompleteMarker::remove)
    }

    /// Writes the reason of a failure into the markers. Creates the markers again if they were removed.
    pub fn write_failure(&self, why: &str) {
        for marker in &self.markers {
            // Ignored: the caller already gets the first error.
            let _ = marker.write_reason(why);
        }
    }
}
