// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A region: guest physical addresses, and the part of a RAM block that they map.

use std::ops::Range;

use super::error::LayoutError;
use crate::PAGE_SIZE;

/// A contiguous range of guest physical addresses, and the part of a RAM block that it maps.
///
/// A region has at least one page, consists of whole pages, and ends inside the address space.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Region {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) block: usize,
    pub(super) offset: u64,
}

impl Region {
    /// Returns a region of `length` bytes at the guest physical address `start`. The region maps the start of the first
    /// RAM block.
    ///
    /// # Errors
    ///
    /// If the region is empty, does not consist of whole pages, or does not end within the address space.
    pub const fn new(start: u64, length: u64) -> Result<Self, LayoutError> {
        if start % PAGE_SIZE != 0 || length % PAGE_SIZE != 0 {
            return Err(LayoutError::Unaligned { start, length });
        }
        if length == 0 {
            return Err(LayoutError::Empty { start });
        }
        if start.checked_add(length).is_none() {
            return Err(LayoutError::Wraps { start, length });
        }
        Ok(Self {
            start,
            length,
            block: 0,
            offset: 0,
        })
    }

    /// Returns the region at the same addresses that maps the RAM block with index `block` from byte `offset`.
    #[must_use]
    pub const fn backed_by(mut self, block: usize, offset: u64) -> Self {
        self.block = block;
        self.offset = offset;
        self
    }

    /// Returns the guest physical address of the first byte.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Returns the number of bytes.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Returns the guest physical address after the last byte.
    pub const fn end(&self) -> u64 {
        // `new` has checked that this does not overflow.
        self.start + self.length
    }

    /// Returns the index of the RAM block that the region maps.
    pub const fn block(&self) -> usize {
        self.block
    }

    /// Returns the offset in the RAM block of the first byte that the region maps.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the pages of the RAM block that the region maps.
    pub(crate) const fn block_pages(&self) -> Range<u64> {
        let first = self.offset / PAGE_SIZE;
        first..first + self.length / PAGE_SIZE
    }

    /// Returns the pages of the RAM block that lie wholly inside both this region and the guest physical addresses
    /// `bytes`.
    pub(crate) fn pages_within(&self, bytes: &Range<u64>) -> Range<u64> {
        let start = bytes.start.max(self.start) - self.start;
        let end = bytes.end.min(self.end()).saturating_sub(self.start);
        let (first, last) = (start.div_ceil(PAGE_SIZE), end / PAGE_SIZE);
        self.in_block(first..last.max(first))
    }

    /// Returns the pages of the RAM block that share at least one byte with both this region and the guest physical
    /// addresses `bytes`.
    pub(crate) fn pages_touching(&self, bytes: &Range<u64>) -> Range<u64> {
        let start = bytes.start.max(self.start) - self.start;
        let end = bytes.end.min(self.end()).saturating_sub(self.start);
        if start >= end {
            return 0..0;
        }
        self.in_block(start / PAGE_SIZE..end.div_ceil(PAGE_SIZE))
    }

    fn in_block(&self, pages: Range<u64>) -> Range<u64> {
        let first = self.offset / PAGE_SIZE;
        first + pages.start..first + pages.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_whole_pages_inside_the_address_space() {
        assert_eq!(
            Region::new(0x1000, 0),
            Err(LayoutError::Empty { start: 0x1000 })
        );
        assert!(matches!(
            Region::new(0x1001, 0x1000),
            Err(LayoutError::Unaligned { .. })
        ));
        assert!(matches!(
            Region::new(0x1000, 0x1001),
            Err(LayoutError::Unaligned { .. })
        ));
        assert!(matches!(
            Region::new(!0xfff, 0x1000),
            Err(LayoutError::Wraps { .. })
        ));
        assert_eq!(
            Region::new(0x3e_f000, 0x2000).map(|r| r.end()),
            Ok(0x3f_1000)
        );
    }

    #[test]
    fn r5_only_whole_pages_inside_are_within() {
        let region = Region::new(0x1000, 0x4000).unwrap().backed_by(0, 0x7000);
        assert_eq!(region.pages_within(&(0..u64::MAX)), 7..11);
        assert_eq!(region.pages_within(&(0x1001..0x3fff)), 8..9);
        assert_eq!(region.pages_within(&(0x1001..0x1fff)), 8..8);
        assert_eq!(region.pages_touching(&(0x1fff..0x2001)), 7..9);
        assert!(region.pages_touching(&(0..0x1000)).is_empty());
        assert!(region.pages_touching(&(0x5000..0x6000)).is_empty());
    }
}
