// SPDX-License-Identifier: GPL-2.0

//! The zones that the kernel uses for itself, and their free blocks.
//!
//! C header: `include/linux/mmzone.h`.

use core::ptr::NonNull;

use kernel::ffi::c_int;
use kernel::prelude::*;

use super::PageBlock;
use crate::bindings as helpers;

/// A zone with memory that the kernel can use for itself: not one of movable pages only, nor of
/// high memory.
///
/// # Invariants
///
/// `node` is a node that was online, and `zone` one of its zones, not above `ZONE_NORMAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    node: c_int,
    zone: c_int,
}

/// How a zone fares. All in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZoneState {
    /// What the page allocator has, free or not.
    pub managed: usize,
    /// Free pages that the kernel can use for itself: those of CMA are not among them.
    pub free: usize,
    /// With more free pages than this, an allocation for the kernel does not wait, and has the
    /// zone reclaimed beside him: half-way between the minimum and the low watermark (without what
    /// they are boosted by for the moment), and beyond that what the zone keeps from allocations
    /// that could have come from a higher one.
    pub floor: usize,
    /// With more free pages than this, the kernel does not reclaim memory of the zone.
    pub high: usize,
}

/// What the kernel groups pages by, so that those that cannot be moved lie together.
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
    /// All such zones: node by node, the highest one of each first.
    pub fn all() -> impl Iterator<Item = Self> {
        let (mut node, mut zone) = (0, 0);
        // SAFETY: Both are valid for writes.
        unsafe { helpers::vbrs_before_first_zone(&mut node, &mut zone) };
        // The invariants do not hold for this one, which is not given out.
        let mut last = Self { node, zone };
        core::iter::from_fn(move || {
            last = last.next()?;
            Some(last)
        })
    }

    /// The zone behind this one; `None` behind the last.
    pub fn next(self) -> Option<Self> {
        let mut next = self;
        // SAFETY: Both are valid, of a node that was online or before the first of its zones.
        // INVARIANT: The zone that is found has memory, hence its node is online.
        unsafe { helpers::vbrs_next_zone(&mut next.node, &mut next.zone) }.then_some(next)
    }

    /// How it fares now. Cheap, and off by a few pages a CPU.
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
        // SAFETY: By the invariants there is such a zone; `state` is valid for a write.
        unsafe { helpers::vbrs_read_zone(self.node, self.zone, &mut state) };
        state
    }

    /// Takes a block of `2^order` pages that is free now, in this zone and not in CMA.
    ///
    /// It is asked for as what it is: then no page block changes its kind for good, and no watermark
    /// is boosted. Movable pages may come from CMA, which others are to get at any time, while the
    /// list of the zone's own is empty, or shorter than CMA's. Then larger blocks only are taken,
    /// whole page blocks, as unmovable ones, as the kernel's own balloon driver takes all of its.
    ///
    /// Neither reclaims memory nor dips into the emergency reserves, and prints nothing: `None`
    /// says that there is no free block of this order. Never sleeps.
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
        // SAFETY: Returns a constant.
        let whole = order >= unsafe { helpers::vbrs_pageblock_order() };
        if raw.free_cma > 0 && whole && self.has_free(Mobility::Movable, order) {
            return self.take(Mobility::Unmovable, order);
        }
        None
    }

    fn has_free(self, kind: Mobility, order: u32) -> bool {
        // SAFETY: By the invariants there is such a zone. The lists are only looked at.
        unsafe { helpers::vbrs_zone_has_free(self.node, self.zone, order, kind.as_raw()) }
    }

    fn take(self, kind: Mobility, order: u32) -> Option<PageBlock> {
        // SAFETY: The order is one that the allocator has, and there is such a node.
        let page =
            unsafe { helpers::vbrs_alloc_zone_block(self.node, self.zone, order, kind.as_raw()) };
        let page = NonNull::new(page)?;
        // SAFETY: The allocator gives out pages with one owner, who may use `private` and `lru`.
        let block = unsafe { PageBlock::from_page(page, order) };
        // Others allocate too: it may be of a lower zone, or of CMA.
        // SAFETY: The pages are ours.
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
        // SAFETY: The pages are ours.
        assert!(unsafe { helpers::vbrs_page_is_of_zone(page, zone.node, zone.zone) });
        assert!(zone.try_alloc(PageBlock::max_order() + 1).is_none());
        Ok(())
    }
}
