// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory files of the guest, as a migration reads them.
//!
//! A migration reads the files and does not map them: reading a hole through a mapping would fill the hole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{seek, SeekFrom};
use rustix::io::Errno;
use thiserror::Error;

use crate::{Layout, PageRun, RamBlock, PAGE_SIZE};

/// Why files cannot serve as guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The number of files differs from the number of RAM blocks.
    #[error("guest memory has {blocks} RAM blocks, but {files} files")]
    FileCount {
        /// Number of RAM blocks.
        blocks: usize,
        /// Number of files.
        files: usize,
    },
    /// A file is shorter than its RAM block.
    #[error("file of RAM block '{name}' has {length:#x} bytes, but the RAM block has {wanted:#x}")]
    FileTooShort {
        /// Name of the RAM block.
        name: String,
        /// Length of the file in bytes.
        length: u64,
        /// Length of the RAM block in bytes.
        wanted: u64,
    },
    /// A file cannot be examined.
    #[error("file of RAM block '{name}' cannot be examined: {source}")]
    Io {
        /// Name of the RAM block.
        name: String,
        /// The system error.
        source: io::Error,
    },
}

/// Guest memory: its layout, and one file for each RAM block. Clones share the files.
#[derive(Clone, Debug)]
pub struct Memory {
    layout: Arc<Layout>,
    files: Arc<[File]>,
}

impl Memory {
    /// Returns the guest memory in `files`: one file for each RAM block of `layout`, in the same order. A file may be
    /// longer than its RAM block.
    ///
    /// # Errors
    ///
    /// If the number of files differs from the number of RAM blocks, or if a file is too short or cannot be examined.
    pub fn new(layout: Arc<Layout>, files: Vec<File>) -> Result<Self, MemoryError> {
        let blocks = layout.blocks();
        if files.len() != blocks.len() {
            return Err(MemoryError::FileCount {
                blocks: blocks.len(),
                files: files.len(),
            });
        }
        for (block, file) in blocks.iter().zip(&files) {
            let name = block.name().to_owned();
            match file.metadata() {
                Ok(it) if it.len() < block.length() => {
                    return Err(MemoryError::FileTooShort {
                        name,
                        length: it.len(),
                        wanted: block.length(),
                    })
                }
                Ok(_) => {}
                Err(source) => return Err(MemoryError::Io { name, source }),
            }
        }
        Ok(Self {
            layout,
            files: files.into(),
        })
    }

    /// Returns the layout.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Iterates over the RAM blocks and their files.
    pub fn blocks(&self) -> impl Iterator<Item = (&RamBlock, &File)> {
        self.layout.blocks().iter().zip(self.files.iter())
    }

    /// Returns the file of the RAM block with index `block`.
    pub fn file(&self, block: usize) -> Option<&File> {
        self.files.get(block)
    }

    /// Reads the pages `run` into `buffer`. A hole reads as zeros and stays a hole.
    ///
    /// # Errors
    ///
    /// If the run exceeds its RAM block, if `buffer` differs in length from the run, or if the system call fails.
    pub fn read(&self, run: PageRun, buffer: &mut [u8]) -> io::Result<()> {
        let (file, _) = self.within(run.block, run.end())?;
        if u64::try_from(buffer.len()).ok() != Some(run.length()) {
            let text = "buffer length differs from the length of the pages to read";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        file.read_exact_at(buffer, run.offset())
    }

    /// Returns the first run of pages at or after page `page` of a RAM block that are not holes. Returns `None` if only
    /// holes follow.
    ///
    /// # Errors
    ///
    /// If the RAM block does not exist, if `page` is beyond its end, or if the system call fails.
    pub fn next_data(&self, block: usize, page: u64) -> io::Result<Option<PageRun>> {
        let (file, pages) = self.within(block, page)?;
        if page >= pages {
            return Ok(None);
        }
        let data = match seek(file, SeekFrom::Data(page.saturating_mul(PAGE_SIZE))) {
            Ok(data) => data / PAGE_SIZE,
            // No data follows up to the end of the file.
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if data >= pages {
            return Ok(None);
        }
        let hole = seek(file, SeekFrom::Hole(data.saturating_mul(PAGE_SIZE)))?;
        let end = hole.div_ceil(PAGE_SIZE).min(pages);
        Ok((end > data).then(|| PageRun {
            block,
            first: data,
            pages: end - data,
        }))
    }

    /// Returns the file of RAM block `block` and its number of pages. Fails if it has fewer than `pages` pages.
    fn within(&self, block: usize, pages: u64) -> io::Result<(&File, u64)> {
        let has = self.layout.blocks().get(block).map_or(0, RamBlock::pages);
        match self.files.get(block) {
            Some(file) if pages <= has => Ok((file, has)),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("RAM block {block} has {has} pages, fewer than the requested {pages}"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{ftruncate, memfd_create, MemfdFlags};

    use super::*;

    fn memory(pages: u64) -> Memory {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, pages * PAGE_SIZE).unwrap();
        let block = RamBlock::new("ram", pages * PAGE_SIZE).unwrap();
        Memory::new(Layout::new([block], []).unwrap().into(), vec![file]).unwrap()
    }

    #[test]
    fn holes_are_found_and_stay_holes() {
        use std::os::unix::fs::MetadataExt;
        let memory = memory(16);
        let file = memory.file(0).unwrap();
        file.write_all_at(&[1; 8192], 3 * PAGE_SIZE).unwrap();
        file.write_all_at(&[2; 1], 15 * PAGE_SIZE).unwrap();
        let run = |first, pages| {
            Some(PageRun {
                block: 0,
                first,
                pages,
            })
        };
        assert_eq!(memory.next_data(0, 0).unwrap(), run(3, 2));
        assert_eq!(memory.next_data(0, 4).unwrap(), run(4, 1));
        assert_eq!(memory.next_data(0, 5).unwrap(), run(15, 1));
        assert_eq!(memory.next_data(0, 16).unwrap(), None);
        let mut bytes = vec![9; 4 * PAGE_SIZE as usize];
        memory.read(run(0, 4).unwrap(), &mut bytes).unwrap();
        assert!(bytes[..3 * 4096].iter().all(|byte| *byte == 0));
        assert!(bytes[3 * 4096..].iter().all(|byte| *byte == 1));
        assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * PAGE_SIZE);
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let memory = memory(4);
        let run = PageRun {
            block: 0,
            first: 3,
            pages: 2,
        };
        assert!(memory.read(run, &mut [0; 8192]).is_err());
        assert!(memory.next_data(1, 0).is_err());
        let layout = memory.layout().clone();
        assert!(matches!(
            Memory::new(layout, vec![]),
            Err(MemoryError::FileCount { .. })
        ));
    }
}
