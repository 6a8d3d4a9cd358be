// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files that guest memory is kept in, as a migration reads them.
//!
//! Through the files and not through a mapping: to read a hole through a mapping would fill it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{seek, SeekFrom};
use rustix::io::Errno;
use thiserror::Error;

use crate::{Layout, PageRun, RamBlock, PAGE_SIZE};

/// Why files cannot be the memory of a guest.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// There must be one file for each block.
    #[error("there are {blocks} blocks of guest memory and {files} files")]
    FileCount {
        /// Blocks.
        blocks: usize,
        /// Files.
        files: usize,
    },
    /// A file is too short.
    #[error(
        "the file of block '{name}' has {length:#x} bytes, fewer than the {wanted:#x} of the block"
    )]
    FileTooShort {
        /// The block.
        name: String,
        /// Bytes of the file.
        length: u64,
        /// Bytes of the block.
        wanted: u64,
    },
    /// The system refused.
    #[error("the file of block '{name}' cannot be examined: {source}")]
    Io {
        /// The block.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// Guest memory: the layout, and a file for each block. Copies are the same files.
#[derive(Clone, Debug)]
pub struct Memory {
    layout: Arc<Layout>,
    files: Arc<[File]>,
}

impl Memory {
    /// The memory in `files`, one for each block of `layout`, in the same order. Each may be longer than its block.
    ///
    /// # Errors
    ///
    /// If there are more or fewer files than blocks, or one is too short.
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

    /// Where it lies.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The blocks and their files.
    pub fn blocks(&self) -> impl Iterator<Item = (&RamBlock, &File)> {
        self.layout.blocks().iter().zip(self.files.iter())
    }

    /// The file of the block with this index.
    pub fn file(&self, block: usize) -> Option<&File> {
        self.files.get(block)
    }

    /// Reads the pages `run` into `buffer`, which must be as long. A hole reads as zeros, and stays a hole.
    ///
    /// # Errors
    ///
    /// If the run is not in the block, if the buffer is not as long as the run, or if the system refuses.
    pub fn read(&self, run: PageRun, buffer: &mut [u8]) -> io::Result<()> {
        let (file, _) = self.within(run.block, run.end())?;
        if u64::try_from(buffer.len()).ok() != Some(run.length()) {
            let text = "the buffer is not as long as the pages that are to be read";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        file.read_exact_at(buffer, run.offset())
    }

    /// The first pages at or after the page `page` of a block that are not holes, up to the next hole; `None` if only
    /// holes follow.
    ///
    /// # Errors
    ///
    /// If there is no such block, or the system refuses.
    pub fn next_data(&self, block: usize, page: u64) -> io::Result<Option<PageRun>> {
        let (file, pages) = self.within(block, page)?;
        if page >= pages {
            return Ok(None);
        }
        let data = match seek(file, SeekFrom::Data(page.saturating_mul(PAGE_SIZE))) {
            Ok(data) => data / PAGE_SIZE,
            // No data up to the end of the file.
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

    /// The file of a block that has at least `pages` pages, and how many it has.
    fn within(&self, block: usize, pages: u64) -> io::Result<(&File, u64)> {
        let has = self.layout.blocks().get(block).map_or(0, RamBlock::pages);
        match self.files.get(block) {
            Some(file) if pages <= has => Ok((file, has)),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("block {block} of guest memory has {has} pages, not {pages}"),
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
