// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs of consecutive pages, and the search for runs of pages in one state.

use std::ops::Range;

use crate::bitmap::{PageState, RamBlockBits};
use crate::PAGE_SIZE;

/// A run of consecutive pages of one RAM block.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageRun {
    /// Index of the RAM block.
    pub block: usize,
    /// The first page, counted from the start of the RAM block.
    pub first: u64,
    /// Number of pages, at least one.
    pub pages: u64,
}

impl PageRun {
    /// Returns the offset of the first page in the RAM block, in bytes.
    pub const fn offset(&self) -> u64 {
        self.first.saturating_mul(PAGE_SIZE)
    }

    /// Returns the number of bytes.
    pub const fn length(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// Returns the page after the last page.
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// Splits the run into runs of at most `pages` pages. A `pages` of 0 counts as 1.
    pub fn chunks(self, pages: u64) -> impl Iterator<Item = Self> {
        let most = pages.max(1);
        let end = self.end();
        std::iter::successors(Some(self.first), move |at| at.checked_add(most))
            .take_while(move |at| *at < end)
            .map(move |first| Self {
                block: self.block,
                first,
                pages: most.min(end - first),
            })
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_run_again() {
        let run = PageRun {
            block: 1,
            first: 5,
            pages: 10,
        };
        let chunks: Vec<_> = run.chunks(4).map(|it| (it.first, it.pages)).collect();
        assert_eq!(chunks, [(5, 4), (9, 4), (13, 2)]);
        assert_eq!(run.chunks(u64::MAX).collect::<Vec<_>>(), [run]);
        assert_eq!(run.chunks(0).count(), 10);
    }
}
