// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two states of a migration round, and what may be done in each.
//!
//! A hint says "nothing in this page is worth sending" about the moment at which the guest gave it. The next
//! sync sets the bit of each page that was written since the last one, also of a page that was free then and
//! is in use now. A hint from before that sync must not clear such a bit, or the page is lost.
//!
//! So there is one value that stands for the right to change the bitmap, and it has two forms. [`SyncPhase`]
//! can set bits and cannot take hints; [`HintWindow`] can take hints and cannot set bits. Neither can be
//! copied, each is consumed to make the other, and hints that other threads are giving through a reference
//! have to be over before the window can be closed, because closing takes the window by value.

use std::sync::Arc;

use thiserror::Error;

use crate::page_runs::PageRun;
use crate::{DirtyBitmap, Layout, LayoutError};

/// The right to set dirty bits: a round is at a sync, and no hint can be given.
#[derive(Debug)]
#[must_use = "dropping it ends the round"]
pub struct SyncPhase {
    bitmap: Arc<DirtyBitmap>,
}

/// The right to give hints: the time between the end of one sync and the start of the next.
///
/// Hints may come from several threads at once, through references.
///
/// A hint after the window was closed does not compile:
///
/// ```compile_fail,E0382
/// # use guest_migration::{Layout, Region, SyncPhase};
/// # let layout = Layout::from_regions([Region::new(0, 0x10_0000).unwrap()]).unwrap().into();
/// let window = SyncPhase::new(&layout).unwrap().finish();
/// let sync = window.close();
/// window.hint(0, 0x1000); // the window is gone
/// ```
///
/// nor does one while a sync is setting bits:
///
/// ```compile_fail,E0599
/// # use guest_migration::{Layout, Region, SyncPhase};
/// # let layout = Layout::from_regions([Region::new(0, 0x10_0000).unwrap()]).unwrap().into();
/// let sync = SyncPhase::new(&layout).unwrap();
/// sync.hint(0, 0x1000);
/// ```
///
/// nor a sync that starts while another thread is still giving a hint:
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
#[must_use = "dropping it ends the round"]
pub struct HintWindow {
    bitmap: Arc<DirtyBitmap>,
}

/// What a hint did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use]
pub struct Hinted {
    /// Whole pages of guest memory inside the hint.
    pub pages: u64,
    /// How many of them were to be sent, and now are not.
    pub cleared: u64,
    /// Bytes of the hint that lie outside guest memory, or in a page that the hint covers only in part.
    /// Nothing was done for them.
    pub ignored_bytes: u64,
}

/// Why a hint, or a range to be marked, was refused. No bit was changed.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum HintError {
    /// The range goes on beyond the last address.
    #[error(
        "the range at {start:#x} of {length:#x} bytes goes on beyond the end of the address space"
    )]
    Wraps {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// No byte of the range is guest memory.
    #[error("the range at {start:#x} of {length:#x} bytes lies outside guest memory")]
    Outside {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
    },
}

impl SyncPhase {
    /// A round over the memory that `layout` describes, at its first sync, with no page dirty.
    ///
    /// # Errors
    ///
    /// If there is no memory for the bitmap.
    pub fn new(layout: &Arc<Layout>) -> Result<Self, LayoutError> {
        Ok(Self {
            bitmap: Arc::new(DirtyBitmap::new(layout)?),
        })
    }

    /// The bits.
    pub fn bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.bitmap
    }

    /// Marks all guest memory.
    pub fn set_all(&self) {
        self.bitmap.set_all();
    }

    /// Marks the pages `run`, and returns how many were not marked yet. Pages that no block has are none.
    pub fn mark(&self, run: PageRun) -> u64 {
        self.bitmap.mark(run)
    }

    /// Marks each page that has a byte among the `length` bytes from the guest physical address `start`, and
    /// returns how many were not marked yet. A page that is written in part is to be sent whole.
    ///
    /// # Errors
    ///
    /// If the range wraps the address space or has no byte in guest memory. An empty range is none.
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

    /// Ends the sync: from now on hints are taken.
    pub fn finish(self) -> HintWindow {
        HintWindow {
            bitmap: self.bitmap,
        }
    }
}

impl HintWindow {
    /// The bits.
    pub fn bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.bitmap
    }

    /// Says that the `length` bytes from the guest physical address `start` hold nothing worth sending.
    ///
    /// Clears the bit of each page that lies wholly inside both the range and guest memory, a word at a time.
    /// The rest of the range, and only that, is ignored: a hint is applied nowhere but where it points to.
    /// The page itself is not touched.
    ///
    /// # Errors
    ///
    /// If the range wraps the address space or has no byte in guest memory. An empty range does nothing.
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

    /// Ends the time for hints: the next sync starts.
    pub fn close(self) -> SyncPhase {
        SyncPhase {
            bitmap: self.bitmap,
        }
    }
}
