// SPDX-License-Identifier: GPL-2.0

//! How much memory the guest keeps, and which block is hinted next.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;
use kernel::{dev_warn, device};

use super::counters::Counters;
use crate::mm::{page_alloc, PageBlock, Zone, ZoneState};
use crate::virtio::compat::parameter;

/// Pages of the guest in 1 MiB. (A page is smaller than that everywhere.)
const PAGES_PER_MIB: usize = 1 << (20 - PAGE_SHIFT);

/// What the administrator has set for hinting, within what is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The smallest order of blocks.
    min_order: u32,
    /// Pages to be left alone, or 0 for [`default_reserve`].
    reserve: usize,
}

impl Limits {
    /// Reads the module's parameters, and says in the log what cannot be as they want it.
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

    /// An order beyond the largest becomes the largest.
    fn new(min_order: u8, reserve_mib: u32) -> Self {
        Self {
            min_order: u32::from(min_order).min(PageBlock::max_order()),
            reserve: (reserve_mib as usize).saturating_mul(PAGES_PER_MIB),
        }
    }

    /// Limits within which nothing is hinted.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn nothing() -> Self {
        Self::new(u8::MAX, u32::MAX)
    }

    /// How many free pages are to be left alone now.
    fn reserve(self) -> usize {
        match self.reserve {
            0 => default_reserve(),
            pages => pages.max(page_alloc::min_low_midpoint()),
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
fn default_reserve() -> usize {
    let managed = page_alloc::managed_pages();
    let roomy = page_alloc::high_watermarks()
        .saturating_mul(3)
        .min(managed / 20);
    roomy.max(page_alloc::min_low_midpoint()).max(managed / 64)
}

/// Whether the guest has memory to give to the balloon.
///
/// Not if less than 1/128 of its memory is `available` at all: taking that too would end in the OOM
/// killer, or in a deadlock, for the balloon itself cannot be killed.
pub(crate) fn may_inflate(available: usize) -> bool {
    available > page_alloc::managed_pages() / 128
}

/// Which part of its memory each zone keeps: the reserve, distributed.
///
/// Each zone keeps a part in proportion to its memory, but no less than its [floor]: so neither a
/// node nor a zone is emptied, and what the kernel cannot use for itself (pages of `ZONE_MOVABLE`
/// and of CMA) does not count as if it could. Where floors are higher than their zones' parts, the
/// other zones keep less: together they keep the reserve, or all floors if these are more.
///
/// [floor]: ZoneState::floor
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share(u64);

impl Share {
    /// All of a zone.
    const ALL: u64 = 1 << 20;

    /// The share with which zones keep `reserve` pages together; `kept` says how many they keep
    /// with a share.
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

    /// How many free pages a zone keeps.
    fn kept(self, zone: &ZoneState) -> usize {
        let part = zone.managed as u64 * self.0 / Self::ALL;
        zone.floor.max(part as usize)
    }

    /// How many free pages the zones of this guest keep together.
    fn kept_by_all(self) -> usize {
        Zone::all().map(|zone| self.kept(&zone.state())).sum()
    }
}

/// How many pages are free that the kernel can use for itself.
fn usable_pages() -> usize {
    Zone::all().map(|zone| zone.state().free).sum()
}

/// Takes free blocks from the page allocator, the largest first, down to a smallest order and to
/// the reserve.
pub(crate) struct FreeBlockAllocator {
    order: u32,
    min_order: u32,
    /// Where the next block of this order is looked for.
    zone: Option<Zone>,
    /// What all zones keep together.
    reserve: usize,
    /// What each keeps.
    share: Share,
    /// No block was taken yet.
    fresh: bool,
}

impl FreeBlockAllocator {
    /// Begins with the largest order. The reserve is computed now.
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

    /// The next block; `None` when nothing is left above the reserve.
    ///
    /// What the guest has `reclaimed` under pressure is left alone too. Orders only go down:
    /// what is freed meanwhile is found in smaller blocks.
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

    /// Takes a block of `zone`, if that leaves what the zone keeps, and all together the reserve.
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
        // Others allocate too: what counts is what is left now.
        if !enough(zone.state(), 0) {
            counters.hint_taken_back_blocks.add(1);
            return None;
        }
        // What others left in earlier rounds does not count.
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

    /// What each of `zones` keeps of a reserve.
    fn distributed<const N: usize>(reserve: usize, zones: [ZoneState; N]) -> [usize; N] {
        let sum = |share: Share| zones.iter().map(|zone| share.kept(zone)).sum();
        let share = Share::of(reserve, sum);
        zones.map(|zone| share.kept(&zone))
    }

    #[test]
    fn the_reserve_is_distributed_over_the_zones() {
        const PAGES: usize = 1 << 20;
        // Two nodes alike keep half of it each.
        let [one, other] = distributed(1000, [zone(PAGES, 100), zone(PAGES, 100)]);
        assert_eq!((one, other), (500, 500));
        // What a small zone keeps beyond its part, another one need not.
        let [large, small] = distributed(1000, [zone(PAGES, 100), zone(PAGES / 256, 200)]);
        assert_eq!((large, small), (800, 200));
        // No less than the floors, and no more than all.
        let floors = distributed(1000, [zone(PAGES, 700), zone(PAGES, 400)]);
        assert_eq!(floors, [700, 400]);
        let all = distributed(usize::MAX, [zone(PAGES, 700), zone(PAGES, 400)]);
        assert_eq!(all, [PAGES, PAGES]);
    }

    #[test]
    fn the_reserve_is_left_alone() {
        let counters = Counters::new(None);
        // All but 8 MiB of what is free is to be left alone.
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
        // What the guest claims is left to it.
        drop(taken);
        let reclaimed = 16 * PAGES_PER_MIB;
        assert!(FreeBlockAllocator::new(limits, &counters)
            .next(reclaimed, &counters)
            .is_none());
    }
}
