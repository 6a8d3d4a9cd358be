// SPDX-License-Identifier: GPL-2.0

//! Memory statistics of the kernel.
//!
//! Pages are pages of the guest, of [`PAGE_SIZE`](kernel::page::PAGE_SIZE) bytes.
//!
//! C headers: `include/linux/mm.h`, `include/linux/vmstat.h`.

use crate::bindings as helpers;

/// The memory usage, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// Free pages.
    pub free: u64,
    /// Pages that the page allocator manages, free or not (`MemTotal`).
    pub total: u64,
    /// The kernel's estimate of pages that are available without swapping (`MemAvailable`).
    pub available: u64,
    /// Pages of the page cache (`NR_FILE_PAGES`).
    pub file_pages: u64,
}

/// Counts of events since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmEvents {
    /// Pages read from swap.
    pub swapped_in: u64,
    /// Pages written to swap.
    pub swapped_out: u64,
    /// Major page faults, which needed I/O.
    pub major_faults: u64,
    /// Page faults, minor and major.
    pub faults: u64,
    /// Processes that the OOM killer killed.
    pub oom_kills: u64,
    /// Allocations that entered direct reclaim (`ALLOCSTALL`).
    pub allocation_stalls: u64,
    /// Pages that background reclaim (kswapd) scanned.
    pub async_scanned: u64,
    /// Pages that direct reclaim scanned.
    pub direct_scanned: u64,
    /// Pages that background reclaim (kswapd) reclaimed.
    pub async_reclaimed: u64,
    /// Pages that direct reclaim reclaimed.
    pub direct_reclaimed: u64,
}

/// Counts of huge page allocations since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugetlbEvents {
    /// Huge pages allocated from the buddy allocator (`HTLB_BUDDY_PGALLOC`).
    pub allocations: u64,
    /// Failed allocations of huge pages (`HTLB_BUDDY_PGALLOC_FAIL`).
    pub failures: u64,
}

/// Returns the memory usage. Any context.
pub fn meminfo() -> MemInfo {
    let mut raw = helpers::vbrs_meminfo::default();
    // SAFETY: `raw` is valid for writes.
    unsafe { helpers::vbrs_read_meminfo(&mut raw) };
    MemInfo {
        free: raw.free,
        total: raw.total,
        available: raw.available,
        file_pages: raw.file_pages,
    }
}

/// Returns the counts of events since boot, `None` for counts that this kernel does not keep. May
/// sleep.
pub fn vm_events() -> (Option<VmEvents>, Option<HugetlbEvents>) {
    let mut raw = helpers::vbrs_vm_events::default();
    let mut raw_hugetlb = helpers::vbrs_hugetlb_events::default();
    let mut has_hugetlb = false;
    // SAFETY: All three references are valid for writes.
    let counted =
        unsafe { helpers::vbrs_read_vm_events(&mut raw, &mut raw_hugetlb, &mut has_hugetlb) };
    let vm_events = VmEvents {
        swapped_in: raw.swapped_in,
        swapped_out: raw.swapped_out,
        major_faults: raw.major_faults,
        faults: raw.faults,
        oom_kills: raw.oom_kills,
        allocation_stalls: raw.allocation_stalls,
        async_scanned: raw.async_scanned,
        direct_scanned: raw.direct_scanned,
        async_reclaimed: raw.async_reclaimed,
        direct_reclaimed: raw.direct_reclaimed,
    };
    let hugetlb = HugetlbEvents {
        allocations: raw_hugetlb.allocations,
        failures: raw_hugetlb.failures,
    };
    (
        counted.then_some(vm_events),
        (counted && has_hugetlb).then_some(hugetlb),
    )
}
