// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory: regions of files that the front end shares.
//!
//! Memory is released through the files. Several processes map a file, so only a hole in the file frees its pages;
//! `MADV_DONTNEED` on one mapping frees nothing. Holes are also found through the files: reading a hole through a
//! mapping would allocate its pages.
//!
//! `layout` describes guest memory to a migration, and `hole_recorder` records for it which holes are punched. `parts`
//! splits ranges into parts.

mod hole_recorder;
mod layout;
mod parts;

pub use hole_recorder::HoleRecorder;
pub use layout::RamLayoutError;
pub use parts::Part;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use rustix::fs::{fallocate, fstat, fstatfs, seek, FallocateFlags, SeekFrom};
use thiserror::Error;
use vm_memory::{Address, FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// `f_type` of a file system of huge pages (`HUGETLBFS_MAGIC`).
const HUGETLBFS: u64 = 0x9584_58f6;

/// Unit of `st_blocks`, independent of the block size of the file system.
const STAT_BLOCK: u64 = 512;

/// Why memory cannot be released.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// Part of the range is outside guest memory. The rest was released.
    #[error("range at {start:#x} has {bytes} bytes outside guest memory; these are ignored")]
    Outside {
        /// Guest physical address where the range starts.
        start: u64,
        /// Bytes of the range that are outside guest memory.
        bytes: u64,
    },
    /// The host cannot punch a hole in the memory file.
    #[error("hole punching at {start:#x}+{length} failed: {source}")]
    Punch {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
        /// The error of the host.
        source: io::Error,
    },
}

/// A contiguous region of guest memory, and the part of a file that backs it.
#[derive(Clone, Debug)]
pub struct RamRegion {
    start: u64,
    length: u64,
    file: Option<FileOffset>,
    /// The smallest unit that the file can free: the size of a host page, or of a huge page.
    granule: u64,
}

/// Host memory that is allocated for guest memory.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Allocated {
    /// Start, length and allocated bytes of each region.
    pub regions: Vec<(u64, u64, u64)>,
    /// Allocated bytes of all memory files. Each file counts once.
    pub total: u64,
}

/// Guest memory: regions in ascending order of addresses.
#[derive(Clone, Debug, Default)]
pub struct Ram {
    regions: Vec<RamRegion>,
    hole_recorder: Option<HoleRecorder>,
}

impl Ram {
    /// Creates the map of the memory that a front end has shared.
    pub fn new(memory: &GuestMemoryMmap) -> Self {
        let regions = memory.iter().map(|region| {
            let file = region.file_offset().cloned();
            RamRegion {
                start: region.start_addr().raw_value(),
                length: region.len(),
                granule: file.as_ref().map_or(1, granule),
                file,
            }
        });
        Self {
            regions: regions.collect(),
            hole_recorder: None,
        }
    }

    /// Sets where punched holes are recorded. `None` ends the recording.
    pub fn set_hole_recorder(&mut self, hole_recorder: Option<HoleRecorder>) {
        self.hole_recorder = hole_recorder;
    }

    /// Returns where punched holes are recorded.
    pub fn hole_recorder(&self) -> Option<HoleRecorder> {
        self.hole_recorder.clone()
    }

    /// Returns the size of guest memory in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.length).sum()
    }

    /// Returns the number of regions.
    pub fn num_regions(&self) -> usize {
        self.regions.len()
    }

    /// Returns whether `other` maps the same parts of the same files at the same addresses.
    pub fn has_same_layout(&self, other: &Self) -> bool {
        let layout = |ram: &Self| -> Vec<_> {
            ram.regions
                .iter()
                .map(|region| (region.start, region.length, region.identity()))
                .collect()
        };
        layout(self) == layout(other)
    }

    /// Returns whether the guest physical addresses `range` overlap guest memory.
    pub fn overlaps(&self, range: &Range<u64>) -> bool {
        self.regions.iter().any(|region| {
            range.start < region.start.saturating_add(region.length) && range.end > region.start
        })
    }

    /// Releases the guest physical addresses `range` to the host, and returns the number of released bytes. Released
    /// memory reads as zeros, and the host allocates memory again when the guest writes to it.
    ///
    /// Only whole host pages (or huge pages) are released. A page that `range` covers in part does not change. Memory
    /// that is already free counts as released. Memory without a file is not released.
    ///
    /// # Errors
    ///
    /// If part of the range is outside guest memory; the rest is released. If the host cannot punch a hole; part of
    /// the range may be released.
    pub fn release(&self, range: Range<u64>) -> Result<u64, ReleaseError> {
        let (mut released, mut inside) = (0, 0);
        if let Some(hole_recorder) = &self.hole_recorder {
            hole_recorder.record(&range);
        }
        for region in &self.regions {
            let start = range.start.max(region.start);
            let end = range.end.min(region.start.saturating_add(region.length));
            let Some(length) = end.checked_sub(start).filter(|length| *length > 0) else {
                continue;
            };
            inside += length;
            released += region
                .release(start - region.start, length)
                .map_err(|source| ReleaseError::Punch {
                    start,
                    length,
                    source,
                })?;
        }
        let bytes = range.end.saturating_sub(range.start).saturating_sub(inside);
        if bytes > 0 {
            return Err(ReleaseError::Outside {
                start: range.start,
                bytes,
            });
        }
        Ok(released)
    }

    /// Discards the guest physical addresses `range`, and returns the discarded parts. Only these parts read as
    /// zeros afterwards. Addresses outside guest memory, memory without a file, and pages that `range` covers in
    /// part are left out.
    ///
    /// # Errors
    ///
    /// If the host cannot punch a hole. Part of the range may be discarded.
    pub fn discard(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, ReleaseError> {
        let mut parts = Vec::new();
        if let Some(hole_recorder) = &self.hole_recorder {
            hole_recorder.record(&range);
        }
        for region in &self.regions {
            let start = range.start.max(region.start);
            let end = range.end.min(region.start.saturating_add(region.length));
            let Some(length) = end.checked_sub(start).filter(|length| *length > 0) else {
                continue;
            };
            let offset = start - region.start;
            let Some((offset, length)) = region.whole_granules(offset, length) else {
                continue;
            };
            region
                .release(offset, length)
                .map_err(|source| ReleaseError::Punch {
                    start: region.start.saturating_add(offset),
                    length,
                    source,
                })?;
            let start = region.start.saturating_add(offset);
            parts.push(start..start.saturating_add(length));
        }
        Ok(parts)
    }

    /// Returns the host memory that is allocated for guest memory.
    ///
    /// # Errors
    ///
    /// If a memory file cannot be examined.
    pub fn allocated(&self) -> io::Result<Allocated> {
        let mut files = BTreeSet::new();
        let mut allocated = Allocated::default();
        for region in &self.regions {
            let bytes = region.allocated()?;
            allocated.regions.push((region.start, region.length, bytes));
            if let Some(file) = &region.file {
                let stat = fstat(file.file())?;
                if files.insert((stat.st_dev, stat.st_ino)) {
                    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
                    allocated.total += blocks.saturating_mul(STAT_BLOCK);
                }
            }
        }
        Ok(allocated)
    }
}

impl RamRegion {
    /// Returns which part of which file backs the region: device, inode, offset. `None` if there is no file, or if the
    /// file cannot be examined.
    fn identity(&self) -> Option<(u64, u64, u64)> {
        let file = self.file.as_ref()?;
        let stat = fstat(file.file()).ok()?;
        Some((stat.st_dev, stat.st_ino, file.start()))
    }

    /// Returns offset and length of the whole granules among `length` bytes from `offset`, which must be inside the
    /// region. `None` if there are no whole granules, or the region has no file.
    fn whole_granules(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let start = self.file.as_ref()?.start();
        let first = start.checked_add(offset)?;
        let end = first.checked_add(length)? / self.granule * self.granule;
        let first = first.checked_next_multiple_of(self.granule)?;
        let length = end.checked_sub(first).filter(|length| *length > 0)?;
        Some((first - start, length))
    }

    /// Frees the whole granules among `length` bytes from `offset`, which must be inside the region. Returns the
    /// number of bytes freed.
    fn release(&self, offset: u64, length: u64) -> io::Result<u64> {
        let whole = self.whole_granules(offset, length);
        let (Some(file), Some((offset, length))) = (&self.file, whole) else {
            return Ok(0);
        };
        fallocate(
            file.file(),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            file.start().saturating_add(offset),
            length,
        )?;
        Ok(length)
    }

    /// Returns the number of bytes of the region that are not in holes.
    fn allocated(&self) -> io::Result<u64> {
        let Some(file) = &self.file else {
            return Ok(self.length);
        };
        let (mut at, end) = (file.start(), file.start().saturating_add(self.length));
        let mut bytes = 0;
        while at < end {
            let data = match seek(file.file(), SeekFrom::Data(at)) {
                Ok(data) => data,
                // No data up to the end of the file.
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            if data >= end {
                break;
            }
            let hole = seek(file.file(), SeekFrom::Hole(data))?.min(end);
            bytes += hole.saturating_sub(data);
            if hole <= at {
                break;
            }
            at = hole;
        }
        Ok(bytes)
    }
}

/// Returns the smallest unit that a hole in `file` frees, in bytes.
fn granule(file: &FileOffset) -> u64 {
    let page = rustix::param::page_size() as u64;
    match fstatfs(file.file()) {
        Ok(stat) if stat.f_type as u64 & 0xffff_ffff == HUGETLBFS => {
            u64::try_from(stat.f_bsize).unwrap_or(page).max(page)
        }
        _ => page,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;

    use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Creates a memory file of `length` bytes.
    pub(crate) fn memfd(length: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, length).unwrap();
        file
    }

    /// Creates guest memory of regions (start, length, offset in the file) in one memory file. All bytes are written.
    pub(crate) fn guest(regions: &[(u64, u64, u64)]) -> GuestMemoryMmap {
        let file = memfd(
            regions
                .iter()
                .map(|(_, length, offset)| length + offset)
                .max()
                .unwrap(),
        );
        let ranges: Vec<_> = regions
            .iter()
            .map(|(start, length, offset)| {
                let file = FileOffset::new(file.try_clone().unwrap(), *offset);
                (GuestAddress(*start), *length as usize, Some(file))
            })
            .collect();
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        for (start, length, _) in regions {
            memory
                .write_slice(&vec![0x5a; *length as usize], GuestAddress(*start))
                .unwrap();
        }
        memory
    }

    #[test]
    fn release_frees_whole_pages_at_the_right_offset() {
        // As in user-mode Linux: the region starts at an irregular address, and its file starts before the region.
        let memory = guest(&[(0x3e_f000, 0x10_0000, 0x3e_f000)]);
        let ram = Ram::new(&memory);
        assert_eq!(ram.allocated().unwrap().total, 0x10_0000);

        assert_eq!(ram.release(0x3f_0000..0x3f_4000).unwrap(), 0x4000);
        // The first and the last page are covered only in part.
        assert_eq!(ram.release(0x40_0800..0x40_2800).unwrap(), 0x1000);
        assert_eq!(ram.release(0x41_0001..0x41_0fff).unwrap(), 0);

        let allocated = ram.allocated().unwrap();
        assert_eq!(allocated.total, 0x10_0000 - 0x5000);
        assert_eq!(
            allocated.regions,
            [(0x3e_f000, 0x10_0000, 0x10_0000 - 0x5000)]
        );
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            (
                byte(0x3e_ffff),
                byte(0x3f_0000),
                byte(0x3f_3fff),
                byte(0x3f_4000)
            ),
            (0x5a, 0, 0, 0x5a)
        );
        assert_eq!(
            (byte(0x40_0fff), byte(0x40_1000), byte(0x40_2000)),
            (0x5a, 0, 0x5a)
        );
    }

    #[test]
    fn release_clamps_to_guest_memory_and_says_so() {
        let memory = guest(&[(0x1000, 0x4000, 0x4000), (0x8000, 0x4000, 0)]);
        let ram = Ram::new(&memory);
        assert!(matches!(
            ram.release(0x4000..0x9000),
            Err(ReleaseError::Outside {
                start: 0x4000,
                bytes: 0x3000
            })
        ));
        assert!(matches!(
            ram.release(0x10_0000..0x10_1000),
            Err(ReleaseError::Outside { .. })
        ));
        assert!(matches!(
            ram.release(u64::MAX - 0xfff..u64::MAX),
            Err(ReleaseError::Outside { .. })
        ));
        let allocated = ram.allocated().unwrap();
        assert_eq!(
            allocated.regions,
            [(0x1000, 0x4000, 0x3000), (0x8000, 0x4000, 0x3000)]
        );
        // Two regions of one file: the file counts once.
        assert_eq!(allocated.total, 0x6000);
    }
}
