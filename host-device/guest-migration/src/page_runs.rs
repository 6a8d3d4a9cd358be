// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The search for runs of pages in one state.

use std::ops::Range;

use crate::page_run::PageRun;
use crate::ram_block_bits::{PageState, RamBlockBits};

/// Iterator over the runs of pages in one state.
///
/// The iterator reads the bits as it advances. It sees changes by other threads ahead of its position, and misses
/// changes behind its position.
#[derive(Clone, Debug)]
pub struct PageRuns<'a> {
    blocks: &'a [RamBlockBits],
    kind: PageState,
    block: usize,
    page: u64,
    /// The page at which the search ends, if it covers only one RAM block. `None` if it covers all following RAM
    /// blocks.
    end: Option<u64>,
}

impl<'a> PageRuns<'a> {
    pub(crate) fn new(blocks: &'a [RamBlockBits], kind: PageState) -> Self {
        Self::starting_at(blocks, kind, 0, 0)
    }

    /// Returns the runs from page `page` of RAM block `block`, including later RAM blocks.
    pub(crate) fn starting_at(
        blocks: &'a [RamBlockBits],
        kind: PageState,
        block: usize,
        page: u64,
    ) -> Self {
        Self {
            blocks,
            kind,
            block,
            page,
            end: None,
        }
    }

    /// Returns the runs within the pages `pages` of RAM block `block`.
    pub(crate) fn within(
        blocks: &'a [RamBlockBits],
        kind: PageState,
        block: usize,
        pages: Range<u64>,
    ) -> Self {
        Self {
            blocks,
            kind,
            block,
            page: pages.start,
            end: Some(pages.end),
        }
    }
}

impl Iterator for PageRuns<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        while let Some(bits) = self.blocks.get(self.block) {
            let limit = self.end.map_or(bits.pages(), |end| end.min(bits.pages()));
            let first = bits.find(self.kind, self.page, true);
            if first < limit {
                // Another thread may have changed the bit of `first` meanwhile. The run then still contains this page.
                let end = bits.find(self.kind, first, false).clamp(first + 1, limit);
                self.page = end;
                return Some(PageRun {
                    block: self.block,
                    first,
                    pages: end - first,
                });
            }
            if self.end.is_some() {
                return None;
            }
            self.block += 1;
            self.page = 0;
        }
        None
    }
}
