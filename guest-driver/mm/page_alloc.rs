// SPDX-License-Identifier: GPL-2.0

//! How the guest's memory fares. All functions may be called in any context.
//!
//! Counts are in the guest's pages.

use crate::bindings as helpers;

/// How many pages are free now. Cheap, and off by a few pages a CPU.
pub fn free_pages() -> usize {
    // SAFETY: Reads a counter.
    unsafe { helpers::vbrs_free_pages() }
}

/// How many pages can be had, by the kernel's estimate: free, or by reclaiming or swapping others;
/// without the reserves that the kernel keeps for itself.
pub fn available_and_swap_pages() -> usize {
    // SAFETY: Reads counters.
    unsafe { helpers::vbrs_available_and_swap_pages() }
}

/// How many pages the page allocator has in all, free or not.
pub fn managed_pages() -> usize {
    // SAFETY: Reads a counter.
    unsafe { helpers::vbrs_managed_pages() }
}

/// The sum of all zones' high watermarks, without what they are boosted by for the moment: with
/// more free pages than these, the kernel does not reclaim memory.
pub fn high_watermarks() -> usize {
    // SAFETY: Reads the zones' watermarks, which are plain words.
    unsafe { helpers::vbrs_high_watermarks() }
}

/// Half-way between the minimum and the low watermark, summed over all zones, without what they are
/// boosted by for the moment.
///
/// Below its low watermark a zone begins to be reclaimed, while whoever allocates goes on; below
/// the minimum they wait for that.
pub fn min_low_midpoint() -> usize {
    // SAFETY: Reads the zones' watermarks, which are plain words.
    unsafe { helpers::vbrs_min_low_midpoint() }
}

/// What the guest fills its free pages with, byte by byte the same in all four; `None` if it leaves
/// them as they are.
pub fn free_page_pattern() -> Option<u32> {
    let mut pattern = 0;
    // SAFETY: `pattern` is valid for a write.
    unsafe { helpers::vbrs_fills_free_pages(&mut pattern) }.then_some(pattern)
}

/// Whether the page allocator fills pages with something of its own, at the latest when it gives
/// them out: then nobody meets what was in them before (`init_on_alloc`, `init_on_free`, page
/// poisoning).
pub fn allocator_fills_pages() -> bool {
    // SAFETY: Reads settings of the kernel's, made when it started.
    unsafe { helpers::vbrs_allocator_fills_pages() }
}
