// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Neighbouring pages in the same state.

use crate::bits::Bits;
use crate::{Region, PAGE_SIZE};

/// Neighbouring pages of one region.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Run {
    /// Guest physical address of the first page.
    pub start: u64,
    /// The number of pages, at least one.
    pub pages: u64,
}

impl Run {
    /// The number of bytes.
    pub const fn length(&self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

/// Iterator over the runs of pages in one state.
///
/// It looks at the bits as it goes: what other threads change ahead of it shows, what they change behind it
/// does not.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    regions: &'a [(Region, Bits)],
    page: u64,
    set: bool,
}

impl<'a> Runs<'a> {
    pub(crate) fn new(regions: &'a [(Region, Bits)], set: bool) -> Self {
        Self {
            regions,
            page: 0,
            set,
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        while let Some(((region, bits), rest)) = self.regions.split_first() {
            let first = bits.find(self.page, self.set);
            if first < bits.len() {
                // A bit that changed since it was found may make the run empty: it still counts as seen.
                let end = bits.find(first, !self.set).max(first + 1);
                self.page = end;
                return Some(Run {
                    start: region.start() + first * PAGE_SIZE,
                    pages: end - first,
                });
            }
            self.regions = rest;
            self.page = 0;
        }
        None
    }
}
