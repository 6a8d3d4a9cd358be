// SPDX-License-Identifier: GPL-2.0

//! Zones, their counts, and their free blocks.
//!
//! C header: `include/linux/mmzone.h`.

use core::iter;
use core::ptr::NonNull;

use kernel::bindings::{self, gfp_t, migratetype, zone_type};
use kernel::ffi::c_int;
use kernel::prelude::*;

use super::block::GFP_NO_RECLAIM;
use super::nodes::Node;
use super::PageBlock;
use crate::bindings as helpers;

/// The highest zone that serves kernel allocations.
const ZONE_NORMAL: zone_type = bindings::zone_type_ZONE_NORMAL;

/// A zone of any type.
///
/// # Invariants
///
/// `zone` is less than `MAX_NR_ZONES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AnyZone {
    node: Node,
    zone: zone_type,
}

impl AnyZone {
    /// Returns all zones of `node`, with managed pages or without, from the lowest to the highest.
    pub(super) fn of_node(node: Node) -> impl Iterator<Item = Self> {
        // INVARIANT: The zone is less than `MAX_NR_ZONES`.
        (0..bindings::MAX_NR_ZONES).map(move |zone| Self { node, zone })
    }

    /// Returns whether the zone serves kernel allocations: not `ZONE_HIGHMEM`, `ZONE_MOVABLE` or
    /// `ZONE_DEVICE`.
    pub(super) fn serves_kernel(self) -> bool {
        self.zone <= ZONE_NORMAL
    }

    fn as_raw(self) -> (c_int, c_int) {
        (self.node.as_raw(), self.zone as c_int)
    }

    /// Returns the current counts of the zone. Fast. The error is at most a few pages per CPU.
    pub(super) fn counts(self) -> ZoneCounts {
        let (node, zone) = self.as_raw();
        let mut counts = helpers::vbrs_zone::default();
        // SAFETY: By the type invariants, the zone exists. `counts` is valid for writes.
        unsafe { helpers::vbrs_read_zone(node, zone, &mut counts) };
        ZoneCounts(counts)
    }
}

/// The counts and watermarks of a zone, in pages.
#[derive(Clone, Copy, Default)]
pub(super) struct ZoneCounts(pub(super) helpers::vbrs_zone);

impl ZoneCounts {
    /// Returns whether the page allocator manages pages of the zone.
    #[doc(alias = "managed_zone")]
    pub(super) fn is_managed(&self) -> bool {
        self.0.managed > 0
    }

    /// Returns the high watermark, without any watermark boost.
    pub(super) fn high_watermark(&self) -> usize {
        self.0.high
    }

    /// Returns the midpoint between the watermark at which allocations must reclaim and the one at
    /// which background reclaim begins, without any watermark boost.
    pub(super) fn min_low_midpoint(&self) -> usize {
        (self.0.min + self.0.low) / 2
    }

    /// Returns the pages that the zone keeps from allocations that `highest` could serve.
    fn lowmem_reserve(&self, highest: zone_type) -> usize {
        let reserve = self.0.lowmem_reserve.get(highest as usize);
        reserve.map_or(0, |pages| *pages as usize)
    }

    /// Returns whether an ordinary allocation finds the zone at or below its high watermark,
    /// including any watermark boost.
    ///
    /// Such an allocation gets neither the lowmem reserve nor free CMA pages.
    #[doc(alias = "high_wmark_pages")]
    pub(super) fn is_below_watermark(&self) -> bool {
        let kept = self.lowmem_reserve(bindings::zone_type_ZONE_MOVABLE) + self.0.free_cma;
        self.0.free <= self.0.high + self.0.boost + kept
    }
}

/// A zone that serves kernel allocations: `ZONE_NORMAL` or lower, not `ZONE_HIGHMEM` or
/// `ZONE_MOVABLE`.
///
/// # Invariants
///
/// The zone is not above `ZONE_NORMAL`.
#[doc(alias = "zone")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone(AnyZone);

/// The state of a zone, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZoneState {
    /// Pages that the page allocator manages, free or not.
    #[doc(alias = "zone_managed_pages")]
    pub managed: usize,
    /// Free pages that kernel allocations can use: all free pages except those of CMA.
    #[doc(alias = "NR_FREE_PAGES")]
    pub free: usize,
    /// The lower limit for the free pages: the midpoint between the minimum and the low watermark,
    /// without any watermark boost, plus the lowmem reserve.
    ///
    /// Above this limit, a kernel allocation does not wait. Background reclaim of the zone may run.
    pub floor: usize,
    /// The high watermark. With more free pages, the kernel does not reclaim memory of the zone.
    #[doc(alias = "WMARK_HIGH")]
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
    fn migratetype(self) -> migratetype {
        match self {
            Self::Movable => bindings::migratetype_MIGRATE_MOVABLE,
            Self::Unmovable => bindings::migratetype_MIGRATE_UNMOVABLE,
            Self::Reclaimable => bindings::migratetype_MIGRATE_RECLAIMABLE,
        }
    }

    /// Returns the flag of an allocation with this mobility.
    fn gfp(self) -> gfp_t {
        match self {
            Self::Movable => helpers::VBRS_GFP_MOVABLE,
            Self::Unmovable => 0,
            Self::Reclaimable => helpers::VBRS_GFP_RECLAIMABLE,
        }
    }
}

impl Zone {
    /// Returns all such zones, node by node, and for each node from the highest zone to the lowest.
    #[doc(alias = "for_each_zone")]
    #[doc(alias = "managed_zone")]
    pub fn all() -> impl Iterator<Item = Self> {
        iter::successors(Self::first_from(Node::first()), |zone| zone.next())
    }

    /// Returns the first zone of `node` and the nodes after it.
    fn first_from(mut node: Option<Node>) -> Option<Self> {
        while let Some(this) = node {
            let highest = Self::highest_below(this, bindings::MAX_NR_ZONES);
            if highest.is_some() {
                return highest;
            }
            node = this.next();
        }
        None
    }

    /// Returns the highest zone of `node` that is below zone `limit`, has managed pages, and serves
    /// kernel allocations.
    fn highest_below(node: Node, limit: zone_type) -> Option<Self> {
        // INVARIANT: The zones are not above `ZONE_NORMAL`, which is less than `MAX_NR_ZONES`.
        (0..limit.min(ZONE_NORMAL + 1))
            .rev()
            .map(|zone| AnyZone { node, zone })
            .find(|zone| zone.counts().is_managed())
            .map(Self)
    }

    /// Returns the next zone, or `None` after the last.
    #[doc(alias = "next_zone")]
    #[doc(alias = "managed_zone")]
    pub fn next(self) -> Option<Self> {
        let AnyZone { node, zone } = self.0;
        Self::highest_below(node, zone).or_else(|| Self::first_from(node.next()))
    }

    /// Returns the current state of the zone. Fast. The error is at most a few pages per CPU.
    #[doc(alias = "zone_managed_pages")]
    #[doc(alias = "zone_page_state")]
    pub fn state(self) -> ZoneState {
        let counts = self.0.counts();
        ZoneState {
            managed: counts.0.managed,
            free: counts.0.free.saturating_sub(counts.0.free_cma),
            floor: counts.min_low_midpoint() + counts.lowmem_reserve(ZONE_NORMAL),
            high: counts.high_watermark(),
        }
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
    #[doc(alias = "alloc_pages_node")]
    pub fn try_alloc(self, order: u32) -> Option<PageBlock> {
        if order > PageBlock::max_order() {
            return None;
        }
        let ZoneCounts(counts) = self.0.counts();
        let kinds = [
            Mobility::Movable,
            Mobility::Unmovable,
            Mobility::Reclaimable,
        ];
        for kind in kinds {
            let of_cma = kind == Mobility::Movable && counts.free_cma > counts.free / 2;
            if !of_cma && self.has_free(kind, order) {
                if let Some(block) = self.take(kind, order) {
                    return Some(block);
                }
            }
        }
        // SAFETY: The helper returns a constant.
        let whole = order >= unsafe { helpers::vbrs_pageblock_order() };
        if counts.free_cma > 0 && whole && self.has_free(Mobility::Movable, order) {
            return self.take(Mobility::Unmovable, order);
        }
        None
    }

    /// Returns whether the zone has a free block of at least this order in the free lists of this
    /// mobility. Takes no lock: another task may allocate the block at any time.
    fn has_free(self, kind: Mobility, order: u32) -> bool {
        let (node, zone) = self.0.as_raw();
        (order..bindings::NR_PAGE_ORDERS).any(|order| {
            // SAFETY: By the type invariants, the zone exists. The order and the migrate type are
            // valid. The helper only reads whether the free list is empty.
            !unsafe { helpers::vbrs_free_list_is_empty(node, zone, order, kind.migratetype()) }
        })
    }

    /// Returns the flag of an allocation from this zone or a lower one.
    fn gfp(self) -> gfp_t {
        match self.0.zone {
            #[cfg(CONFIG_ZONE_DMA)]
            bindings::zone_type_ZONE_DMA => helpers::VBRS_GFP_DMA,
            #[cfg(CONFIG_ZONE_DMA32)]
            bindings::zone_type_ZONE_DMA32 => helpers::VBRS_GFP_DMA32,
            _ => 0,
        }
    }

    fn take(self, kind: Mobility, order: u32) -> Option<PageBlock> {
        let (node, zone) = self.0.as_raw();
        let gfp = GFP_NO_RECLAIM | helpers::VBRS_GFP_THISNODE | self.gfp() | kind.gfp();
        // SAFETY: `order` is at most `MAX_PAGE_ORDER`. By the type invariants, the node exists.
        let page = unsafe { helpers::vbrs_alloc_pages_node(node, gfp, order) };
        let page = NonNull::new(page)?;
        // SAFETY: The allocator returned a block of this order with one owner, who may use
        // `private` and `lru`.
        let block = unsafe { PageBlock::from_page(page, order) };
        // Other tasks allocate concurrently, so the block may come from a lower zone or from CMA.
        // SAFETY: `block` owns the pages.
        let wanted = unsafe {
            helpers::vbrs_page_is_of_zone(page.as_ptr(), node, zone)
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
    fn the_next_zone_is_a_lower_one_or_of_a_later_node() {
        let mut walked = Zone::all().next();
        for zone in Zone::all() {
            assert_eq!(walked, Some(zone));
            walked = zone.next();
            if let Some(next) = walked.filter(|next| next.0.node == zone.0.node) {
                assert!(next.0.zone < zone.0.zone);
            }
        }
        assert!(walked.is_none());
    }

    #[test]
    fn a_zone_is_below_its_watermark_without_pages_that_it_keeps() {
        let mut counts = helpers::vbrs_zone {
            managed: 1000,
            free: 177,
            free_cma: 50,
            min: 11,
            low: 24,
            high: 100,
            boost: 7,
            ..Default::default()
        };
        counts.lowmem_reserve[bindings::zone_type_ZONE_MOVABLE as usize] = 20;
        assert!(ZoneCounts(counts).is_below_watermark());
        counts.free += 1;
        assert!(!ZoneCounts(counts).is_below_watermark());
        assert_eq!(ZoneCounts(counts).min_low_midpoint(), 17);
        assert_eq!(ZoneCounts(counts).high_watermark(), 100);
        assert_eq!(ZoneCounts(counts).lowmem_reserve(ZONE_NORMAL), 0);
    }

    #[test]
    fn each_mobility_is_allocated_from_its_free_lists() {
        for (mobility, flag) in [
            (Mobility::Movable, helpers::VBRS_GFP_MOVABLE),
            (Mobility::Unmovable, 0),
            (Mobility::Reclaimable, helpers::VBRS_GFP_RECLAIMABLE),
        ] {
            assert_eq!(mobility.gfp(), flag);
        }
        for zone in Zone::all().filter(|zone| zone.0.zone == ZONE_NORMAL) {
            assert_eq!(zone.gfp(), 0);
        }
    }

    #[test]
    fn a_block_of_a_zone_is_of_that_zone() -> Result {
        let zone = Zone::all().max_by_key(|zone| zone.state().free);
        let zone = zone.ok_or(ENOENT)?;
        let block = zone.try_alloc(3).ok_or(ENOMEM)?;
        assert_eq!(block.order(), 3);
        let page = block.as_raw().as_ptr();
        let (node, number) = zone.0.as_raw();
        // SAFETY: `block` owns the pages.
        assert!(unsafe { helpers::vbrs_page_is_of_zone(page, node, number) });
        assert!(zone.try_alloc(PageBlock::max_order() + 1).is_none());
        Ok(())
    }
}
