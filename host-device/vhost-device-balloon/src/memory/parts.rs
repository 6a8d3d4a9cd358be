// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Splits ranges of guest physical addresses into parts that can be processed one at a time.

use std::ops::Range;

use guest_migration::PAGE_SIZE;
use vm_memory::FileOffset;

use super::{Ram, RamRegion};

/// A part of a range of guest physical addresses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Part {
    /// Addresses in one region of guest memory.
    Inside(Range<u64>),
    /// Addresses outside guest memory.
    Outside(Range<u64>),
}

impl Ram {
    /// Returns the first part of `range`, or `None` if the range is empty. A part inside guest memory has at most
    /// `most` bytes, or the least that can be released: it ends at the end of the range, of the region, or of a host
    /// page (or huge page). No page is lost between two parts.
    pub fn first_part(&self, range: &Range<u64>, most: u64) -> Option<Part> {
        let Range { start, end } = *range;
        if start >= end {
            return None;
        }
        let region = self.regions.get(self.first_overlapping(range));
        Some(match region {
            Some(region) if region.start <= start => {
                let end = end.min(region.range().end).min(region.split(start, most));
                Part::Inside(start..end)
            }
            Some(region) => Part::Outside(start..end.min(region.start)),
            None => Part::Outside(start..end),
        })
    }

    /// Returns the parts of `range` that are in guest memory, one for each region, in ascending order.
    pub(super) fn parts_inside(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut rest = range;
        std::iter::from_fn(move || loop {
            match self.first_part(&rest, u64::MAX)? {
                Part::Outside(part) => rest.start = part.end,
                Part::Inside(part) => {
                    rest.start = part.end;
                    return Some(part);
                }
            }
        })
    }

    fn region_at(&self, address: u64) -> Option<&RamRegion> {
        let region = self
            .regions
            .get(self.first_overlapping(&(address..address)))?;
        region.range().contains(&address).then_some(region)
    }

    /// Returns the smallest unit that the memory file at the guest physical address `address` can free.
    pub(super) fn granule_at(&self, address: u64) -> u64 {
        self.region_at(address).map_or(1, |region| region.granule)
    }

    /// Returns the granules that overlap `part`, in ascending order. `part` must be in one region. Leaves out those that
    /// the region contains only in part: the rest of the file may be in use.
    pub(super) fn granules<'a>(
        &'a self,
        part: &'a Range<u64>,
    ) -> impl Iterator<Item = Range<u64>> + 'a {
        self.region_at(part.start)
            .into_iter()
            .flat_map(|region| region.granules(part))
    }
}

impl RamRegion {
    fn granules<'a>(&'a self, part: &'a Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
        // In the file, a granule starts at a multiple of its size.
        let phase = self.file.as_ref().map_or(0, FileOffset::start) % self.granule;
        let inside = part.start.saturating_sub(self.start);
        let first = inside.saturating_add(phase) / self.granule;
        let first = first.max(u64::from(phase > 0));
        (first..u64::MAX).map_while(move |index| {
            let offset = index.checked_mul(self.granule)?.checked_sub(phase)?;
            let start = self.start.checked_add(offset)?;
            let end = start.checked_add(self.granule)?;
            (start < part.end && end <= self.range().end).then_some(start..end)
        })
    }

    /// Returns the address at which a part that begins at `start` ends: the last page boundary of the file in the
    /// `most` bytes, or the first one if there is none.
    fn split(&self, start: u64, most: u64) -> u64 {
        let unit = self.granule.max(PAGE_SIZE);
        let offset = |address: u64| {
            let file = self.file.as_ref().map_or(0, FileOffset::start);
            file.saturating_add(address.saturating_sub(self.start)) % unit
        };
        let last = start.saturating_add(most);
        let last = last.saturating_sub(offset(last));
        if last > start {
            return last;
        }
        start.saturating_add(unit.saturating_sub(offset(start)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::tests::guest;

    fn parts(ram: &Ram, mut range: Range<u64>, most: u64) -> Vec<Part> {
        let mut parts = Vec::new();
        while let Some(part) = ram.first_part(&range, most) {
            let (Part::Inside(bytes) | Part::Outside(bytes)) = &part;
            assert_eq!(bytes.start, range.start);
            range.start = bytes.end;
            parts.push(part);
        }
        parts
    }

    #[test]
    fn parts_end_at_pages_regions_and_gaps() {
        let ram = Ram::new(&guest(&[(0x1000, 0x4000, 0x4000), (0x8000, 0x4000, 0)]));
        assert_eq!(
            parts(&ram, 0x800..0x9800, 0x2fff),
            [
                Part::Outside(0x800..0x1000),
                Part::Inside(0x1000..0x3000),
                Part::Inside(0x3000..0x5000),
                Part::Outside(0x5000..0x8000),
                Part::Inside(0x8000..0x9800),
            ]
        );
        // A part is a page at least.
        assert_eq!(
            parts(&ram, 0x1800..0x3001, 1),
            [
                Part::Inside(0x1800..0x2000),
                Part::Inside(0x2000..0x3000),
                Part::Inside(0x3000..0x3001),
            ]
        );
        assert_eq!(parts(&ram, 7..7, 1), []);
        assert_eq!(
            parts(&ram, u64::MAX - 5..u64::MAX, 1),
            [Part::Outside(u64::MAX - 5..u64::MAX)]
        );
    }

    proptest! {
        #[test]
        fn parts_release_what_the_whole_releases(
            start in 0u64..0xe000, length in 0u64..0xe000, most in 0u64..0x4000,
        ) {
            let regions = [(0x1000, 0x4000, 0x4000), (0x8000, 0x4000, 0)];
            let (mut whole, mut split) = (Ram::new(&guest(&regions)), Ram::new(&guest(&regions)));
            let range = start..start + length;
            whole.release(range.clone()).unwrap();
            for part in parts(&split, range, most) {
                if let Part::Inside(part) = part {
                    split.release(part).unwrap();
                }
            }
            prop_assert_eq!(whole.allocated().unwrap(), split.allocated().unwrap());
        }
    }
}
