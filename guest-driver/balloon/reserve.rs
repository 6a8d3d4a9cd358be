// SPDX-License-Identifier: GPL-2.0

//! How much free memory the guest keeps, and which block is hinted next.

use crate::mm::{state, PageBlock};

/// The free pages that hinting leaves alone: so many that the guest neither begins to reclaim memory
/// nor stalls, and so few that nearly all free memory is hinted.
///
/// Twice the sum of the zones' high watermarks (below which reclaim works), or 1/64 of memory if
/// that is more.
pub(crate) fn reserve() -> usize {
    let watermarks = state::high_watermarks().saturating_mul(2);
    watermarks.max(state::managed_pages() / 64)
}

/// Takes free blocks from the page allocator, the largest first, down to a smallest order and to the
/// reserve.
pub(crate) struct Harvest {
    order: u32,
    min_order: u32,
    reserve: usize,
}

impl Harvest {
    /// Begins with the largest order. The reserve is computed now.
    pub(crate) fn new(min_order: u32) -> Self {
        let order = PageBlock::max_order();
        Self {
            order,
            min_order: min_order.min(order),
            reserve: reserve(),
        }
    }

    /// The next block; `None` when nothing is left above the reserve.
    ///
    /// Orders only go down: what is freed meanwhile is found in smaller blocks.
    pub(crate) fn next(&mut self) -> Option<PageBlock> {
        loop {
            let pages = 1usize << self.order;
            if state::free_pages() > self.reserve.saturating_add(pages) {
                if let Some(block) = PageBlock::take_free(self.order) {
                    return Some(block);
                }
            }
            if self.order <= self.min_order {
                return None;
            }
            self.order -= 1;
        }
    }
}
