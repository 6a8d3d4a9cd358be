// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checks of the memory files that a front end shares.

use std::fs::File;
use std::io;

use super::{Ram, RamRegion};
use rustix::fs::{fcntl_get_seals, fstat, FileType, SealFlags, StatxAttributes};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::descriptors::known_of;

/// Why the memory that a front end shares is refused.
#[derive(Debug, Error)]
pub enum BackingError {
    /// A region ends after the end of its file. Accesses would raise SIGBUS.
    #[error(
        "guest memory at {start:#x}+{length} is refused: it starts at offset {offset} of a memory file of {size} bytes"
    )]
    BeyondEnd {
        /// Guest physical address.
        start: u64,
        /// Bytes of the region.
        length: u64,
        /// Offset of the region in its file.
        offset: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// A region is not made of whole pages of its file.
    #[error(
        "guest memory at {start:#x}+{length} is refused: its memory file has pages of {page} bytes"
    )]
    PartialPage {
        /// Guest physical address.
        start: u64,
        /// Bytes of the region.
        length: u64,
        /// Bytes of a page of the file.
        page: u64,
    },
    /// The host cannot examine a memory file.
    #[error("guest memory at {start:#x} is refused: its memory file cannot be examined: {source}")]
    Io {
        /// Guest physical address.
        start: u64,
        /// The error of the host.
        source: io::Error,
    },
    /// Another program may serve the file system of a memory file.
    #[error(
        "guest memory at {start:#x} is refused: a program or another host may serve the file system of its memory file, as \
         with FUSE and NFS, and can delay each access: use a memfd, or a file on tmpfs, on hugetlbfs or on a disk"
    )]
    Served {
        /// Guest physical address.
        start: u64,
    },
    /// The process cannot guard against SIGBUS.
    #[error("guest memory is refused: accesses to it cannot be guarded: {0}")]
    Guard(io::Error),
}

/// Returns whether another program may serve the file system of `file`. An access can take for ever then, and so can a
/// question about the file; this one is answered by the kernel.
fn may_be_served(file: &File) -> io::Result<bool> {
    // Only memory has seals: a memfd, and files on tmpfs and hugetlbfs.
    if fcntl_get_seals(file).is_ok() {
        return Ok(false);
    }
    let known = known_of(file)?;
    let is_file = FileType::from_raw_mode(known.stx_mode.into()) == FileType::RegularFile;
    // The file systems of disks know whether a file is immutable, and say so. FUSE, NFS, 9p and CIFS do not.
    let has_attributes = known
        .stx_attributes_mask
        .contains(StatxAttributes::IMMUTABLE);
    Ok(is_file && !has_attributes)
}

impl Ram {
    /// Creates the map of the memory that a front end has shared, and checks its files. May wait for a disk, so no lock may
    /// be held that others need.
    ///
    /// # Errors
    ///
    /// If a region is not inside its file, or a file is on a file system that another program may serve.
    pub fn of_front_end(memory: &GuestMemoryMmap) -> Result<Self, BackingError> {
        // Before any question about a file that its file system answers.
        for region in memory.iter() {
            let start = region.start_addr().raw_value();
            let served = region.file_offset().map(|it| may_be_served(it.file()));
            let served = served.transpose();
            let served = served.map_err(|source| BackingError::Io { start, source })?;
            if served.unwrap_or(false) {
                return Err(BackingError::Served { start });
            }
        }
        let mut ram = Self::new(memory);
        ram.check_backing()?;
        ram.is_truncatable = ram.has_truncatable_file();
        Ok(ram)
    }

    /// Checks that each region is inside its file. Only regular files have a size to check; a region of a device, such as
    /// `/dev/dax`, is accepted.
    ///
    /// # Errors
    ///
    /// The first region that is not inside its file.
    fn check_backing(&self) -> Result<(), BackingError> {
        self.regions.iter().try_for_each(RamRegion::check_backing)
    }

    /// Returns whether another process may truncate a memory file. A file without `F_SEAL_SHRINK` may be truncated by
    /// each process that has it open for writing.
    fn has_truncatable_file(&self) -> bool {
        self.regions
            .iter()
            .filter_map(|region| region.file.as_ref())
            .any(|file| {
                let is_file = fstat(file.file()).is_ok_and(|stat| is_regular(&stat));
                // A file system without seals refuses the query.
                let seals = fcntl_get_seals(file.file()).unwrap_or(SealFlags::empty());
                is_file && !seals.contains(SealFlags::SHRINK)
            })
    }
}

impl RamRegion {
    fn check_backing(&self) -> Result<(), BackingError> {
        let (start, length) = (self.start, self.length);
        let Some(file) = &self.file else {
            return Ok(());
        };
        let failed = |error: rustix::io::Errno| BackingError::Io {
            start,
            source: error.into(),
        };
        let stat = fstat(file.file()).map_err(failed)?;
        if !is_regular(&stat) {
            return Ok(());
        }
        let (offset, size) = (file.start(), u64::try_from(stat.st_size).unwrap_or(0));
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(BackingError::BeyondEnd {
                start,
                length,
                offset,
                size,
            });
        }
        // The kernel maps whole huge pages, and does not unmap a part of one.
        if self.has_huge_pages() && length % self.granule != 0 {
            return Err(BackingError::PartialPage {
                start,
                length,
                page: self.granule,
            });
        }
        Ok(())
    }
}

fn is_regular(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

#[cfg(test)]
mod tests {
    use rustix::fs::{fcntl_add_seals, ftruncate, memfd_create, MemfdFlags};
    use vm_memory::{FileOffset, GuestAddress};

    use super::*;
    use crate::memory::tests::memfd;

    fn ram(file: &File, offset: u64, length: usize) -> Ram {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        let range = (GuestAddress(0x10_0000), length, Some(file));
        Ram::new(&GuestMemoryMmap::from_ranges_with_files([range]).unwrap())
    }

    #[test]
    fn a_region_is_inside_its_file() {
        let file = memfd(0x4000);
        ram(&file, 0, 0x4000).check_backing().unwrap();
        ram(&file, 0x3000, 0x1000).check_backing().unwrap();
        // A file may be larger than its region.
        ram(&file, 0x1000, 0x1000).check_backing().unwrap();
        for (offset, length) in [(0, 0x5000), (0x1000, 0x4000), (0x8000, 0x1000)] {
            let error = ram(&file, offset, length).check_backing().unwrap_err();
            let BackingError::BeyondEnd { size: 0x4000, .. } = error else {
                panic!("{error}");
            };
            assert!(error.to_string().contains("of 16384 bytes"), "{error}");
        }
    }

    /// `/proc` is served by the kernel, but as FUSE and NFS, it does not tell whether a file is immutable.
    #[test]
    fn files_of_memory_and_disks_are_told_from_those_that_may_be_served() {
        assert!(!may_be_served(&memfd(0x1000)).unwrap());
        let files = [tempfile::tempfile(), tempfile::tempfile_in("/dev/shm")];
        for file in files {
            assert!(!may_be_served(&file.unwrap()).unwrap());
        }
        let executable = File::open(std::env::current_exe().unwrap()).unwrap();
        assert!(!may_be_served(&executable).unwrap());
        assert!(may_be_served(&File::open("/proc/self/maps").unwrap()).unwrap());
        assert!(!may_be_served(&File::open("/dev/null").unwrap()).unwrap());
    }

    #[test]
    fn a_file_without_the_seal_can_be_truncated() {
        let file = memfd(0x1000);
        assert!(ram(&file, 0, 0x1000).has_truncatable_file());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("sealed", flags).unwrap());
        ftruncate(&file, 0x1000).unwrap();
        assert!(ram(&file, 0, 0x1000).has_truncatable_file());
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(!ram(&file, 0, 0x1000).has_truncatable_file());
        // Disk files have no seals.
        let file = tempfile::tempfile().unwrap();
        ftruncate(&file, 0x1000).unwrap();
        assert!(ram(&file, 0, 0x1000).has_truncatable_file());
    }
}
