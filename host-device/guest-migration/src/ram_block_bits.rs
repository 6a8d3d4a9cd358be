// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty bits of one RAM block, and the states of a page that they express.

use crate::atomic_bitmap::{self, AtomicBitmap};

/// A state of pages that a search looks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PageState {
    /// The dirty bit is set: the page has still to be sent.
    Dirty,
    /// The dirty bit is clear: the page need not be sent.
    Clean,
    /// The dirty bit is clear, and the page was not taken to be sent since it was last marked dirty.
    Skipped,
    /// The page was taken to be sent since it was last marked dirty.
    Taken,
}

/// The bits of one RAM block.
#[derive(Debug)]
pub(crate) struct RamBlockBits {
    /// Set for each page that has still to be sent.
    pub(crate) dirty: AtomicBitmap,
    /// Set for each page that was taken to be sent since it was last marked dirty.
    pub(crate) taken: AtomicBitmap,
}

impl RamBlockBits {
    pub(crate) fn pages(&self) -> u64 {
        self.dirty.len()
    }

    /// Returns the first page at or after `from` that is in state `kind` if `holds` is true, and that is not in this
    /// state if `holds` is false. Returns the number of pages if no such page exists.
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
