// SPDX-License-Identifier: GPL-2.0

//! How much memory the guest keeps, and which block is hinted next.

use super::counters::Counters;
use crate::mm::{state, PageBlock};

/// The free pages that hinting leaves alone: so many that the guest neither begins to reclaim
/// memory nor stalls, and so few that nearly all free memory is hinted.
///
/// Three times the sum of the zones' high watermarks, or 1/64 of memory if that is more. Above its
/// high watermark a zone is not reclaimed, and the kernel may raise it for a while by one and a
/// half times (`watermark_boost_factor`); the rest is room for processes.
fn reserve() -> usize {
    let watermarks = state::high_watermarks().saturating_mul(3);
    watermarks.max(state::managed_pages() / 64)
}

/// Whether the guest has memory to give to the balloon.
///
/// Not if less than 1/128 of its memory is to be had at all: taking that too would end in the OOM
/// killer, or in a deadlock, for the balloon itself cannot be killed.
pub(crate) fn may_inflate() -> bool {
    state::obtainable_pages() > state::managed_pages() / 128
}

/// Takes free blocks from the page allocator, the largest first, down to a smallest order and to
/// the reserve.
pub(crate) struct Harvest {
    order: u32,
    min_order: u32,
    reserve: usize,
}

impl Harvest {
    /// Begins with the largest order. The reserve is computed now.
    pub(crate) fn new(min_order: u32, counters: &Counters) -> Self {
        let order = PageBlock::max_order();
        let reserve = reserve();
        counters.hint_reserve_pages.set(reserve as u64);
        counters.hint_free_pages_low.set(state::free_pages() as u64);
        Self {
            order,
            min_order: min_order.min(order),
            reserve,
        }
    }

    /// The next block; `None` when nothing is left above the reserve.
    ///
    /// If the guest is `pressed` for memory, twice the reserve is left alone. Orders only go down:
    /// what is freed meanwhile is found in smaller blocks.
    pub(crate) fn next(&mut self, pressed: bool, counters: &Counters) -> Option<PageBlock> {
        let reserve = self.reserve << u32::from(pressed);
        loop {
            let pages = 1usize << self.order;
            if state::free_pages() > reserve.saturating_add(pages) {
                if let Some(block) = PageBlock::take_free(self.order) {
                    // Others allocate too: what counts is what is left now.
                    let left = state::free_pages();
                    if left >= reserve {
                        counters.hint_free_pages_low.lower(left as u64);
                        return Some(block);
                    }
                    counters.hint_taken_back_blocks.add(1);
                }
            }
            if self.order <= self.min_order {
                return None;
            }
            self.order -= 1;
        }
    }
}
