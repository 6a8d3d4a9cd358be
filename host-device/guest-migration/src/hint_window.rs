// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two states of an iteration, and the operations that each state allows.
//!
//! A hint states that a page holds nothing worth sending at the moment at which the guest gives the hint. The next
//! dirty sync sets the bit of each page that was written since the last one. Such a page may have been free at the time
//! of the hint, and be in use now. A hint from before the sync must not clear this bit, or the page is lost.
//!
//! One value therefore holds the right to change the bitmap, and this value has two forms. A [`SyncPhase`] sets bits
//! and accepts no hints. A [`HintWindow`] accepts hints and sets no bits. Neither can be cloned, and each is consumed
//! to make the other. Closing a window takes it by value, so threads that apply hints through a reference must finish
//! before.

use std::sync::Arc;

use thiserror::Error;

use crate::page_run::PageRun;
use crate::{DirtyBitmap, Layout, LayoutError};

/// The right to set dirty bits, during a dirty sync. Hints cannot be applied.
#[derive(Debug)]
#[must_use = "dropping it ends the iteration"]
pub struct SyncPhase {
    bitmap: Arc<DirtyBitmap>,
}

/// The right to apply hints, from the end of one dirty sync to the start of the next.
///
/// Several threads may apply hints at once, through references.
///
/// A hint after the window was closed does not compile:
///
/// ```compile_fail,E0382
/// # use guest_migration::{Layout, Region, SyncPhase};
/// # let layout = Layout::from_regions([Region::new(0, 0x10_0000).unwrap()]).unwrap().into();
/// let window = SyncPhase::new(&layout).unwrap().finish();
/// let sync = window.close();
/// window.hint(0, 0x1000); // the window has moved into `sync`
/// ```
///
/// A hint while a dirty sync sets bits does not compile:
///
/// ```compile_fail,E0599
/// # use guest_migration::{Layout, Region, SyncPhase};
/// # let layout = Layout::from_regions([Region::new(0, 0x10_0000).unwrap()]).unwrap().into();
/// let sync = SyncPhase::new(&layout).unwrap();
/// sync.hint(0, 0x1000);
/// ```
///
/// A dirty sync that starts while another thread applies a hint does not compile:
///
/// ```compile_fail,E0505
/// # use guest_migration::{Layout, Region, SyncPhase};
/// # let layout = Layout::from_regions([Region::new(0, 0x10_0000).unwrap()]).unwrap().into();
/// let window = SyncPhase::new(&layout).unwrap().finish();
/// std::thread::scope(|scope| {
///     scope.spawn(|| window.hint(0, 0x1000));
///     window.close();
/// });
/// ```
#[derive(Debug)]
#[must_use = "dropping it ends the iteration"]
pub struct HintWindow {
    bitmap: Arc<DirtyBitmap>,
}

/// The effect of a hint.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use]
pub struct Hinted {
    /// Whole pages of guest memory inside the hint.
    pub pages: u64,
    /// Pages among these that were dirty before.
    pub cleared: u64,
    /// Bytes of the hint that lie outside guest memory, or in a page that the hint covers only in part. The hint has no
    /// effect on them.
    pub ignored_bytes: u64,
}

/// Why a hint or a range to mark dirty was refused. No bit was changed.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum HintError {
    /// The range extends beyond the end of the address space.
    #[error("hint {start:#x}+{length:#x} exceeds the address space")]
    Wraps {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// No byte of the range is guest memory.
    #[error("hint {start:#x}+{length:#x} is outside guest memory")]
    Outside {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
}

impl SyncPhase {
    /// Returns the first sync phase of a migration of the memory that `layout` describes. No page is dirty.
    ///
    /// # Errors
    ///
    /// If memory for the bitmap is insufficient.
    pub fn new(layout: &Arc<Layout>) -> Result<Self, LayoutError> {
        Ok(Self {
            bitmap: Arc::new(DirtyBitmap::new(layout)?),
        })
    }

    /// Returns the bitmap.
    pub fn bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.bitmap
    }

    /// Marks all pages of guest memory dirty.
    pub fn set_all(&self) {
        self.bitmap.set_all();
    }

    /// Marks the pages `run` dirty, and returns how many of them were clean. Ignores pages that no RAM block has.
    pub fn mark(&self, run: PageRun) -> u64 {
        self.bitmap.mark(run)
    }

    /// Marks each page dirty that has a byte among the `length` bytes at the guest physical address `start`. Returns
    /// how many of these pages were clean. A page that was written in part is sent whole.
    ///
    /// # Errors
    ///
    /// If the range exceeds the address space, or has no byte in guest memory. An empty range is no error.
    pub fn mark_dirty(&self, start: u64, length: u64) -> Result<u64, HintError> {
        if length == 0 {
            return Ok(0);
        }
        let end = start
            .checked_add(length)
            .ok_or(HintError::Wraps { start, length })?;
        let bytes = start..end;
        let mut inside = false;
        let mut marked = 0;
        for region in self.bitmap.layout().overlapping(&bytes) {
            inside = true;
            let pages = region.pages_touching(&bytes);
            marked += self.bitmap.mark(PageRun {
                block: region.block(),
                first: pages.start,
                pages: pages.end - pages.start,
            });
        }
        if !inside {
            return Err(HintError::Outside { start, length });
        }
        Ok(marked)
    }

    /// Ends the dirty sync, and returns the window that accepts hints.
    pub fn finish(self) -> HintWindow {
        HintWindow {
            bitmap: self.bitmap,
        }
    }
}

impl HintWindow {
    /// Returns the bitmap.
    pub fn bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.bitmap
    }

    /// Applies a hint: the `length` bytes at the guest physical address `start` hold nothing worth sending.
    ///
    /// Clears the dirty bit of each page that is wholly inside both the range and guest memory, a word at a time.
    /// Ignores the rest of the range (R5). Does not touch the pages themselves.
    ///
    /// # Errors
    ///
    /// If the range exceeds the address space, or has no byte in guest memory. An empty range is no error.
    pub fn hint(&self, start: u64, length: u64) -> Result<Hinted, HintError> {
        if length == 0 {
            return Ok(Hinted::default());
        }
        let end = start
            .checked_add(length)
            .ok_or(HintError::Wraps { start, length })?;
        let bytes = start..end;
        let mut inside = false;
        let mut hinted = Hinted::default();
        for region in self.bitmap.layout().overlapping(&bytes) {
            inside = true;
            let pages = region.pages_within(&bytes);
            hinted.pages += pages.end - pages.start;
            hinted.cleared += self.bitmap.skip(region.block(), pages);
        }
        if !inside {
            return Err(HintError::Outside { start, length });
        }
        hinted.ignored_bytes = length - hinted.pages * crate::PAGE_SIZE;
        Ok(hinted)
    }

    /// Applies a hint about the pages `run`, as [`HintWindow::hint`]. Returns how many of them were dirty before. Ignores
    /// pages that no RAM block has.
    pub fn skip(&self, run: PageRun) -> u64 {
        self.bitmap.skip(run.block, run.first..run.end())
    }

    /// Closes the window: the next dirty sync starts.
    pub fn close(self) -> SyncPhase {
        SyncPhase {
            bitmap: self.bitmap,
        }
    }
}
