// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that became zero because holes were punched in the memory files.

use std::sync::Arc;

use super::TrackingError;
use crate::atomic_bitmap::AtomicBitmap;
use crate::page_bitmaps::{page_bitmaps, set_runs};
use crate::{Layout, PageRun};

/// Tells a soft-dirty tracker in which pages holes were punched. Soft-dirty bits do not show holes.
///
/// Code that punches holes in guest memory notes them here. It must punch and note under one hold of the lock that
/// [`Quiesce`](super::Quiesce) takes, in either order. Clones share the notes. Several threads may use them at once.
#[derive(Clone, Debug)]
pub struct PunchedPages(Arc<[AtomicBitmap]>);

impl PunchedPages {
    /// Returns an empty set of notes.
    ///
    /// # Errors
    ///
    /// If memory for one bit per page is insufficient.
    pub fn new(layout: &Layout) -> Result<Self, TrackingError> {
        Ok(Self(page_bitmaps(layout, TrackingError::no_bitmap)?.into()))
    }

    /// Notes that the pages `run` were made zero. Ignores pages that no RAM block has.
    pub fn note(&self, run: PageRun) {
        if let Some(bits) = self.0.get(run.block) {
            bits.set(run.first..run.end());
        }
    }

    /// Removes and returns the notes.
    pub fn drain(&self) -> Vec<PageRun> {
        let mut runs = Vec::new();
        for (block, bits) in self.0.iter().enumerate() {
            for run in set_runs(block, bits, 0) {
                bits.clear(run.first..run.end());
                runs.push(run);
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RamBlock;

    #[test]
    fn notes_are_given_once() {
        let blocks = [("a", 200), ("b", 3)]
            .map(|(name, pages)| RamBlock::new(name, pages * crate::PAGE_SIZE).unwrap());
        let punched = PunchedPages::new(&Layout::new(blocks, []).unwrap()).unwrap();
        let run = |block, first, pages| PageRun {
            block,
            first,
            pages,
        };
        assert_eq!(punched.drain(), []);
        let other = punched.clone();
        for note in [
            run(0, 60, 10),
            run(0, 65, 30),
            run(1, 0, 1),
            run(1, 2, 9),
            run(2, 0, 1),
        ] {
            other.note(note);
        }
        assert_eq!(
            punched.drain(),
            [run(0, 60, 35), run(1, 0, 1), run(1, 2, 1)]
        );
        assert_eq!(punched.drain(), []);
    }
}
