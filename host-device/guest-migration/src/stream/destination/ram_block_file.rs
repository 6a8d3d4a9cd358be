// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory file of one RAM block.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{fallocate, seek, FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::digest::is_zero;
use crate::stream::destination_error::DestinationError;
use crate::stream::format::RamBlockEntry;
use crate::PAGE_SIZE;

pub(super) const PAGE: usize = PAGE_SIZE as usize;

pub(super) fn open(block: &RamBlockEntry, path: &Path) -> Result<File, DestinationError> {
    let error = |doing| {
        move |source| DestinationError::Io {
            path: path.to_owned(),
            doing,
            source,
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        // Only the owner may read guest memory.
        .mode(0o600)
        .open(path)
        .map_err(error("cannot open the memory file"))?;
    let metadata = file
        .metadata()
        .map_err(error("cannot examine the memory file"))?;
    if !metadata.is_file() {
        return Err(DestinationError::NotRegularFile(path.to_owned()));
    }
    let wanted = block.pages.saturating_mul(PAGE_SIZE);
    if metadata.len() != 0 && metadata.len() != wanted {
        return Err(DestinationError::SizeMismatch {
            path: path.to_owned(),
            block: block.name.clone(),
            has: metadata.len(),
            wanted,
        });
    }
    Ok(file)
}

/// The memory file of one RAM block.
#[derive(Debug)]
pub(super) struct RamBlockFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) pages: u64,
}

impl RamBlockFile {
    pub(super) fn error(&self, doing: &'static str) -> impl Fn(io::Error) -> DestinationError + '_ {
        move |source| DestinationError::Io {
            path: self.path.clone(),
            doing,
            source,
        }
    }

    /// Makes the whole file one hole. Does not truncate it, because a VMM may have mapped it.
    pub(super) fn clear(&self) -> Result<(), DestinationError> {
        self.file
            .set_len(self.pages.saturating_mul(PAGE_SIZE))
            .map_err(self.error("cannot extend the memory file to the size of the RAM block"))?;
        self.zero(0, self.pages)
    }

    pub(super) fn zero(&self, first: u64, pages: u64) -> Result<(), DestinationError> {
        let (offset, length) = (
            first.saturating_mul(PAGE_SIZE),
            pages.saturating_mul(PAGE_SIZE),
        );
        if !self.has_data(offset, length) {
            return Ok(());
        }
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, how, offset, length) {
            Ok(()) => Ok(()),
            // The file system does not support holes.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(offset, length),
            Err(error) => Err(error.into()),
        }
        .map_err(self.error("cannot punch a hole"))
    }

    fn write_zeros(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeros = [0; PAGE];
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            self.file.write_all_at(&zeros, at)?;
            at = at.saturating_add(PAGE_SIZE);
        }
        Ok(())
    }

    /// Returns whether the range contains data. Returns true if the file system cannot tell.
    fn has_data(&self, offset: u64, length: u64) -> bool {
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data < offset.saturating_add(length),
            Err(error) => error != Errno::NXIO,
        }
    }

    /// Writes pages. Zero pages become holes or stay holes.
    pub(super) fn write(&self, first: u64, bytes: &[u8]) -> Result<(), DestinationError> {
        let mut at = first;
        let mut rest = bytes;
        while !rest.is_empty() {
            let zero = is_zero(rest.get(..PAGE.min(rest.len())).unwrap_or_default());
            let same = rest.chunks(PAGE).take_while(|page| is_zero(page) == zero);
            let pages = same.count();
            let (part, tail) = rest
                .split_at_checked(pages.saturating_mul(PAGE))
                .unwrap_or((rest, &[]));
            if zero {
                self.zero(at, pages as u64)?;
            } else {
                self.file
                    .write_all_at(part, at.saturating_mul(PAGE_SIZE))
                    .map_err(self.error("cannot write pages"))?;
            }
            at = at.saturating_add(pages as u64);
            rest = tail;
        }
        Ok(())
    }
}
