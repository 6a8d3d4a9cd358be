// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory: regions of files that the front end shares.
//!
//! Memory is released through the files. Several processes map a file, so only a hole in the file frees its pages;
//! `MADV_DONTNEED` on one mapping frees nothing. Holes are also found through the files: reading a hole through a
//! mapping would allocate its pages.
//!
//! `layout` describes guest memory to a migration, and `hole_recorder` records for it which holes are punched. `backing`
//! checks the files that a front end shares, and `sys` guards accesses to them against truncation. `partial_pages` collects
//! balloon pages until they are whole pages of a file. `parts` splits ranges into parts.

mod backing;
mod hole_recorder;
mod layout;
mod partial_pages;
mod parts;
pub mod pin_scan;
#[allow(unsafe_code, reason = "system calls")]
pub mod sys;

pub use backing::BackingError;
pub use hole_recorder::HoleRecorder;
pub use layout::RamLayoutError;
pub use partial_pages::PartialPages;
pub use parts::Part;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use rustix::fs::{fallocate, fstat, fstatfs, seek, FallocateFlags, SeekFrom};
use rustix::io::{retry_on_intr, Errno};
use thiserror::Error;
use tracing::warn;
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
    /// Whether the host has refused to punch holes in the file, for a reason that lasts.
    is_unfreeable: bool,
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
    is_discard_inhibited: bool,
    /// Whether another process may truncate a memory file.
    is_truncatable: bool,
    punches: u64,
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
                is_unfreeable: false,
            }
        });
        Self {
            regions: regions.collect(),
            ..Self::default()
        }
    }

    /// Sets whether memory stays allocated although it is released or discarded. Its content does not change then.
    pub fn inhibit_discard(&mut self, inhibit: bool) {
        self.is_discard_inhibited = inhibit;
    }

    /// Takes over what does not depend on the regions: counters, and whether discarding is inhibited.
    pub fn continue_from(&mut self, before: &Self) {
        self.is_discard_inhibited = before.is_discard_inhibited;
        self.punches = before.punches;
    }

    /// Returns whether another process may truncate a memory file, for memory from [`Ram::of_front_end`].
    pub fn is_truncatable(&self) -> bool {
        self.is_truncatable
    }

    /// Returns the number of system calls that punched holes, successfully or not.
    pub fn punches(&self) -> u64 {
        self.punches
    }

    /// Returns the largest unit that a memory file can free, in bytes: the size of a huge page, if there are some.
    pub fn largest_granule(&self) -> u64 {
        let granules = self.regions.iter().map(|region| region.granule);
        granules.max().unwrap_or(1)
    }

    /// Returns the bytes of a page of the mapping at the guest physical address `address`.
    pub fn page_size_at(&self, address: u64) -> u64 {
        self.granule_at(address)
            .max(rustix::param::page_size() as u64)
    }

    /// Returns the index of the first region that ends after the start of `range`.
    fn first_overlapping(&self, range: &Range<u64>) -> usize {
        self.regions
            .partition_point(|region| region.range().end <= range.start)
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

    /// Releases the guest physical addresses `range` to the host, and returns the number of released bytes. Released
    /// memory reads as zeros, and the host allocates memory again when the guest writes to it.
    ///
    /// Only whole host pages (or huge pages) are released. A page that `range` covers in part does not change. Memory
    /// that is already free counts as released. Memory without a file, memory whose file cannot have holes, and addresses
    /// outside guest memory are left out.
    ///
    /// # Errors
    ///
    /// If the host cannot punch a hole; part of the range may be released.
    pub fn release(&mut self, range: Range<u64>) -> Result<u64, ReleaseError> {
        let parts = self.discard(range)?;
        let bytes = parts.iter().map(|it| it.end.saturating_sub(it.start));
        Ok(bytes.sum())
    }

    /// Discards the guest physical addresses `range`, and returns the discarded parts. Only these parts read as
    /// zeros afterwards. Addresses outside guest memory, memory that cannot be freed, and pages that `range` covers in
    /// part are left out.
    ///
    /// # Errors
    ///
    /// If the host cannot punch a hole. Part of the range may be discarded.
    pub fn discard(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>, ReleaseError> {
        let mut discarded = Vec::new();
        if self.is_discard_inhibited {
            return Ok(discarded);
        }
        if let Some(hole_recorder) = &self.hole_recorder {
            hole_recorder.record(&range);
        }
        let first = self.first_overlapping(&range);
        for region in self.regions.get_mut(first..).unwrap_or_default() {
            if region.start >= range.end {
                break;
            }
            let start = range.start.max(region.start);
            let end = range.end.min(region.range().end);
            let Some(length) = end.checked_sub(start).filter(|length| *length > 0) else {
                continue;
            };
            let Some((offset, length)) = region.whole_granules(start - region.start, length) else {
                continue;
            };
            self.punches = self.punches.saturating_add(1);
            let start = region.start.saturating_add(offset);
            match region.punch(offset, length) {
                Ok(()) => discarded.push(start..start.saturating_add(length)),
                Err(error) if is_lasting(error) => {
                    region.is_unfreeable = true;
                    warn!(
                        "guest memory at {:#x} stays allocated: its memory file refuses holes ({error}); a balloon frees \
                         no host memory there",
                        region.start
                    );
                }
                Err(error) => {
                    return Err(ReleaseError::Punch {
                        start,
                        length,
                        source: error.into(),
                    })
                }
            }
        }
        Ok(discarded)
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
                    allocated.total = allocated.total.saturating_add(allocated_blocks(&stat));
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

    /// Returns the guest physical addresses of the region.
    fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.length)
    }

    /// Returns whether the file consists of huge pages.
    fn has_huge_pages(&self) -> bool {
        self.granule > rustix::param::page_size() as u64
    }

    /// Returns offset and length of the whole granules among `length` bytes from `offset`, which must be inside the
    /// region. `None` if there are no whole granules, or the region cannot be freed.
    fn whole_granules(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let file = self.file.as_ref().filter(|_| !self.is_unfreeable)?;
        let first = file.start().checked_add(offset)?;
        let end = first.checked_add(length)? / self.granule * self.granule;
        let first = first.checked_next_multiple_of(self.granule)?;
        let length = end.checked_sub(first).filter(|length| *length > 0)?;
        Some((first - file.start(), length))
    }

    /// Punches a hole of `length` bytes at `offset`. Both must be multiples of the granule in the file.
    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let file = self.file.as_ref().ok_or(Errno::OPNOTSUPP)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let at = file.start().saturating_add(offset);
        retry_on_intr(|| fallocate(file.file(), flags, at, length))
    }

    /// Returns the number of bytes of the region that are not in holes. A file of huge pages does not tell where its holes
    /// are. For such a file, returns the bytes of the whole file, but at most those of the region.
    fn allocated(&self) -> io::Result<u64> {
        let Some(file) = &self.file else {
            return Ok(self.length);
        };
        if self.has_huge_pages() {
            return Ok(allocated_blocks(&fstat(file.file())?).min(self.length));
        }
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

fn allocated_blocks(stat: &rustix::fs::Stat) -> u64 {
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    blocks.saturating_mul(STAT_BLOCK)
}

/// Returns whether each attempt to punch a hole in this file fails: the file system has no holes, or the file is sealed,
/// read-only or a device.
fn is_lasting(error: Errno) -> bool {
    [
        Errno::OPNOTSUPP,
        Errno::NOSYS,
        Errno::PERM,
        Errno::BADF,
        Errno::ROFS,
        Errno::NODEV,
        Errno::SPIPE,
    ]
    .contains(&error)
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
    #![allow(clippy::single_range_in_vec_init, reason = "lists of ranges")]

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

    /// Returns guest memory of `length` bytes in one sparse file, as if the pages of the file had `granule` bytes.
    pub(crate) fn coarse_ram(length: u64, granule: u64) -> Ram {
        let file = FileOffset::new(memfd(length), 0);
        let range = (GuestAddress(0), length as usize, Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let mut ram = Ram::new(&memory);
        ram.set_granule(granule);
        ram
    }

    impl Ram {
        /// Acts as if the pages of the files had `granule` bytes.
        pub(crate) fn set_granule(&mut self, granule: u64) {
            self.regions.iter_mut().for_each(|it| it.granule = granule);
        }
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
        let mut ram = Ram::new(&memory);
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

    /// Returns the bytes of `range` that are outside guest memory.
    fn outside(ram: &Ram, mut range: Range<u64>) -> u64 {
        let mut bytes = 0;
        while let Some(part) = ram.first_part(&range, u64::MAX) {
            match part {
                Part::Inside(part) => range.start = part.end,
                Part::Outside(part) => {
                    bytes += part.end - part.start;
                    range.start = part.end;
                }
            }
        }
        bytes
    }

    #[test]
    fn release_clamps_to_guest_memory_and_says_so() {
        let memory = guest(&[(0x1000, 0x4000, 0x4000), (0x8000, 0x4000, 0)]);
        let mut ram = Ram::new(&memory);
        assert_eq!(
            (outside(&ram, 0x4000..0x9000), outside(&ram, 0x8000..0xc000)),
            (0x3000, 0)
        );
        assert_eq!(ram.release(0x4000..0x9000).unwrap(), 0x2000);
        for range in [0x10_0000..0x10_1000, u64::MAX - 0xfff..u64::MAX] {
            assert_eq!(outside(&ram, range.clone()), range.end - range.start);
            assert_eq!(ram.release(range).unwrap(), 0);
        }
        let allocated = ram.allocated().unwrap();
        assert_eq!(
            allocated.regions,
            [(0x1000, 0x4000, 0x3000), (0x8000, 0x4000, 0x3000)]
        );
        // Two regions of one file: the file counts once.
        assert_eq!(allocated.total, 0x6000);
        assert_eq!(ram.punches(), 2);
    }

    #[test]
    fn a_granule_that_a_region_has_only_in_part_stays() {
        // The region starts in the middle of a granule of the file, and ends in another one.
        let memory = guest(&[(0x10_0000, 0x6000, 0x2000)]);
        let mut ram = Ram::new(&memory);
        ram.set_granule(0x4000);
        let parts: Vec<_> = ram.parts_inside(0..u64::MAX).collect();
        let granules: Vec<_> = parts.iter().flat_map(|it| ram.granules(it)).collect();
        assert_eq!(granules, [0x10_2000..0x10_6000]);
        assert_eq!(ram.release(0..u64::MAX).unwrap(), 0x4000);
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(0x10_1fff)).unwrap(),
            0x5a
        );
    }

    #[test]
    fn a_file_that_refuses_holes_is_asked_once() {
        // A file that is open for reading only refuses holes, as a file system without holes does.
        let file = memfd(0x4000);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let read_only = File::open(path).unwrap();
        let region = RamRegion {
            start: 0,
            length: 0x4000,
            file: Some(FileOffset::new(read_only, 0)),
            granule: 0x1000,
            is_unfreeable: false,
        };
        let mut ram = Ram {
            regions: vec![region],
            ..Ram::default()
        };
        for _ in 0..3 {
            assert_eq!(ram.release(0..0x4000).unwrap(), 0);
        }
        assert_eq!(ram.punches(), 1);
    }

    #[test]
    fn preallocated_files_and_files_on_a_disk_are_freed() {
        const LENGTH: u64 = 0x10_0000;
        let disk = tempfile::tempfile().unwrap();
        ftruncate(&disk, LENGTH).unwrap();
        for (file, name) in [(memfd(LENGTH), "memfd"), (disk, "disk")] {
            if let Err(error) = fallocate(&file, FallocateFlags::empty(), 0, LENGTH) {
                println!("skipped: {name}: {error}");
                continue;
            }
            let range = (
                GuestAddress(0),
                LENGTH as usize,
                Some(FileOffset::new(file, 0)),
            );
            let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
            let mut ram = Ram::new(&memory);
            let before = ram.allocated().unwrap().total;
            assert!(before >= LENGTH, "{name} {before}");
            let released = ram.release(0..LENGTH / 2).unwrap();
            if ram.regions[0].is_unfreeable {
                println!("skipped: {name}: its file system has no holes");
                continue;
            }
            let freed = before - ram.allocated().unwrap().total;
            assert_eq!((released, freed), (LENGTH / 2, LENGTH / 2), "{name}");
        }
    }
}
