// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bitmaps with one bit per page, one for each RAM block.

use crate::atomic_bitmap::AtomicBitmap;
use crate::{Layout, PageRun, RamBlock};

/// Returns a bitmap for each RAM block, with one bit per page. `too_large` returns the error for a RAM block whose bitmap
/// does not fit in memory.
pub(crate) fn page_bitmaps<E>(
    layout: &Layout,
    too_large: impl Fn(&RamBlock) -> E,
) -> Result<Vec<AtomicBitmap>, E> {
    let blocks = layout.blocks().iter();
    blocks
        .map(|block| AtomicBitmap::new(block.pages()).ok_or_else(|| too_large(block)))
        .collect()
}

/// Iterates over the runs of set bits from page `from`.
pub(crate) fn set_runs(
    block: usize,
    bits: &AtomicBitmap,
    mut from: u64,
) -> impl Iterator<Item = PageRun> + '_ {
    std::iter::from_fn(move || {
        let first = bits.find(from, true);
        if first >= bits.len() {
            return None;
        }
        from = bits.find(first, false).max(first + 1);
        Some(PageRun {
            block,
            first,
            pages: from - first,
        })
    })
}
