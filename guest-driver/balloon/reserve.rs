// SPDX-License-Identifier: GPL-2.0

//! How much memory the guest keeps, and which block is hinted next.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;
use kernel::{dev_warn, device};

use super::counters::Counters;
use crate::mm::{state, PageBlock};

/// Pages of the guest in 1 MiB. (A page is smaller than that everywhere.)
const PAGES_PER_MIB: usize = 1 << (20 - PAGE_SHIFT);

/// What the administrator has set for hinting, within what is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The smallest order of blocks.
    min_order: u32,
    /// Pages to be left alone, or 0 for [`usual_reserve`].
    reserve: usize,
}

impl Limits {
    /// Reads the module's parameters, and says in the log what cannot be as they want it.
    pub(crate) fn from_parameters(dev: &device::Device) -> Self {
        let (min_order, reserve_mib) = (
            crate::module_parameters::hint_min_order.value(),
            crate::module_parameters::hint_reserve_mib.value(),
        );
        let limits = Self::new(min_order, reserve_mib);
        if limits.min_order != u32::from(min_order) {
            dev_warn!(
                dev,
                "hint_min_order={} is beyond the largest order; taking {}\n",
                min_order,
                limits.min_order
            );
        }
        if limits.reserve >= state::managed_pages() {
            dev_warn!(
                dev,
                "hint_reserve_mib={} is all of memory; nothing will be hinted\n",
                reserve_mib
            );
        } else if limits.reserve > 0 && limits.reserve < state::reclaim_watermarks() {
            dev_warn!(
                dev,
                "hint_reserve_mib={} is less than the zones' watermarks; taking those\n",
                reserve_mib
            );
        }
        limits
    }

    /// An order beyond the largest becomes the largest.
    fn new(min_order: u8, reserve_mib: u32) -> Self {
        Self {
            min_order: u32::from(min_order).min(PageBlock::max_order()),
            reserve: (reserve_mib as usize).saturating_mul(PAGES_PER_MIB),
        }
    }

    /// How many free pages are to be left alone now.
    fn reserve(self) -> usize {
        match self.reserve {
            0 => usual_reserve(),
            pages => pages.max(state::reclaim_watermarks()),
        }
    }
}

/// So many that nobody stalls, and so few that nearly all free memory is hinted.
///
/// Three times the sum of the zones' high watermarks, but no more than a twentieth of memory. Above
/// its high watermark a zone is not reclaimed, and the kernel may raise it for a while by one and a
/// half times (`watermark_boost_factor`); the rest is room for processes. Where the kernel uses huge
/// pages its watermarks are a twentieth of a guest of 1 GiB by themselves: there half-way between
/// the minimum and the low ones must do, so that whoever allocates first has the zone reclaimed
/// beside him, with blocks from the shrinker, before anybody has to wait. What is left here is
/// sent by the migration, used or not.
///
/// And never less than 1/64 of memory.
fn usual_reserve() -> usize {
    let managed = state::managed_pages();
    let roomy = state::high_watermarks().saturating_mul(3).min(managed / 20);
    roomy.max(state::reclaim_watermarks()).max(managed / 64)
}

/// Whether the guest has memory to give to the balloon.
///
/// Not if less than 1/128 of its memory is `obtainable` at all: taking that too would end in the OOM
/// killer, or in a deadlock, for the balloon itself cannot be killed.
pub(crate) fn may_inflate(obtainable: usize) -> bool {
    obtainable > state::managed_pages() / 128
}

/// Takes free blocks from the page allocator, the largest first, down to a smallest order and to
/// the reserve.
pub(crate) struct Harvest {
    order: u32,
    min_order: u32,
    reserve: usize,
    /// No block was taken yet.
    fresh: bool,
}

impl Harvest {
    /// Begins with the largest order. The reserve is computed now.
    pub(crate) fn new(limits: Limits, counters: &Counters) -> Self {
        let reserve = limits.reserve();
        counters.hint_reserve_pages.set(reserve as u64);
        Self {
            order: PageBlock::max_order(),
            min_order: limits.min_order,
            reserve,
            fresh: true,
        }
    }

    /// The next block; `None` when nothing is left above the reserve.
    ///
    /// What the guest has `claimed` under pressure is left alone too. Orders only go down:
    /// what is freed meanwhile is found in smaller blocks.
    pub(crate) fn next(&mut self, claimed: usize, counters: &Counters) -> Option<PageBlock> {
        let reserve = self.reserve.saturating_add(claimed);
        loop {
            let pages = 1usize << self.order;
            if state::free_pages() > reserve.saturating_add(pages) {
                if let Some(block) = PageBlock::take_free(self.order) {
                    // Others allocate too: what counts is what is left now.
                    let left = state::free_pages();
                    if left >= reserve {
                        // What others left in earlier rounds does not count.
                        if core::mem::take(&mut self.fresh) {
                            counters.hint_free_pages_low.set(left as u64);
                        } else {
                            counters.hint_free_pages_low.lower(left as u64);
                        }
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

#[kunit_tests(virtio_balloon_rs_reserve)]
mod tests {
    use super::*;
    use crate::mm::BlockList;

    #[test]
    fn parameters_are_kept_within_what_is_possible() {
        let largest = PageBlock::max_order();
        assert_eq!(Limits::new(4, 0).min_order, 4);
        assert_eq!(Limits::new(u8::MAX, 0).min_order, largest);
        assert_eq!(Limits::new(0, 3).reserve, 3 * PAGES_PER_MIB);
        assert_eq!(Limits::new(0, 3).reserve << PAGE_SHIFT, 3 << 20);
        assert_eq!(Limits::new(0, 0).reserve(), usual_reserve());
        assert!(Limits::new(0, 1).reserve() >= state::reclaim_watermarks());
        assert!(Limits::new(0, u32::MAX).reserve() >= state::managed_pages());
    }

    #[test]
    fn the_reserve_is_left_alone() {
        let counters = Counters::new(None);
        // All but 8 MiB of what is free is to be left alone.
        let keep = state::free_pages().saturating_sub(8 * PAGES_PER_MIB);
        let limits = Limits {
            min_order: 0,
            reserve: keep,
        };
        let mut harvest = Harvest::new(limits, &counters);
        let mut taken = BlockList::new();
        let mut last = PageBlock::max_order();
        while let Some(block) = harvest.next(0, &counters) {
            assert!(block.order() <= last);
            last = block.order();
            taken.push(block);
        }
        let reserve = keep.max(state::reclaim_watermarks()) as u64;
        assert_eq!(counters.hint_reserve_pages.get(), reserve);
        assert!(counters.hint_free_pages_low.get() >= reserve);
        assert!(taken.pages() <= 9 * PAGES_PER_MIB);
        // What the guest claims is left to it.
        drop(taken);
        let claimed = 16 * PAGES_PER_MIB;
        assert!(Harvest::new(limits, &counters)
            .next(claimed, &counters)
            .is_none());
    }
}
