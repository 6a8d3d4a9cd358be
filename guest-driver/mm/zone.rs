// SPDX-License-Identifier: GPL-2.0

//! The zones for kernel allocations, and their free blocks.
//!
//! C header: `include/linux/mmzone.h`.

use core::ptr::NonNull;

use kernel::ffi::c_int;
use kernel::prelude::*;

use super::PageBlock;
use crate::bindings as helpers;

/// A zone that serves kernel allocations: `ZONE_NORMAL` or lower, not `ZONE_HIGHMEM` or
/// `ZONE_MOVABLE`.
///
/// # Invariants
///
/// `node` is a node that was online, and `zone` is one of its zones, not above `ZONE_NORMAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    node: c_int,
    zone: c_int,
}

/// The state of a zone, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZoneState {
    /// Pages that the page allocator manages, free or not.
    pub managed: usize,
    /// Free pages that kernel allocations can use: all free pages except those of CMA.
    pub free: usize,
    /// The lower limit for the free pages: the midpoint between the minimum and the low watermark,
    /// without any watermark boost, plus the lowmem reserve.
    ///
    /// Above this limit, a kernel allocation does not wait. Background reclaim of the zone may run.
    pub floor: usize,
    /// The high watermark. With more free pages, the kernel does not reclaim memory of the zone.
    pub high: usize,
}

/// The mobility of pages, by which the kernel groups them to avoid fragmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mobility {
    Movable,
    Unmovable,
    Reclaimable,
}

impl Mobility {
    fn as_raw(self) -> helpers::vbrs_mobility {
        match self {
            Self::Movable => helpers::vbrs_mobility_VBRS_MOVABLE,
            Self::Unmovable => helpers::vbrs_mobility_VBRS_UNMOVABLE,
            Self::Reclaimable => helpers::vbrs_mobility_VBRS_RECLAIMABLE,
        }
    }
}

impl Zone {
    /// Returns all such zones, node by node, and for each node from the highest zone to the lowest.
    pub fn all() -> impl Iterator<Item = Self> {
        let (mut node, mut zone) = (0, 0);
        // SAFETY: Both variables are valid for writes.
        unsafe { helpers::vbrs_before_first_zone(&mut node, &mut zone) };
        // The type invariants do not hold for this value. It is only the start of the iteration and
        // is not returned.
        let mut last = Self { node, zone };
        core::iter::from_fn(move || {
            last = last.next()?;
            Some(last)
        })
    }

    /// Returns the next zone, or `None` after the last.
    pub fn next(self) -> Option<Self> {
        let mut next = self;
        // SAFETY: Both variables are valid for writes. `node` was online, and `zone` is one of its
        // zones or one above `ZONE_NORMAL`.
        // INVARIANT: The zone that the helper finds has managed pages, so its node is online.
        unsafe { helpers::vbrs_next_zone(&mut next.node, &mut next.zone) }.then_some(next)
    }

    /// Returns the current state of the zone. Fast. The error is at most a few pages per CPU.
    pub fn state(self) -> ZoneState {
        let raw = self.raw_state();
        ZoneState {
            managed: raw.managed,
            free: raw.free.saturating_sub(raw.free_cma),
            floor: (raw.min + raw.low) / 2 + raw.lowmem_reserve,
            high: raw.high,
        }
    }

    fn raw_state(self) -> helpers::vbrs_zone {
        let mut state = helpers::vbrs_zone::default();
        // SAFETY: By the type invariants, the zone exists. `state` is valid for writes.
        unsafe { helpers::vbrs_read_zone(self.node, self.zone, &mut state) };
        state
    }

    /// Allocates a free block of `2^order` pages, if one is available now in this zone and outside
    /// CMA.
    ///
    /// Each free block is requested with the mobility of its free list. Then the allocation does
    /// not change the migrate type of a pageblock, and does not boost a watermark.
    ///
    /// A request for movable pages may be served from CMA: the kernel does so while more than half
    /// of the free pages of the zone are CMA pages, and if the movable free lists have no block of
    /// this order. In both cases no movable block is requested. If the zone has free CMA pages,
    /// movable blocks of at least a pageblock are then requested as unmovable. Such a block
    /// consists of whole pageblocks, which change their migrate type. The C driver `virtio_balloon`
    /// requests all of its blocks as unmovable.
    ///
    /// Does not reclaim memory, does not use the emergency reserves, and logs no warning. Returns
    /// `None` if no such block is available. Does not sleep.
    pub fn try_alloc(self, order: u32) -> Option<PageBlock> {
        if order > PageBlock::max_order() {
            return None;
        }
        let raw = self.raw_state();
        let kinds = [
            Mobility::Movable,
            Mobility::Unmovable,
            Mobility::Reclaimable,
        ];
        for kind in kinds {
            let of_cma = kind == Mobility::Movable && raw.free_cma > raw.free / 2;
            if !of_cma && self.has_free(kind, order) {
                if let Some(block) = self.take(kind, order) {
                    return Some(block);
                }
            }
        }
        // SAFETY: The helper returns a constant.
        let whole = order >= unsafe { helpers::vbrs_pageblock_order() };
        if raw.free_cma > 0 && whole && self.has_free(Mobility::Movable, order) {
            return self.take(Mobility::Unmovable, order);
        }
        None
    }

    fn has_free(self, kind: Mobility, order: u32) -> bool {
        // SAFETY: By the type invariants, the zone exists. The helper only reads whether the free
        // lists are empty.
        unsafe { helpers::vbrs_zone_has_free(self.node, self.zone, order, kind.as_raw()) }
    }

    fn take(self, kind: Mobility, order: u32) -> Option<PageBlock> {
        // SAFETY: `order` is at most `MAX_PAGE_ORDER`. By the type invariants, the node exists.
        let page =
            unsafe { helpers::vbrs_alloc_zone_block(self.node, self.zone, order, kind.as_raw()) };
        let page = NonNull::new(page)?;
        // SAFETY: The allocator returned a block of this order with one owner, who may use
        // `private` and `lru`.
        let block = unsafe { PageBlock::from_page(page, order) };
        // Other tasks allocate concurrently, so the block may come from a lower zone or from CMA.
        // SAFETY: `block` owns the pages.
        let wanted = unsafe {
            helpers::vbrs_page_is_of_zone(page.as_ptr(), self.node, self.zone)
                && !helpers::vbrs_page_is_cma(page.as_ptr())
        };
        wanted.then_some(block)
    }
}

#[kunit_tests(virtio_balloon_rs_mm_zone)]
mod tests {
    use super::*;
    use crate::mm::page_alloc;

    #[test]
    fn zones_have_memory_and_come_once() {
        let mut managed = 0;
        let mut last = None;
        for zone in Zone::all() {
            let state = zone.state();
            assert!(state.managed > 0 && state.free <= state.managed);
            assert!(state.floor > 0 && state.high > 0);
            assert!(last != Some(zone));
            last = Some(zone);
            managed += state.managed;
        }
        assert!(managed > 0 && managed <= page_alloc::managed_pages());
        assert!(last.and_then(Zone::next).is_none());
    }

    #[test]
    fn a_block_of_a_zone_is_of_that_zone() -> Result {
        let zone = Zone::all().max_by_key(|zone| zone.state().free);
        let zone = zone.ok_or(ENOENT)?;
        let block = zone.try_alloc(3).ok_or(ENOMEM)?;
        assert_eq!(block.order(), 3);
        let page = block.as_raw().as_ptr();
        // SAFETY: `block` owns the pages.
        assert!(unsafe { helpers::vbrs_page_is_of_zone(page, zone.node, zone.zone) });
        assert!(zone.try_alloc(PageBlock::max_order() + 1).is_none());
        Ok(())
    }
}
