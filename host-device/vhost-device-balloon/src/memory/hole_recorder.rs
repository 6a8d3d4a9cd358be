// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Records the holes in guest memory that are punched during a migration.

use std::ops::Range;
use std::sync::Arc;

use guest_migration::dirty_tracking::PunchedPages;
use guest_migration::{Layout, PageRun, PAGE_SIZE};

/// Records for a migration which holes are punched in guest memory.
#[derive(Clone, Debug)]
pub struct HoleRecorder {
    /// The layout of guest memory in the migration.
    pub layout: Arc<Layout>,
    /// The recorded pages.
    pub punched: PunchedPages,
}

impl HoleRecorder {
    /// Records that holes are punched at the guest physical addresses `range`.
    pub(super) fn record(&self, range: &Range<u64>) {
        self.pages(range).for_each(|run| self.punched.note(run));
    }

    /// Returns the pages that overlap the guest physical addresses `range`.
    fn pages<'a>(&'a self, range: &'a Range<u64>) -> impl Iterator<Item = PageRun> + 'a {
        self.layout.regions().iter().filter_map(|region| {
            let start = range.start.max(region.start());
            let end = range.end.min(region.end());
            let offset = |address: u64| {
                let inside = address.checked_sub(region.start())?;
                region.offset().checked_add(inside)
            };
            if start >= end {
                return None;
            }
            let first = offset(start)? / PAGE_SIZE;
            Some(PageRun {
                block: region.block(),
                first,
                pages: offset(end)?.div_ceil(PAGE_SIZE).checked_sub(first)?,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::guest;
    use crate::memory::Ram;

    #[test]
    fn holes_are_recorded_at_their_file_offsets() {
        let memory = guest(&[(0x1000, 0x4000, 0x6000), (0x8000, 0x4000, 0)]);
        let layout = Ram::new(&memory).memory().unwrap().layout().clone();
        let hole_recorder = HoleRecorder {
            punched: PunchedPages::new(&layout).unwrap(),
            layout,
        };
        let pages = |range| {
            hole_recorder
                .pages(&range)
                .map(|run| (run.block, run.first, run.pages))
                .collect::<Vec<_>>()
        };
        assert_eq!(pages(0x2000..0x3000), [(0, 7, 1)]);
        assert_eq!(pages(0x2fff..0x3001), [(0, 7, 2)]);
        assert_eq!(pages(0..u64::MAX), [(0, 6, 4), (0, 0, 4)]);
        assert_eq!(pages(0x5000..0x8000), []);
    }
}
