// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where guest memory lies.

use std::ops::Range;

use thiserror::Error;

use crate::PAGE_SIZE;

/// Why a set of regions cannot be guest memory.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum RegionError {
    /// A start or a length is not a multiple of [`PAGE_SIZE`].
    #[error("the region at {start:#x} of {length:#x} bytes is not made of whole pages of {PAGE_SIZE} bytes")]
    Unaligned {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// A region holds no page.
    #[error("the region at {start:#x} is empty")]
    Empty {
        /// Guest physical address.
        start: u64,
    },
    /// A region goes on beyond the last address.
    #[error(
        "the region at {start:#x} of {length:#x} bytes goes on beyond the end of the address space"
    )]
    Wraps {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// Two regions share a page.
    #[error("the regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest physical address of the lower region.
        first: u64,
        /// Guest physical address of the higher region.
        second: u64,
    },
    /// The bitmap of so large a region does not fit in memory.
    #[error("no memory for the dirty bitmap of the region at {start:#x} of {length:#x} bytes")]
    TooLarge {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
    },
}

/// A piece of guest memory without holes: at least one page, whole pages only, inside the address space.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Region {
    start: u64,
    length: u64,
}

impl Region {
    /// A region of `length` bytes from the guest physical address `start`.
    ///
    /// # Errors
    ///
    /// If the region is empty, is not made of whole pages, or does not end within the address space.
    pub const fn new(start: u64, length: u64) -> Result<Self, RegionError> {
        if start % PAGE_SIZE != 0 || length % PAGE_SIZE != 0 {
            return Err(RegionError::Unaligned { start, length });
        }
        if length == 0 {
            return Err(RegionError::Empty { start });
        }
        if start.checked_add(length).is_none() {
            return Err(RegionError::Wraps { start, length });
        }
        Ok(Self { start, length })
    }

    /// The guest physical address of the first byte.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// The number of bytes.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The guest physical address after the last byte.
    pub const fn end(&self) -> u64 {
        // `new` made sure that this does not wrap.
        self.start + self.length
    }

    /// The number of pages.
    pub const fn pages(&self) -> u64 {
        self.length / PAGE_SIZE
    }

    /// The pages that lie wholly inside both this region and `bytes`, counted from the region's start.
    pub(crate) fn pages_within(&self, bytes: &Range<u64>) -> Range<u64> {
        let start = bytes.start.max(self.start) - self.start;
        let end = bytes.end.min(self.end()).saturating_sub(self.start);
        let (first, last) = (start.div_ceil(PAGE_SIZE), end / PAGE_SIZE);
        first..last.max(first)
    }

    /// The pages that share at least a byte with both this region and `bytes`, counted from the region's start.
    pub(crate) fn pages_touching(&self, bytes: &Range<u64>) -> Range<u64> {
        let start = bytes.start.max(self.start) - self.start;
        let end = bytes.end.min(self.end()).saturating_sub(self.start);
        if start >= end {
            return 0..0;
        }
        start / PAGE_SIZE..end.div_ceil(PAGE_SIZE)
    }
}

/// Guest memory: regions by ascending address that do not overlap. They may touch.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Regions(Vec<Region>);

impl Regions {
    /// Guest memory made of `regions`, which may come in any order.
    ///
    /// # Errors
    ///
    /// If two of them overlap.
    pub fn new(regions: impl IntoIterator<Item = Region>) -> Result<Self, RegionError> {
        let mut regions: Vec<Region> = regions.into_iter().collect();
        regions.sort_unstable();
        for pair in regions.windows(2) {
            if let [first, second] = pair {
                if first.end() > second.start() {
                    return Err(RegionError::Overlap {
                        first: first.start(),
                        second: second.start(),
                    });
                }
            }
        }
        Ok(Self(regions))
    }

    /// The regions by ascending address.
    pub fn iter(&self) -> std::slice::Iter<'_, Region> {
        self.0.iter()
    }

    /// The number of pages in all regions together.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(Region::pages).sum()
    }
}

impl<'a> IntoIterator for &'a Regions {
    type Item = &'a Region;
    type IntoIter = std::slice::Iter<'a, Region>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_whole_pages_inside_the_address_space() {
        assert_eq!(
            Region::new(0x1000, 0),
            Err(RegionError::Empty { start: 0x1000 })
        );
        assert!(matches!(
            Region::new(0x1001, 0x1000),
            Err(RegionError::Unaligned { .. })
        ));
        assert!(matches!(
            Region::new(0x1000, 0x1001),
            Err(RegionError::Unaligned { .. })
        ));
        assert!(matches!(
            Region::new(!0xfff, 0x1000),
            Err(RegionError::Wraps { .. })
        ));
        assert_eq!(
            Region::new(0x3e_f000, 0x2000).map(|r| r.end()),
            Ok(0x3f_1000)
        );
    }

    #[test]
    fn regions_may_touch_but_not_overlap() {
        let region = |start, length| Region::new(start, length).unwrap();
        assert!(Regions::new([region(0x2000, 0x1000), region(0, 0x2000)]).is_ok());
        assert_eq!(
            Regions::new([region(0x1000, 0x1000), region(0, 0x2000)]),
            Err(RegionError::Overlap {
                first: 0,
                second: 0x1000
            })
        );
    }

    #[test]
    fn r5_only_whole_pages_inside_are_within() {
        let region = Region::new(0x1000, 0x4000).unwrap();
        assert_eq!(region.pages_within(&(0..u64::MAX)), 0..4);
        assert_eq!(region.pages_within(&(0x1001..0x3fff)), 1..2);
        assert_eq!(region.pages_within(&(0x1001..0x1fff)), 1..1);
        assert_eq!(region.pages_touching(&(0x1fff..0x2001)), 0..2);
        assert!(region.pages_touching(&(0..0x1000)).is_empty());
        assert!(region.pages_touching(&(0x5000..0x6000)).is_empty());
    }
}
