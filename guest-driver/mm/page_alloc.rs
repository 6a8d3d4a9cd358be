// SPDX-License-Identifier: GPL-2.0

//! Counts, watermarks and settings of the page allocator.
//!
//! Counts are in pages of the guest. All functions may be called in any context.
//!
//! C headers: `include/linux/mmzone.h`, `include/linux/vmstat.h`, `include/linux/mm.h`.

use crate::bindings as helpers;

/// Returns the number of free pages. Fast. The error is at most a few pages per CPU.
pub fn free_pages() -> usize {
    // SAFETY: The helper only reads a counter.
    unsafe { helpers::vbrs_free_pages() }
}

/// Returns an estimate of the pages that can be allocated: the kernel's estimate of available pages
/// (`si_mem_available()`), plus the free pages of swap.
///
/// The pages that the kernel reserves for itself are not included.
pub fn available_and_swap_pages() -> usize {
    // SAFETY: The helper only reads counters.
    unsafe { helpers::vbrs_available_and_swap_pages() }
}

/// Returns the number of pages that the page allocator manages, free or not.
pub fn managed_pages() -> usize {
    // SAFETY: The helper only reads a counter.
    unsafe { helpers::vbrs_managed_pages() }
}

/// Returns the sum of the high watermarks of all zones, without any watermark boost.
///
/// The kernel stops background reclaim of a zone once its free pages exceed its high watermark.
pub fn high_watermarks() -> usize {
    // SAFETY: The helper only reads watermarks, which are plain words.
    unsafe { helpers::vbrs_high_watermarks() }
}

/// Returns the midpoint between the minimum and the low watermark, summed over all zones, without
/// any watermark boost.
///
/// Below its low watermark, a zone is reclaimed in the background while allocations still succeed
/// at once. Below the minimum watermark, allocations have to reclaim memory themselves.
pub fn min_low_midpoint() -> usize {
    // SAFETY: The helper only reads watermarks, which are plain words.
    unsafe { helpers::vbrs_min_low_midpoint() }
}

/// Returns the pattern that the guest fills free pages with, as four equal bytes; `None` if the
/// guest leaves free pages unchanged.
pub fn free_page_pattern() -> Option<u32> {
    let mut pattern = 0;
    // SAFETY: `pattern` is valid for writes.
    unsafe { helpers::vbrs_fills_free_pages(&mut pattern) }.then_some(pattern)
}

/// Returns whether the page allocator overwrites pages between free and allocation:
/// `init_on_alloc`, `init_on_free` or page poisoning is enabled.
///
/// If so, the next owner of a page never sees the previous content.
pub fn allocator_fills_pages() -> bool {
    // SAFETY: The helper only reads static keys, which are set during boot.
    unsafe { helpers::vbrs_allocator_fills_pages() }
}
