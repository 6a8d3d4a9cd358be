// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The layout of guest memory: its memory files and their guest physical addresses.
//!
//! A migration sends *RAM blocks*: named memory files, which have the same names and sizes at source and destination.
//! The guest addresses *regions*: each region maps a part of a RAM block at a guest physical address. A RAM block may
//! hold memory that no region maps at the moment, as behind the VGA window of a PC; the migration sends that memory
//! too. Several regions may map the same page.

mod error;
mod ram_block;
mod region;

use std::ops::Range;

pub use error::{LayoutError, RAM_BLOCK_NAME_MAX};
pub use ram_block::RamBlock;
pub use region::Region;

use crate::PAGE_SIZE;

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
}
