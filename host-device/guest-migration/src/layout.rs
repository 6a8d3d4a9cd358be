// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The layout of guest memory: its memory files and their guest physical addresses.
//!
//! A migration sends *RAM blocks*: named memory files, which have the same names and sizes at source and destination.
//! The guest addresses *regions*: each region maps a part of a RAM block at a guest physical address. A RAM block may
//! hold memory that no region maps at the moment, as behind the VGA window of a PC; the migration sends that memory
//! too. Several regions may map the same page.

use std::ops::Range;

use thiserror::Error;

use crate::PAGE_SIZE;

/// Maximum length of the name of a RAM block, in bytes.
pub const RAM_BLOCK_NAME_MAX: usize = 255;

/// Why RAM blocks and regions do not form a valid layout.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum LayoutError {
    /// A start or a length is not a multiple of [`PAGE_SIZE`].
    #[error("the region at {start:#x} of {length:#x} bytes is not made of whole pages of {PAGE_SIZE} bytes")]
    Unaligned {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A region holds no page.
    #[error("the region at {start:#x} is empty")]
    Empty {
        /// Guest physical address.
        start: u64,
    },
    /// A region extends beyond the end of the address space.
    #[error(
        "the region at {start:#x} of {length:#x} bytes goes on beyond the end of the address space"
    )]
    Wraps {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Two regions share a guest physical address.
    #[error("the regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest physical address of the lower region.
        first: u64,
        /// Guest physical address of the higher region.
        second: u64,
    },
    /// A region maps bytes that its RAM block does not have, or its RAM block does not exist, or its offset is not a
    /// multiple of [`PAGE_SIZE`].
    #[error("the region at {start:#x} shows bytes from {offset:#x} on of block {block}, which has not so many, or does not exist")]
    OutsideRamBlock {
        /// Guest physical address.
        start: u64,
        /// Index of the RAM block.
        block: usize,
        /// Offset in the RAM block, in bytes.
        offset: u64,
    },
    /// The name of a RAM block is empty or too long, or its length is 0 or not a multiple of [`PAGE_SIZE`].
    #[error("a block needs a name of 1 to {RAM_BLOCK_NAME_MAX} bytes and a length of whole pages of {PAGE_SIZE} bytes; '{name}' has {length:#x} bytes")]
    RamBlock {
        /// Name of the RAM block.
        name: String,
        /// Length of the RAM block in bytes.
        length: u64,
    },
    /// Two RAM blocks have the same name.
    #[error("there are two blocks with the name '{0}'")]
    DuplicateName(String),
    /// The dirty bitmap of a RAM block does not fit in memory.
    #[error("no memory for the dirty bitmap of block '{name}' of {length:#x} bytes")]
    TooLarge {
        /// Name of the RAM block.
        name: String,
        /// Length of the RAM block in bytes.
        length: u64,
    },
}

/// A memory file of the guest. It has a name and at least one page, and consists of whole pages.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RamBlock {
    name: Box<str>,
    pages: u64,
}

impl RamBlock {
    /// Returns the RAM block `name` of `length` bytes.
    ///
    /// # Errors
    ///
    /// If the name is empty or longer than [`RAM_BLOCK_NAME_MAX`], or the length is 0 or not a multiple of
    /// [`PAGE_SIZE`].
    pub fn new(name: &str, length: u64) -> Result<Self, LayoutError> {
        if name.is_empty()
            || name.len() > RAM_BLOCK_NAME_MAX
            || length == 0
            || length % PAGE_SIZE != 0
        {
            return Err(LayoutError::RamBlock {
                name: name.chars().take(RAM_BLOCK_NAME_MAX).collect(),
                length,
            });
        }
        Ok(Self {
            name: name.into(),
            pages: length / PAGE_SIZE,
        })
    }

    /// Returns the name, which is the same at source and destination.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of pages.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the number of bytes.
    pub const fn length(&self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

/// A contiguous range of guest physical addresses, and the part of a RAM block that it maps.
///
/// A region has at least one page, consists of whole pages, and ends inside the address space.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Region {
    start: u64,
    length: u64,
    block: usize,
    offset: u64,
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

/// The RAM blocks of guest memory and the regions that map them. Regions are sorted by address.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Layout {
    blocks: Vec<RamBlock>,
    regions: Vec<Region>,
}

impl Layout {
    /// Returns the layout of guest memory in `blocks`, which the guest addresses through `regions`. The regions may
    /// come in any order.
    ///
    /// # Errors
    ///
    /// If two regions overlap, if a region maps bytes that its RAM block does not have, or if two RAM blocks have the
    /// same name.
    pub fn new(
        blocks: impl IntoIterator<Item = RamBlock>,
        regions: impl IntoIterator<Item = Region>,
    ) -> Result<Self, LayoutError> {
        let blocks: Vec<RamBlock> = blocks.into_iter().collect();
        for (index, block) in blocks.iter().enumerate() {
            if blocks
                .iter()
                .skip(index + 1)
                .any(|it| it.name == block.name)
            {
                return Err(LayoutError::DuplicateName(block.name().to_owned()));
            }
        }
        let mut regions: Vec<Region> = regions.into_iter().collect();
        regions.sort_unstable();
        for region in &regions {
            let end = region.offset.checked_add(region.length);
            let length = blocks.get(region.block).map_or(0, RamBlock::length);
            if region.offset % PAGE_SIZE != 0 || end.is_none_or(|end| end > length) {
                return Err(LayoutError::OutsideRamBlock {
                    start: region.start,
                    block: region.block,
                    offset: region.offset,
                });
            }
        }
        for pair in regions.windows(2) {
            if let [first, second] = pair {
                if first.end() > second.start() {
                    return Err(LayoutError::Overlap {
                        first: first.start(),
                        second: second.start(),
                    });
                }
            }
        }
        Ok(Self { blocks, regions })
    }

    /// Returns a layout in which each region has a RAM block of its own, named after the address of the region.
    ///
    /// # Errors
    ///
    /// As [`Layout::new`].
    pub fn from_regions(regions: impl IntoIterator<Item = Region>) -> Result<Self, LayoutError> {
        let (mut blocks, mut backed) = (Vec::new(), Vec::new());
        for (index, region) in regions.into_iter().enumerate() {
            blocks.push(RamBlock::new(
                &format!("{:#x}", region.start),
                region.length,
            )?);
            backed.push(region.backed_by(index, 0));
        }
        Self::new(blocks, backed)
    }

    /// Returns the RAM blocks, in the order of their indices.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Returns the regions, by ascending address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Returns the number of pages of all RAM blocks.
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(RamBlock::pages).sum()
    }

    /// Iterates over the regions that share a byte with the guest physical addresses `bytes`.
    pub(crate) fn overlapping(&self, bytes: &Range<u64>) -> impl Iterator<Item = &Region> {
        let first = self
            .regions
            .partition_point(|region| region.end() <= bytes.start);
        let end = bytes.end;
        self.regions
            .iter()
            .skip(first)
            .take_while(move |region| region.start() < end)
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
    fn regions_may_touch_but_not_overlap() {
        let region = |start, length| Region::new(start, length).unwrap();
        assert!(Layout::from_regions([region(0x2000, 0x1000), region(0, 0x2000)]).is_ok());
        assert_eq!(
            Layout::from_regions([region(0x1000, 0x1000), region(0, 0x2000)]),
            Err(LayoutError::Overlap {
                first: 0,
                second: 0x1000
            })
        );
    }

    #[test]
    fn a_region_shows_what_its_block_has() {
        let block = || RamBlock::new("ram", 0x4000).unwrap();
        let region = Region::new(0x10_0000, 0x2000).unwrap();
        assert!(Layout::new([block()], [region.backed_by(0, 0x2000)]).is_ok());
        for wrong in [
            region.backed_by(0, 0x3000),
            region.backed_by(0, 0x1001),
            region.backed_by(0, !0xfff),
            region.backed_by(1, 0),
        ] {
            assert!(matches!(
                Layout::new([block()], [wrong]),
                Err(LayoutError::OutsideRamBlock { .. })
            ));
        }
    }

    #[test]
    fn blocks_have_names_of_their_own() {
        let block = |name| RamBlock::new(name, 0x1000).unwrap();
        assert_eq!(
            Layout::new([block("a"), block("b"), block("a")], []),
            Err(LayoutError::DuplicateName("a".into()))
        );
        for (name, length) in [("", 0x1000), ("a", 0), ("a", 0x1001)] {
            assert!(RamBlock::new(name, length).is_err());
        }
        assert!(RamBlock::new(&"a".repeat(RAM_BLOCK_NAME_MAX + 1), 0x1000).is_err());
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
