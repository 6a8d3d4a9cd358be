// SPDX-License-Identifier: GPL-2.0

//! Allocation of the free blocks that are hinted, and the reserve that hinting leaves to the guest.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;
use kernel::{dev_warn, device};

use super::counters::Counters;
use crate::mm::{page_alloc, PageBlock, Zone, ZoneState};
use crate::virtio::compat::parameter;

/// Guest pages per MiB. A page is smaller than 1 MiB on all architectures.
const PAGES_PER_MIB: usize = 1 << (20 - PAGE_SHIFT);

/// The limits of hinting from the module parameters, clamped to valid values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The smallest order of hinted blocks.
    min_order: u32,
    /// The reserve in guest pages; 0 means [`default_reserve`].
    reserve: usize,
}

impl Limits {
    /// Reads the module parameters. Logs a warning for values that are clamped or prevent hinting.
    pub(crate) fn from_parameters(dev: &device::Device) -> Self {
        let min_order = parameter(crate::module_parameters::hint_min_order.value());
        let reserve_mib = parameter(crate::module_parameters::hint_reserve_mib.value());
        let limits = Self::new(min_order, reserve_mib);
        if limits.min_order != u32::from(min_order) {
            dev_warn!(
                dev,
                "hint_min_order={} is beyond the largest order; taking {}\n",
                min_order,
                limits.min_order
            );
        }
        if limits.reserve >= page_alloc::managed_pages() {
            dev_warn!(
                dev,
                "hint_reserve_mib={} is all of memory; nothing will be hinted\n",
                reserve_mib
            );
        } else if limits.reserve > 0 && limits.reserve < page_alloc::min_low_midpoint() {
            dev_warn!(
                dev,
                "hint_reserve_mib={} is less than the zones' watermarks; taking those\n",
                reserve_mib
            );
        }
        limits
    }

    /// Clamps `min_order` to the largest order of the page allocator.
    fn new(min_order: u8, reserve_mib: u32) -> Self {
        Self {
            min_order: u32::from(min_order).min(PageBlock::max_order()),
            reserve: (reserve_mib as usize).saturating_mul(PAGES_PER_MIB),
        }
    }

    /// Returns limits that prevent hinting.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn nothing() -> Self {
        Self::new(u8::MAX, u32::MAX)
    }

    /// Returns the reserve in guest pages. It never falls below [`page_alloc::min_low_midpoint`].
    fn reserve(self) -> usize {
        match self.reserve {
            0 => default_reserve(),
            pages => pages.max(page_alloc::min_low_midpoint()),
        }
    }
}

/// Returns the default reserve in guest pages: large enough that allocations do not stall, and
/// small enough that nearly all free memory is hinted.
///
/// The reserve is three times the sum of the zones' high watermarks, and at most 1/20 of memory.
/// The kernel does not reclaim a zone above its high watermark, which it may boost by 150 % for
/// some time (`watermark_boost_factor`). The rest is for processes.
///
/// With transparent huge pages, the high watermarks alone reach 1/20 of a guest with 1 GiB. So the
/// lower bound is halfway between the minimum and the low watermarks: at that level an allocation
/// wakes kswapd, which reclaims hinted blocks through the shrinker, and does not wait itself.
/// Another lower bound is 1/64 of memory.
///
/// A live migration sends the pages of the reserve, used or not.
fn default_reserve() -> usize {
    let managed = page_alloc::managed_pages();
    let roomy = page_alloc::high_watermarks()
        .saturating_mul(3)
        .min(managed / 20);
    roomy.max(page_alloc::min_low_midpoint()).max(managed / 64)
}

/// Returns whether the balloon may inflate with `available` pages in the guest.
///
/// At least 1/128 of memory must stay available. Below that, inflation leads to OOM kills or a
/// deadlock, because the OOM killer cannot free the balloon.
pub(crate) fn may_inflate(available: usize) -> bool {
    available > page_alloc::managed_pages() / 128
}

/// The part of its memory that each zone keeps free, in units of `1 / Share::ALL`.
///
/// Each zone keeps pages in proportion to its memory, and at least its [floor]. So hinting empties
/// neither a node nor a zone. Pages that the kernel cannot use for its own allocations
/// (`ZONE_MOVABLE` and CMA) do not count towards the reserve. If the floor of a zone is larger than
/// its part, the other zones keep less. Together the zones keep the reserve, or the sum of their
/// floors if that is larger.
///
/// [floor]: ZoneState::floor
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share(u64);

impl Share {
    /// The whole zone.
    const ALL: u64 = 1 << 20;

    /// Returns the smallest share with which the zones keep at least `reserve` pages. `kept`
    /// returns the number of pages that they keep with a given share.
    fn of(reserve: usize, kept: impl Fn(Self) -> usize) -> Self {
        let (mut low, mut high) = (0, Self::ALL);
        while low < high {
            let middle = (low + high) / 2;
            if kept(Self(middle)) >= reserve {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Self(low)
    }

    /// Returns the number of free pages that `zone` keeps.
    fn kept(self, zone: &ZoneState) -> usize {
        let part = zone.managed as u64 * self.0 / Self::ALL;
        zone.floor.max(part as usize)
    }

    /// Returns the number of free pages that all zones of the guest keep.
    fn kept_by_all(self) -> usize {
        Zone::all().map(|zone| self.kept(&zone.state())).sum()
    }
}

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
    use super::*;
    use crate::mm::BlockList;

    #[test]
    fn parameters_are_kept_within_what_is_possible() {
        let largest = PageBlock::max_order();
        assert_eq!(Limits::new(4, 0).min_order, 4);
        assert_eq!(Limits::new(u8::MAX, 0).min_order, largest);
        assert_eq!(Limits::new(0, 3).reserve, 3 * PAGES_PER_MIB);
        assert_eq!(Limits::new(0, 3).reserve << PAGE_SHIFT, 3 << 20);
        assert_eq!(Limits::new(0, 0).reserve(), default_reserve());
        assert!(Limits::new(0, 1).reserve() >= page_alloc::min_low_midpoint());
        assert!(Limits::new(0, u32::MAX).reserve() >= page_alloc::managed_pages());
    }

    fn zone(managed: usize, floor: usize) -> ZoneState {
        ZoneState {
            managed,
            floor,
            ..ZoneState::default()
        }
    }

    /// Returns the number of pages of `reserve` that each of `zones` keeps.
    fn distributed<const N: usize>(reserve: usize, zones: [ZoneState; N]) -> [usize; N] {
        let sum = |share: Share| zones.iter().map(|zone| share.kept(zone)).sum();
        let share = Share::of(reserve, sum);
        zones.map(|zone| share.kept(&zone))
    }

    #[test]
    fn the_reserve_is_distributed_over_the_zones() {
        const PAGES: usize = 1 << 20;
        // Two equal zones keep half of the reserve each.
        let [one, other] = distributed(1000, [zone(PAGES, 100), zone(PAGES, 100)]);
        assert_eq!((one, other), (500, 500));
        // A zone whose floor exceeds its part relieves the other zone.
        let [large, small] = distributed(1000, [zone(PAGES, 100), zone(PAGES / 256, 200)]);
        assert_eq!((large, small), (800, 200));
        // The zones keep at least their floors, and at most all of their pages.
        let floors = distributed(1000, [zone(PAGES, 700), zone(PAGES, 400)]);
        assert_eq!(floors, [700, 400]);
        let all = distributed(usize::MAX, [zone(PAGES, 700), zone(PAGES, 400)]);
        assert_eq!(all, [PAGES, PAGES]);
    }

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
