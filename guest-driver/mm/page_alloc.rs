// SPDX-License-Identifier: GPL-2.0

//! Counts, watermarks and settings of the page allocator.
//!
//! Counts are in pages of the guest. All functions may be called in any context.
//!
//! C headers: `include/linux/mmzone.h`, `include/linux/vmstat.h`, `include/linux/mm.h`.

use kernel::bindings;
use kernel::ffi::c_long;
use kernel::prelude::*;

use super::nodes::Node;
use super::zone::{AnyZone, ZoneCounts};
use crate::bindings as helpers;

/// Returns the number of free pages. Fast. The error is at most a few pages per CPU.
#[doc(alias = "global_zone_page_state")]
#[doc(alias = "NR_FREE_PAGES")]
#[inline]
pub fn free_pages() -> usize {
    // SAFETY: The helper only reads a counter.
    unsafe { helpers::vbrs_global_zone_page_state(bindings::zone_stat_item_NR_FREE_PAGES) }
}

/// Returns an estimate of the pages that can be allocated: the kernel's estimate of available pages
/// (`si_mem_available()`), plus the free pages of swap.
///
/// The pages that the kernel reserves for itself are not included.
#[doc(alias = "si_mem_available")]
#[doc(alias = "get_nr_swap_pages")]
pub fn available_and_swap_pages() -> usize {
    // SAFETY: The helper only reads a counter.
    let swap = unsafe { helpers::vbrs_nr_swap_pages() };
    available_pages().saturating_add(non_negative(swap))
}

/// Returns the kernel's estimate of available pages (`MemAvailable`).
#[doc(alias = "si_mem_available")]
pub(super) fn available_pages() -> usize {
    // SAFETY: The function only reads counters.
    non_negative(unsafe { bindings::si_mem_available() })
}

/// Returns a count that the kernel calculates from several counters. It may be negative for a
/// moment, because they do not change together.
fn non_negative(count: c_long) -> usize {
    count.max(0) as usize
}

/// Returns the sum of `pages` over all zones with managed pages.
fn sum_of_zones(pages: fn(&ZoneCounts) -> usize) -> usize {
    let mut sum = 0;
    for node in Node::online() {
        for zone in AnyZone::of_node(node) {
            let counts = zone.counts();
            if counts.is_managed() {
                sum += pages(&counts);
            }
        }
    }
    sum
}

/// Returns the number of pages that the page allocator manages, free or not.
#[doc(alias = "totalram_pages")]
#[inline]
pub fn managed_pages() -> usize {
    // SAFETY: The helper only reads a counter.
    unsafe { helpers::vbrs_managed_pages() }
}

/// Returns the sum of the high watermarks of all zones, without any watermark boost.
///
/// The kernel stops background reclaim of a zone once its free pages exceed its high watermark.
#[doc(alias = "WMARK_HIGH")]
pub fn high_watermarks() -> usize {
    sum_of_zones(ZoneCounts::high_watermark)
}

/// Returns the midpoint between the minimum and the low watermark, summed over all zones, without
/// any watermark boost.
///
/// Below its low watermark, a zone is reclaimed in the background while allocations still succeed
/// at once. Below the minimum watermark, allocations have to reclaim memory themselves.
#[doc(alias = "WMARK_MIN")]
#[doc(alias = "WMARK_LOW")]
pub fn min_low_midpoint() -> usize {
    sum_of_zones(ZoneCounts::min_low_midpoint)
}

/// Returns the pattern that the guest fills free pages with, as four equal bytes; `None` if the
/// guest leaves free pages unchanged.
#[doc(alias = "want_init_on_free")]
#[doc(alias = "page_poisoning_enabled_static")]
#[doc(alias = "PAGE_POISON")]
pub fn free_page_pattern() -> Option<u32> {
    pattern(inits_on_free(), poisons_free_pages())
}

/// Returns the pattern of free pages. `init_on_free` has precedence over page poisoning.
fn pattern(init_on_free: bool, poisoning: bool) -> Option<u32> {
    if init_on_free {
        Some(0)
    } else if poisoning {
        Some(u32::from_ne_bytes([bindings::PAGE_POISON as u8; 4]))
    } else {
        None
    }
}

/// Returns whether the page allocator fills pages with zeroes when they are freed.
fn inits_on_free() -> bool {
    // SAFETY: The helper only reads a static key, which is set during boot.
    unsafe { helpers::vbrs_want_init_on_free() }
}

/// Returns whether the page allocator poisons pages when they are freed.
fn poisons_free_pages() -> bool {
    // SAFETY: The helper only reads a static key, which is set during boot.
    unsafe { helpers::vbrs_page_poisoning_enabled() }
}

/// Returns whether the page allocator overwrites pages between free and allocation:
/// `init_on_alloc`, `init_on_free` or page poisoning is enabled.
///
/// If so, the next owner of a page never sees the previous content.
#[doc(alias = "want_init_on_alloc")]
#[doc(alias = "want_init_on_free")]
#[doc(alias = "page_poisoning_enabled_static")]
pub fn allocator_fills_pages() -> bool {
    // SAFETY: The helper only reads a static key, which is set during boot.
    let inits_on_alloc = unsafe { helpers::vbrs_want_init_on_alloc(0) };
    inits_on_alloc || free_page_pattern().is_some()
}

#[kunit_tests(virtio_balloon_rs_mm_page_alloc)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_count_is_none() {
        assert_eq!(non_negative(c_long::MIN), 0);
        assert_eq!(non_negative(-1), 0);
        assert_eq!(non_negative(0), 0);
        assert_eq!(non_negative(7), 7);
        assert!(available_and_swap_pages() > 0);
    }

    #[test]
    fn init_on_free_has_precedence_over_poisoning() {
        assert_eq!(pattern(true, true), Some(0));
        assert_eq!(pattern(true, false), Some(0));
        assert_eq!(pattern(false, true), Some(0xaaaa_aaaa));
        assert_eq!(pattern(false, false), None);
        assert!(free_page_pattern().is_none() || allocator_fills_pages());
    }

    #[test]
    fn watermarks_are_summed_over_all_zones() {
        assert!(min_low_midpoint() > 0 && min_low_midpoint() < high_watermarks());
        assert!(high_watermarks() < managed_pages());
        assert_eq!(sum_of_zones(|_| 0), 0);
        assert!(sum_of_zones(|_| 1) >= super::super::Zone::all().count());
    }
}
