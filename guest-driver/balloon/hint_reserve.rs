// SPDX-License-Identifier: GPL-2.0

//! The reserve: the free memory that hinting leaves to the guest.
//!
//! [`Limits`] has the module parameters, and computes the size of the reserve. [`Share`]
//! distributes the reserve over the zones.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;
use kernel::{dev_warn, device};

use crate::mm::{page_alloc, PageBlock, Zone, ZoneState};
use crate::virtio::compat::parameter;

/// Guest pages per MiB. A page is smaller than 1 MiB on all architectures.
pub(super) const PAGES_PER_MIB: usize = 1 << (20 - PAGE_SHIFT);

/// The limits of hinting from the module parameters, clamped to valid values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The smallest order of hinted blocks.
    pub(super) min_order: u32,
    /// The reserve in guest pages; 0 means [`default_reserve`].
    pub(super) reserve: usize,
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
                "hint_min_order={} is above the largest order; using {}\n",
                min_order,
                limits.min_order
            );
        }
        if limits.reserve >= page_alloc::managed_pages() {
            dev_warn!(
                dev,
                "hint_reserve_mib={} leaves no memory to hint\n",
                reserve_mib
            );
        } else if limits.reserve > 0 && limits.reserve < page_alloc::min_low_midpoint() {
            dev_warn!(
                dev,
                "hint_reserve_mib={} is below the zones' watermarks; using the watermarks\n",
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
    pub(super) fn reserve(self) -> usize {
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
pub(super) struct Share(pub(super) u64);

impl Share {
    /// The whole zone.
    const ALL: u64 = 1 << 20;

    /// Returns the smallest share with which the zones keep at least `reserve` pages. `kept`
    /// returns the number of pages that they keep with a given share.
    pub(super) fn of(reserve: usize, kept: impl Fn(Self) -> usize) -> Self {
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
    pub(super) fn kept(self, zone: &ZoneState) -> usize {
        let part = zone.managed as u64 * self.0 / Self::ALL;
        zone.floor.max(part as usize)
    }

    /// Returns the number of free pages that all zones of the guest keep.
    pub(super) fn kept_by_all(self) -> usize {
        Zone::all().map(|zone| self.kept(&zone.state())).sum()
    }
}

#[kunit_tests(virtio_balloon_rs_hint_reserve)]
mod tests {
    use super::*;

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
}
