// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One bit for each page that is still to be sent.

use std::ops::Range;

use crate::bits::Bits;
use crate::runs::Runs;
use crate::{Region, RegionError, Regions};

/// The dirty bits of all guest memory.
///
/// Shared by reference between threads. Whoever has a reference may look at the bits and *take* pages (clear
/// their bits, in order to send them). Setting bits and applying hints need more than that: see
/// [`SyncPhase`](crate::SyncPhase) and [`HintWindow`](crate::HintWindow).
///
/// Counts are exact whenever no other thread is in the middle of a change, and never too low: zero always
/// means that nothing is left.
#[derive(Debug)]
pub struct DirtyBitmap {
    regions: Box<[(Region, Bits)]>,
}

impl DirtyBitmap {
    pub(crate) fn new(regions: &Regions) -> Result<Self, RegionError> {
        let regions = regions
            .iter()
            .map(|region| {
                let bits = Bits::new(region.pages()).ok_or(RegionError::TooLarge {
                    start: region.start(),
                    length: region.length(),
                })?;
                Ok((*region, bits))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { regions })
    }

    /// The number of pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|(_, bits)| bits.len()).sum()
    }

    /// The number of pages that are still to be sent.
    pub fn dirty_pages(&self) -> u64 {
        self.regions.iter().map(|(_, bits)| bits.count()).sum()
    }

    /// Clears the bits of `pages` pages from the guest physical address `start` on, and returns how many of
    /// them were set. Pages outside guest memory have no bit.
    ///
    /// The bit goes before the page is read: a write that comes between the two is seen by the next sync.
    pub fn take(&self, start: u64, pages: u64) -> u64 {
        let bytes = start..start.saturating_add(pages.saturating_mul(crate::PAGE_SIZE));
        self.over(&bytes)
            .map(|(region, bits)| bits.clear(region.pages_within(&bytes)))
            .sum()
    }

    /// The runs of pages that are still to be sent, by ascending address.
    ///
    /// A run does not cross the border of a region. Clear words are skipped a word at a time.
    pub fn dirty_runs(&self) -> Runs<'_> {
        Runs::new(&self.regions, true)
    }

    /// The runs of pages that need not be sent, by ascending address.
    pub fn clean_runs(&self) -> Runs<'_> {
        Runs::new(&self.regions, false)
    }

    pub(crate) fn set_all(&self) {
        for (_, bits) in &self.regions {
            bits.set(0..bits.len());
        }
    }

    /// The regions that share a byte with `bytes`.
    pub(crate) fn over(&self, bytes: &Range<u64>) -> impl Iterator<Item = &(Region, Bits)> {
        let first = self
            .regions
            .partition_point(|(region, _)| region.end() <= bytes.start);
        let end = bytes.end;
        self.regions
            .iter()
            .skip(first)
            .take_while(move |(region, _)| region.start() < end)
    }
}
