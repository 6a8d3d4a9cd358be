// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty bitmap: which pages have still to be sent, and which were taken to be sent.

use std::sync::Arc;

use crate::atomic_bitmap::AtomicBitmap;
use crate::page_run::PageRun;
use crate::page_runs::PageRuns;
use crate::ram_block_bits::{PageState, RamBlockBits};
use crate::{Layout, LayoutError, Region};

/// The dirty bits of all guest memory.
///
/// Threads share the bitmap by reference. A shared reference allows reading bits and *taking* pages: clearing the bits
/// of pages in order to send these pages. Setting bits requires a [`SyncPhase`](crate::SyncPhase), applying hints
/// requires a [`HintWindow`](crate::HintWindow).
///
/// The number of dirty pages is exact while no other thread changes bits. It is never too low: zero means that no page
/// is left to send.
#[derive(Debug)]
pub struct DirtyBitmap {
    layout: Arc<Layout>,
    blocks: Box<[RamBlockBits]>,
}

impl DirtyBitmap {
    pub(crate) fn new(layout: &Arc<Layout>) -> Result<Self, LayoutError> {
        let blocks = layout
            .blocks()
            .iter()
            .map(|block| {
                let bits = || {
                    AtomicBitmap::new(block.pages()).ok_or_else(|| LayoutError::TooLarge {
                        name: block.name().to_owned(),
                        length: block.length(),
                    })
                };
                Ok(RamBlockBits {
                    dirty: bits()?,
                    taken: bits()?,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            layout: layout.clone(),
            blocks,
        })
    }

    /// Returns the layout of guest memory.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Returns the number of pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(RamBlockBits::pages).sum()
    }

    /// Returns the number of pages that have still to be sent.
    pub fn dirty_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.dirty.count()).sum()
    }

    /// Returns the number of pages that need not be sent and were not taken since they were last marked dirty. Hints
    /// have cleared their bits. The destination has zeros or older content in these pages.
    pub fn skipped_pages(&self) -> u64 {
        let taken: u64 = self.blocks.iter().map(|block| block.taken.count()).sum();
        self.pages()
            .saturating_sub(self.dirty_pages())
            .saturating_sub(taken)
    }

    /// Clears the dirty bits of the pages `run`, and returns how many of them were set. Ignores pages that no RAM block
    /// has.
    ///
    /// Take a page before reading its content: the next dirty sync then finds a write between the two.
    pub fn take(&self, run: PageRun) -> u64 {
        self.blocks.get(run.block).map_or(0, |block| {
            block.dirty.move_to(&block.taken, run.first..run.end())
        })
    }

    /// Returns the first run of dirty pages at or after page `page` of the RAM block with index `block`, including
    /// later RAM blocks. The run has at most `most` pages.
    pub fn next_dirty(&self, block: usize, page: u64, most: u64) -> Option<PageRun> {
        let run = PageRuns::starting_at(&self.blocks, PageState::Dirty, block, page).next()?;
        run.chunks(most).next()
    }

    /// Iterates over the runs of dirty pages, by ascending RAM block and page.
    ///
    /// The search skips words without set bits.
    pub fn dirty_runs(&self) -> PageRuns<'_> {
        PageRuns::new(&self.blocks, PageState::Dirty)
    }

    /// Iterates over the runs of pages that need not be sent, by ascending RAM block and page.
    pub fn clean_runs(&self) -> PageRuns<'_> {
        PageRuns::new(&self.blocks, PageState::Clean)
    }

    /// Iterates over the runs of pages that [`DirtyBitmap::skipped_pages`] counts, by ascending RAM block and page.
    pub fn skipped_runs(&self) -> PageRuns<'_> {
        PageRuns::new(&self.blocks, PageState::Skipped)
    }

    /// Iterates over those runs of [`DirtyBitmap::skipped_runs`] that `region` maps.
    pub fn skipped_in(&self, region: &Region) -> PageRuns<'_> {
        let pages = region.block_pages();
        PageRuns::within(&self.blocks, PageState::Skipped, region.block(), pages)
    }

    /// Iterates over the runs of pages in `run` that were taken to be sent since they were last marked dirty.
    pub fn taken_among(&self, run: PageRun) -> PageRuns<'_> {
        PageRuns::within(
            &self.blocks,
            PageState::Taken,
            run.block,
            run.first..run.end(),
        )
    }

    pub(crate) fn set_all(&self) {
        for (index, block) in self.blocks.iter().enumerate() {
            let run = PageRun {
                block: index,
                first: 0,
                pages: block.pages(),
            };
            self.mark(run);
        }
    }

    /// Marks the pages `run` dirty, and returns how many of them were clean.
    pub(crate) fn mark(&self, run: PageRun) -> u64 {
        self.blocks.get(run.block).map_or(0, |block| {
            block.taken.clear(run.first..run.end());
            block.dirty.set(run.first..run.end())
        })
    }

    /// Clears the dirty bits of pages that need not be sent, and returns how many of them were set.
    pub(crate) fn skip(&self, block: usize, pages: std::ops::Range<u64>) -> u64 {
        self.blocks
            .get(block)
            .map_or(0, |block| block.dirty.clear(pages))
    }
}
