// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Neighbouring pages in the same state.

use std::ops::Range;

use crate::bitmap::{PageState, RamBlockBits};
use crate::PAGE_SIZE;

/// Neighbouring pages of one block.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageRun {
    /// The index of the block.
    pub block: usize,
    /// The first page, counted from the start of the block.
    pub first: u64,
    /// The number of pages, at least one.
    pub pages: u64,
}

impl PageRun {
    /// How many bytes of the block come before the first page.
    pub const fn offset(&self) -> u64 {
        self.first.saturating_mul(PAGE_SIZE)
    }

    /// The number of bytes.
    pub const fn length(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// The page after the last.
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// The same pages in pieces of at most `pages`, which is taken as 1 if it is 0.
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
/// It looks at the bits as it goes: what other threads change ahead of it shows, what they change behind it
/// does not.
#[derive(Clone, Debug)]
pub struct PageRuns<'a> {
    blocks: &'a [RamBlockBits],
    kind: PageState,
    block: usize,
    page: u64,
    /// Where it stops, if before the end of the block: then other blocks do not count.
    end: Option<u64>,
}

impl<'a> PageRuns<'a> {
    pub(crate) fn new(blocks: &'a [RamBlockBits], kind: PageState) -> Self {
        Self::starting_at(blocks, kind, 0, 0)
    }

    /// From the page `page` of the block `block` on.
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

    /// Only these pages of the block `block`.
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
                // A bit that changed since it was found may make the run empty: it still counts as seen.
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
