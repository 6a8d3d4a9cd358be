// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Byte-for-byte comparison of guests' memory files. Reading allocates nothing: a hole reads as zeros and stays a hole.

use std::collections::hash_map::DefaultHasher;
use std::fs::{File, OpenOptions};
use std::hash::Hasher;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use guest_agent::ranges::{PhysicalRange, RangeSet};
use nix::errno::Errno;
use nix::unistd::{lseek64, Whence};

const PAGE: u64 = 4096;
/// The size of a read, in bytes.
const CHUNK: u64 = 1 << 20;

/// A memory file.
///
/// For a guest with less than 2 GiB of memory, as in these tests, an offset in the file is a guest physical address.
#[derive(Debug)]
pub struct MemoryImage {
    file: File,
    length: u64,
}

impl MemoryImage {
    /// Opens the file at `path` for reading and writing. The path may be in `/proc/PID/fd`.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let length = file
            .metadata()
            .with_context(|| format!("cannot look at {}", path.display()))?
            .len();
        Ok(Self { file, length })
    }

    /// Returns the size of the file in bytes, including holes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns the parts of the file that are not holes, in whole pages.
    ///
    /// # Errors
    ///
    /// Fails if the file system does not show holes.
    pub fn data(&self) -> Result<RangeSet> {
        let seek = |from: u64, whence| match lseek64(&self.file, i64::try_from(from)?, whence) {
            Ok(place) => Ok(Some(u64::try_from(place)?)),
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(error).context("cannot look for holes"),
        };
        let (mut ranges, mut from) = (Vec::new(), 0);
        while let Some(start) = seek(from, Whence::SeekData)? {
            let end = seek(start, Whence::SeekHole)?.unwrap_or(self.length);
            let end = end.min(self.length).next_multiple_of(PAGE);
            let start = start / PAGE * PAGE;
            ranges.push(PhysicalRange {
                start,
                length: end - start,
            });
            from = end;
        }
        Ok(ranges.into())
    }

    /// Returns the pages that differ between two files.
    ///
    /// # Errors
    ///
    /// Fails if the files have different sizes, or cannot be read.
    pub fn differences(&self, other: &Self) -> Result<RangeSet> {
        ensure!(
            self.length == other.length,
            "one file has {} bytes, the other {}",
            self.length,
            other.length
        );
        let (mine, theirs) = (self.data()?, other.data()?);
        let either = mine.ranges().iter().chain(theirs.ranges()).copied();
        let either: RangeSet = either.collect();
        let mut different = Vec::new();
        for chunk in pieces(&either, CHUNK) {
            let (mine, theirs) = (self.read(chunk)?, other.read(chunk)?);
            if mine == theirs {
                continue;
            }
            let page = usize::try_from(PAGE)?;
            let pages = mine.chunks(page).zip(theirs.chunks(page));
            for (start, (mine, theirs)) in (chunk.start..).step_by(page).zip(pages) {
                if mine != theirs {
                    different.push(PhysicalRange {
                        start,
                        length: PAGE,
                    });
                }
            }
        }
        Ok(different.into())
    }

    /// Returns a hash of each page of `ranges`. The hashes of different contents are equal with a probability of 2^-64.
    ///
    /// # Errors
    ///
    /// Fails if the pages cannot be read.
    pub fn page_hashes(&self, ranges: &RangeSet) -> Result<PageHashes> {
        let mut page_hashes = Vec::new();
        for page in pieces(ranges, PAGE) {
            let mut hasher = DefaultHasher::new();
            hasher.write(&self.read(page)?);
            page_hashes.push((page, hasher.finish()));
        }
        Ok(PageHashes(page_hashes))
    }

    /// Copies `ranges` from another file to this one.
    ///
    /// # Errors
    ///
    /// Fails if a file cannot be read or written.
    pub fn copy_from(&self, other: &Self, ranges: &RangeSet) -> Result<()> {
        for chunk in pieces(ranges, CHUNK) {
            let bytes = other.read(chunk)?;
            self.write(chunk.start, &bytes)?;
        }
        Ok(())
    }

    /// Reads a range. Bytes after the end of the file read as zeros.
    ///
    /// # Errors
    ///
    /// Fails if the range cannot be read.
    pub fn read(&self, range: PhysicalRange) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(range.length)?];
        let mut there = bytes.as_mut_slice();
        // The last page may be longer than the file.
        if range.end() > self.length {
            let there_is = usize::try_from(self.length.saturating_sub(range.start))?;
            there = there.split_at_mut(there_is).0;
        }
        self.file
            .read_exact_at(there, range.start)
            .with_context(|| format!("cannot read {range:x?}"))?;
        Ok(bytes)
    }

    /// Writes bytes at an offset.
    ///
    /// # Errors
    ///
    /// Fails if the bytes cannot be written.
    pub fn write(&self, start: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, start)
            .with_context(|| format!("cannot write at {start:#x}"))
    }
}

/// The hashes of pages at one moment.
#[derive(Debug)]
pub struct PageHashes(Vec<(PhysicalRange, u64)>);

impl PageHashes {
    /// Returns the pages whose contents in `image` still match their hashes.
    ///
    /// # Errors
    ///
    /// Fails if a page cannot be read.
    pub fn unchanged(&self, image: &MemoryImage) -> Result<RangeSet> {
        let mut same = Vec::new();
        for (page, page_hash) in &self.0 {
            let mut hasher = DefaultHasher::new();
            hasher.write(&image.read(*page)?);
            if hasher.finish() == *page_hash {
                same.push(*page);
            }
        }
        Ok(same.into())
    }
}

/// Splits ranges into pieces of at most `length` bytes.
fn pieces(ranges: &RangeSet, length: u64) -> impl Iterator<Item = PhysicalRange> + '_ {
    ranges.ranges().iter().flat_map(move |range| {
        let (range, step) = (*range, usize::try_from(length).unwrap_or(usize::MAX));
        (range.start..range.end())
            .step_by(step)
            .map(move |start| PhysicalRange {
                start,
                length: length.min(range.end() - start),
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    fn range(page: u64, pages: u64) -> PhysicalRange {
        PhysicalRange {
            start: page * PAGE,
            length: pages * PAGE,
        }
    }

    fn two(scratch: &Scratch) -> (MemoryImage, MemoryImage) {
        let [one, other] = ["one", "other"].map(|name| {
            let path = scratch.path(name);
            File::create(&path).unwrap().set_len(1000 * PAGE).unwrap();
            MemoryImage::open(&path).unwrap()
        });
        (one, other)
    }

    #[test]
    fn only_pages_that_differ_are_named_and_holes_are_zeros() {
        let scratch = Scratch::new().unwrap();
        let (one, other) = two(&scratch);
        assert!(one.differences(&other).unwrap().ranges().is_empty());
        // Zeros against a hole, equal data, one different byte, the border of two chunks, and the last page.
        one.write(3 * PAGE, &[0; PAGE as usize]).unwrap();
        for image in [&one, &other] {
            image.write(10 * PAGE, &[7; 5 * PAGE as usize]).unwrap();
        }
        one.write(12 * PAGE + 4095, &[8]).unwrap();
        other.write(255 * PAGE, &[1; 2 * PAGE as usize]).unwrap();
        one.write(1000 * PAGE - 1, &[1]).unwrap();
        let found = one.differences(&other).unwrap();
        let wanted: RangeSet = [range(12, 1), range(255, 2), range(999, 1)]
            .into_iter()
            .collect();
        assert_eq!(found, wanted);
        assert_eq!(other.differences(&one).unwrap(), wanted);
        one.copy_from(&other, &found).unwrap();
        assert!(one.differences(&other).unwrap().ranges().is_empty());
        // Reading has allocated nothing.
        assert!(other.data().unwrap().bytes() <= 16 * PAGE);
    }

    #[test]
    fn a_page_that_has_changed_is_not_unchanged() {
        let scratch = Scratch::new().unwrap();
        let (one, _) = two(&scratch);
        let ranges: RangeSet = [range(1, 3), range(8, 1)].into_iter().collect();
        let page_hashes = one.page_hashes(&ranges).unwrap();
        one.write(2 * PAGE + 5, &[1]).unwrap();
        let wanted: RangeSet = [range(1, 1), range(3, 1), range(8, 1)]
            .into_iter()
            .collect();
        assert_eq!(page_hashes.unchanged(&one).unwrap(), wanted);
    }

    #[test]
    fn files_of_two_lengths_are_not_compared() {
        let scratch = Scratch::new().unwrap();
        let (one, other) = two(&scratch);
        other.file.set_len(PAGE).unwrap();
        let other = MemoryImage::open(&scratch.path("other")).unwrap();
        assert!(one.differences(&other).is_err());
    }
}
