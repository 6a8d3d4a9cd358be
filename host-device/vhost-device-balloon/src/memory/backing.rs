// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checks of the memory files that a front end shares.

use std::io;

use super::{Ram, RamRegion};
use rustix::fs::{fcntl_get_seals, fstat, fstatfs, FileType, SealFlags};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

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
    /// Another program serves the file system of a memory file.
    #[error(
        "guest memory at {start:#x} is refused: its memory file is on {file_system}, whose server can delay each access: \
         use a memfd, or a file on tmpfs, on hugetlbfs or on a disk"
    )]
    Served {
        /// Guest physical address.
        start: u64,
        /// Name of the file system.
        file_system: &'static str,
    },
    /// The process cannot guard against SIGBUS.
    #[error("guest memory is refused: accesses to it cannot be guarded: {0}")]
    Guard(io::Error),
}

/// `f_type` and name of the file systems that a program or another host serves (`linux/magic.h`, and the file systems'
/// sources). An access there can take for ever, and this program would not serve its operators meanwhile.
const SERVED_FILE_SYSTEMS: [(u64, &str); 6] = [
    (0x6573_5546, "FUSE"),
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
];

/// Returns the name of the file system with this `f_type`, if another program serves it.
fn served_file_system(f_type: u64) -> Option<&'static str> {
    let mut found = SERVED_FILE_SYSTEMS.iter();
    found.find_map(|(served, name)| (*served == f_type).then_some(*name))
}

impl Ram {
    /// Creates the map of the memory that a front end has shared, and checks its files. May wait for the file systems
    /// of these files, so no lock may be held that others need.
    ///
    /// # Errors
    ///
    /// As [`Ram::check_backing`].
    pub fn of_front_end(memory: &GuestMemoryMmap) -> Result<Self, BackingError> {
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
    /// The first region that is not inside its file, or whose file is on a file system that another program serves.
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
        let f_type = fstatfs(file.file()).map_err(failed)?.f_type;
        // The type has 32 bits, in a word that may be wider and signed.
        if let Some(file_system) = served_file_system(f_type as u64 & 0xffff_ffff) {
            return Err(BackingError::Served { start, file_system });
        }
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
    use std::fs::File;

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

    #[test]
    fn file_systems_with_a_server_are_known() {
        use std::os::fd::AsFd;
        let of = |file: &dyn AsFd| fstatfs(file.as_fd()).unwrap().f_type as u64 & 0xffff_ffff;
        assert_eq!(served_file_system(of(&memfd(0x1000))), None);
        assert_eq!(
            served_file_system(libc::FUSE_SUPER_MAGIC as u64),
            Some("FUSE")
        );
        assert_eq!(
            served_file_system(libc::NFS_SUPER_MAGIC as u64),
            Some("NFS")
        );
        assert_eq!(served_file_system(libc::TMPFS_MAGIC as u64), None);
        assert_eq!(served_file_system(libc::EXT4_SUPER_MAGIC as u64), None);
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
