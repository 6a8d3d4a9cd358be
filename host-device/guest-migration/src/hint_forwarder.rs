// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hints of an open window, for a migration in another process.
//!
//! A device whose migration runs in another process gives its hints to a window of its own, in which all pages are dirty.
//! A [`HintForwarder`] finds the pages that were hinted since it was last asked. The other process applies them to the
//! window of the migration. However many hints the guest gives, they need no more memory than two bits for each page.

use std::sync::Arc;

use crate::atomic_bitmap::AtomicBitmap;
use crate::page_bitmaps::page_bitmaps;
use crate::{DirtyBitmap, HintWindow, Layout, LayoutError, PageRun, SyncPhase};

/// Finds the pages that were hinted in a window.
#[derive(Debug)]
pub struct HintForwarder {
    bitmap: Arc<DirtyBitmap>,
    /// The pages that were found before.
    forwarded: Vec<AtomicBitmap>,
}

impl HintForwarder {
    /// Returns a window of guest memory in which all pages are dirty, and what finds the pages that are hinted in it.
    ///
    /// # Errors
    ///
    /// If memory for the bitmaps is insufficient.
    pub fn new(layout: &Arc<Layout>) -> Result<(HintWindow, Self), LayoutError> {
        let forwarded = page_bitmaps(layout, |block| LayoutError::TooLarge {
            name: block.name().to_owned(),
            length: block.length(),
        })?;
        let sync = SyncPhase::new(layout)?;
        sync.set_all();
        let bitmap = sync.bitmap().clone();
        Ok((sync.finish(), Self { bitmap, forwarded }))
    }

    /// Passes the runs of pages to `forward` that were hinted and not passed before.
    ///
    /// # Errors
    ///
    /// The first error of `forward`.
    pub fn forward<E>(
        &mut self,
        mut forward: impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        for run in self.bitmap.clean_runs() {
            let Some(bits) = self.forwarded.get(run.block) else {
                continue;
            };
            let mut first = bits.find(run.first, false);
            while first < run.end() {
                let end = bits.find(first, true).min(run.end());
                bits.set(first..end);
                forward(PageRun {
                    block: run.block,
                    first,
                    pages: end - first,
                })?;
                first = bits.find(end, false);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::{Region, PAGE_SIZE};

    const PAGES: u64 = 200;

    fn new_pages(forwarder: &mut HintForwarder) -> Vec<u64> {
        let mut pages = Vec::new();
        let result = forwarder.forward(|run| {
            assert!(run.pages > 0);
            pages.extend(run.first..run.end());
            Ok::<_, Infallible>(())
        });
        result.unwrap();
        pages
    }

    proptest! {
        #[test]
        fn each_hinted_page_is_forwarded_once(hints in prop::collection::vec((0..PAGES, 1..40u64, any::<bool>()), 0..40)) {
            let region = Region::new(0, PAGES * PAGE_SIZE).unwrap();
            let layout = Layout::from_regions([region]).unwrap().into();
            let (window, mut forwarder) = HintForwarder::new(&layout).unwrap();
            let (mut hinted, mut forwarded) = (std::collections::BTreeSet::new(), Vec::new());
            for (first, pages, forward) in hints {
                let _ = window.hint(first * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
                hinted.extend(first..(first + pages).min(PAGES));
                if forward {
                    forwarded.extend(new_pages(&mut forwarder));
                }
            }
            forwarded.extend(new_pages(&mut forwarder));
            forwarded.sort_unstable();
            prop_assert_eq!(forwarded, hinted.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(new_pages(&mut forwarder), Vec::<u64>::new());
        }
    }
}
