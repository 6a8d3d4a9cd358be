// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages are still to be sent, and which were sent.

use std::sync::Arc;

use crate::atomic_bitmap::{self, AtomicBitmap};
use crate::page_runs::{PageRun, PageRuns};
use crate::{Layout, LayoutError, Region};

/// What is asked of a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PageState {
    /// Whether it is still to be sent.
    Dirty,
    /// Whether it need not be sent (any more).
    Clean,
    /// Whether it need not be sent and was not.
    Skipped,
    /// Whether it was taken to be sent since it was last marked dirty.
    Taken,
}

/// The bits of one block.
#[derive(Debug)]
pub(crate) struct RamBlockBits {
    /// Set for a page that is still to be sent.
    dirty: AtomicBitmap,
    /// Set for a page that was taken to be sent since it was last marked dirty.
    taken: AtomicBitmap,
}

impl RamBlockBits {
    pub(crate) fn pages(&self) -> u64 {
        self.dirty.len()
    }

    /// The first page at or after `from` for which `kind` is `holds`, or the number of pages.
    pub(crate) fn find(&self, kind: PageState, from: u64, holds: bool) -> u64 {
        match kind {
            PageState::Dirty => self.dirty.find(from, holds),
            PageState::Clean => self.dirty.find(from, !holds),
            PageState::Taken => self.taken.find(from, holds),
            PageState::Skipped => {
                atomic_bitmap::find_in_neither(&self.dirty, &self.taken, from, holds)
            }
        }
    }
}

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

    /// Where the pages lie.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The number of pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(RamBlockBits::pages).sum()
    }

    /// The number of pages that are still to be sent.
    pub fn dirty_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.dirty.count()).sum()
    }

    /// The number of pages that need not be sent and were not, since they were last marked dirty: what hints have
    /// spared. The destination has zeros there, or older bytes.
    pub fn skipped_pages(&self) -> u64 {
        let taken: u64 = self.blocks.iter().map(|block| block.taken.count()).sum();
        self.pages()
            .saturating_sub(self.dirty_pages())
            .saturating_sub(taken)
    }

    /// Clears the bits of the pages `run`, and returns how many of them were set. Pages that no block has have no bit.
    ///
    /// The bit goes before the page is read: a write that comes between the two is seen by the next sync.
    pub fn take(&self, run: PageRun) -> u64 {
        self.blocks.get(run.block).map_or(0, |block| {
            block.dirty.move_to(&block.taken, run.first..run.end())
        })
    }

    /// The first run of pages that are still to be sent at or after the page `page` of the block `block`, of at most
    /// `most` pages.
    pub fn next_dirty(&self, block: usize, page: u64, most: u64) -> Option<PageRun> {
        let run = PageRuns::starting_at(&self.blocks, PageState::Dirty, block, page).next()?;
        run.chunks(most).next()
    }

    /// The runs of pages that are still to be sent, by ascending block and page.
    ///
    /// Clear words are skipped a word at a time.
    pub fn dirty_runs(&self) -> PageRuns<'_> {
        PageRuns::new(&self.blocks, PageState::Dirty)
    }

    /// The runs of pages that need not be sent (any more), by ascending block and page.
    pub fn clean_runs(&self) -> PageRuns<'_> {
        PageRuns::new(&self.blocks, PageState::Clean)
    }

    /// The runs of pages that [`DirtyBitmap::skipped_pages`] counts, by ascending block and page.
    pub fn skipped_runs(&self) -> PageRuns<'_> {
        PageRuns::new(&self.blocks, PageState::Skipped)
    }

    /// Those of [`DirtyBitmap::skipped_runs`] that `region` shows.
    pub fn skipped_in(&self, region: &Region) -> PageRuns<'_> {
        let pages = region.block_pages();
        PageRuns::within(&self.blocks, PageState::Skipped, region.block(), pages)
    }

    /// The runs of pages among `run` that were sent since they were last marked dirty.
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

    /// Marks pages dirty, and returns how many were not.
    pub(crate) fn mark(&self, run: PageRun) -> u64 {
        self.blocks.get(run.block).map_or(0, |block| {
            block.taken.clear(run.first..run.end());
            block.dirty.set(run.first..run.end())
        })
    }

    /// Clears the dirty bits of pages that are not to be sent, and returns how many were set.
    pub(crate) fn skip(&self, block: usize, pages: std::ops::Range<u64>) -> u64 {
        self.blocks
            .get(block)
            .map_or(0, |block| block.dirty.clear(pages))
    }
}
