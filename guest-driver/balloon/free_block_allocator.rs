// SPDX-License-Identifier: GPL-2.0

//! Allocation of the free blocks that are hinted.
//!
//! The allocator takes free blocks from the page allocator, and leaves the
//! [reserve](super::hint_reserve) to the guest.

use kernel::prelude::*;

use super::counters::Counters;
use super::hint_reserve::{Limits, Share};
use crate::mm::{PageBlock, Zone, ZoneState};

/// Returns the number of free pages that the kernel can use for its own allocations.
fn usable_pages() -> usize {
    Zone::all().map(|zone| zone.state().free).sum()
}

/// An allocator of free blocks for one hint round.
///
/// It takes free blocks from the page allocator, largest order first, down to a minimum order, and
/// leaves the reserve to the guest.
pub(crate) struct FreeBlockAllocator {
    order: u32,
    min_order: u32,
    /// The zone of the next attempt with this order.
    zone: Option<Zone>,
    /// The number of free pages that all zones keep.
    reserve: usize,
    /// The part that each zone keeps.
    share: Share,
    /// Whether no free block was taken yet.
    fresh: bool,
}

impl FreeBlockAllocator {
    /// Creates an allocator that starts with the largest order. Computes the reserve.
    pub(crate) fn new(limits: Limits, counters: &Counters) -> Self {
        let share = Share::of(limits.reserve(), Share::kept_by_all);
        let reserve = limits.reserve().max(Share(0).kept_by_all());
        counters.hint_reserve_pages.set(reserve as u64);
        Self {
            order: PageBlock::max_order(),
            min_order: limits.min_order,
            zone: Zone::all().next(),
            reserve,
            share,
            fresh: true,
        }
    }

    /// Allocates the next free block. Returns `None` if none is available above the reserve.
    ///
    /// `reclaimed` is the number of pages that the guest has reclaimed under memory pressure; they
    /// are added to the reserve. The order never increases: memory that is freed later is taken in
    /// smaller blocks.
    pub(crate) fn next(&mut self, reclaimed: usize, counters: &Counters) -> Option<PageBlock> {
        let reserve = self.reserve.saturating_add(reclaimed);
        loop {
            while let Some(zone) = self.zone {
                if let Some(block) = self.take(zone, reserve, counters) {
                    return Some(block);
                }
                self.zone = zone.next();
            }
            if self.order <= self.min_order {
                return None;
            }
            self.order -= 1;
            self.zone = Zone::all().next();
        }
    }

    /// Allocates a free block from `zone`, if the zone keeps its part afterwards and all zones keep
    /// `reserve` pages.
    fn take(&mut self, zone: Zone, reserve: usize, counters: &Counters) -> Option<PageBlock> {
        let pages = 1usize << self.order;
        let enough = |state: ZoneState, more: usize| {
            state.free >= self.share.kept(&state).saturating_add(more)
                && usable_pages() >= reserve.saturating_add(more)
        };
        if !enough(zone.state(), pages) {
            return None;
        }
        let block = zone.try_alloc(self.order)?;
        // Other tasks allocate concurrently, so check again.
        if !enough(zone.state(), 0) {
            counters.hint_taken_back_blocks.add(1);
            return None;
        }
        // The first free block replaces the low mark of earlier hint rounds.
        let left = usable_pages() as u64;
        if core::mem::take(&mut self.fresh) {
            counters.hint_free_pages_low.set(left);
        } else {
            counters.hint_free_pages_low.lower(left);
        }
        Some(block)
    }
}

#[kunit_tests(virtio_balloon_rs_free_block_allocator)]
mod tests {
    use super::super::hint_reserve::PAGES_PER_MIB;
    use super::*;
    use crate::mm::{page_alloc, BlockList};

    #[test]
    fn the_reserve_is_left_alone() {
        let counters = Counters::new(None);
        // Reserves all free pages but 8 MiB.
        let keep = usable_pages().saturating_sub(8 * PAGES_PER_MIB);
        let limits = Limits {
            min_order: 0,
            reserve: keep,
        };
        let mut allocator = FreeBlockAllocator::new(limits, &counters);
        let mut taken = BlockList::new();
        let mut last = PageBlock::max_order();
        while let Some(block) = allocator.next(0, &counters) {
            assert!(block.order() <= last);
            last = block.order();
            taken.push(block);
        }
        let reserve = keep.max(page_alloc::min_low_midpoint()) as u64;
        assert!(counters.hint_reserve_pages.get() >= reserve);
        assert!(counters.hint_free_pages_low.get() >= reserve);
        assert!(taken.pages() <= 9 * PAGES_PER_MIB);
        // Reclaimed pages are left to the guest.
        drop(taken);
        let reclaimed = 16 * PAGES_PER_MIB;
        assert!(FreeBlockAllocator::new(limits, &counters)
            .next(reclaimed, &counters)
            .is_none());
    }
}
