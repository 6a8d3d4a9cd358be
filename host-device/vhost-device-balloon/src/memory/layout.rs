// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory as a migration sees it: memory files are RAM blocks.

use std::fs::File;
use std::io;
use std::sync::Arc;

use guest_migration::{Layout, LayoutError, Memory, MemoryError, RamBlock, Region, PAGE_SIZE};
use rustix::fs::fstat;
use thiserror::Error;
use vm_memory::FileOffset;

use super::Ram;

/// Why guest memory cannot be migrated or tracked.
#[derive(Debug, Error)]
pub enum RamLayoutError {
    /// The layout cannot be migrated.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The memory files cannot be migrated.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A region is not shared as a file.
    #[error("guest memory at {start:#x} is not backed by a file: use shared memory, such as QEMU's memory-backend-memfd with share=on")]
    NoFile {
        /// Guest physical address.
        start: u64,
    },
    /// The host cannot examine a memory file.
    #[error("memory file at {start:#x} cannot be examined: {source}")]
    Io {
        /// Guest physical address.
        start: u64,
        /// The error of the host.
        source: io::Error,
    },
}

impl Ram {
    /// Returns the layout of guest memory for a migration. Each memory file is a RAM block. RAM blocks are named
    /// `ram0`, `ram1` and so on, in the order of the guest physical addresses that first map them. A region without a
    /// file is a RAM block of its own.
    ///
    /// # Errors
    ///
    /// If a region does not consist of whole pages, or a file cannot be examined.
    pub fn layout(&self) -> Result<Layout, RamLayoutError> {
        Ok(self.ram_blocks()?.0)
    }

    /// Returns guest memory for a migration to read.
    ///
    /// # Errors
    ///
    /// If a region has no file, and as [`Ram::layout`].
    pub fn memory(&self) -> Result<Memory, RamLayoutError> {
        let (layout, files) = self.ram_blocks()?;
        let files = files
            .into_iter()
            .map(|(start, file)| {
                let file = file.ok_or(RamLayoutError::NoFile { start })?;
                file.try_clone()
                    .map_err(|source| RamLayoutError::Io { start, source })
            })
            .collect::<Result<Vec<File>, _>>()?;
        Ok(Memory::new(Arc::new(layout), files)?)
    }

    /// Returns the layout, and for each RAM block its file and the first guest physical address that maps it.
    #[allow(clippy::type_complexity)]
    fn ram_blocks(&self) -> Result<(Layout, Vec<(u64, Option<&File>)>), RamLayoutError> {
        let (mut ram_blocks, mut regions) = (Vec::new(), Vec::new());
        let mut files: Vec<(u64, Option<&File>)> = Vec::new();
        let mut known: Vec<Option<(u64, u64)>> = Vec::new();
        for region in &self.regions {
            let start = region.start;
            let io = |source: io::Error| RamLayoutError::Io { start, source };
            let file = region.file.as_ref().map(FileOffset::file);
            let stat = file.map(fstat).transpose().map_err(|it| io(it.into()))?;
            let inode = stat.map(|stat| (stat.st_dev, stat.st_ino));
            let found = known.iter().position(|it| inode.is_some() && *it == inode);
            let index = match found {
                Some(index) => index,
                None => {
                    let bytes = stat.map_or(region.length, |stat| {
                        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
                        bytes / PAGE_SIZE * PAGE_SIZE
                    });
                    ram_blocks.push(RamBlock::new(&format!("ram{}", ram_blocks.len()), bytes)?);
                    files.push((start, file));
                    known.push(inode);
                    known.len() - 1
                }
            };
            let offset = region.file.as_ref().map_or(0, FileOffset::start);
            regions.push(Region::new(start, region.length)?.backed_by(index, offset));
        }
        Ok((Layout::new(ram_blocks, regions)?, files))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::memory::tests::guest;

    #[test]
    fn a_ram_block_is_a_whole_file() {
        // Two regions of one file in a different order, with a gap that the guest does not map.
        let memory = guest(&[(0x1000, 0x4000, 0x6000), (0x8000, 0x4000, 0)]);
        let layout = Ram::new(&memory).memory().unwrap().layout().clone();
        let ram_blocks: Vec<_> = layout
            .blocks()
            .iter()
            .map(|it| (it.name(), it.length()))
            .collect();
        assert_eq!(ram_blocks, [("ram0", 0xa000)]);
        let shown = |index: usize| {
            let region = layout.regions()[index];
            (region.start(), region.block(), region.offset())
        };
        assert_eq!((shown(0), shown(1)), ((0x1000, 0, 0x6000), (0x8000, 0, 0)));
    }

    #[test]
    fn memory_without_a_file_can_be_tracked_but_not_migrated() {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x8000), 0x2000)];
        let ram = Ram::new(&GuestMemoryMmap::from_ranges(&ranges).unwrap());
        assert_eq!(ram.layout().unwrap().pages(), 3);
        let error = ram.memory().unwrap_err().to_string();
        assert!(error.contains("share=on"), "{error}");
    }
}
