// SPDX-License-Identifier: GPL-2.0

//! What the kernel counts about its memory.
//!
//! Pages are the guest's own, of [`PAGE_SIZE`](kernel::page::PAGE_SIZE) bytes.

use crate::bindings as helpers;

/// How memory is used now, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// Free.
    pub free: u64,
    /// In the page allocator's hands, free or not (`MemTotal`).
    pub total: u64,
    /// To be had without swapping, by the kernel's estimate.
    pub available: u64,
    /// With the contents of files.
    pub file_pages: u64,
}

/// What has happened since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmEvents {
    /// Pages read from swap.
    pub swapped_in: u64,
    /// Pages written to swap.
    pub swapped_out: u64,
    /// Faults that needed input or output.
    pub major_faults: u64,
    /// Faults of both kinds.
    pub faults: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// Times that an allocation had to reclaim memory itself.
    pub allocation_stalls: u64,
    /// Pages that the kernel's own thread looked at to reclaim them.
    pub async_scanned: u64,
    /// Pages that allocations looked at to reclaim them.
    pub direct_scanned: u64,
    /// Pages that the kernel's own thread reclaimed.
    pub async_reclaimed: u64,
    /// Pages that allocations reclaimed.
    pub direct_reclaimed: u64,
}

/// What has happened to the pool of huge pages since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugetlbEvents {
    /// Huge pages allocated for it.
    pub allocations: u64,
    /// Huge pages that could not be allocated.
    pub failures: u64,
}

/// Reads how memory is used. Any context.
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

/// Reads what has happened; `None` for what this kernel does not count. May sleep.
pub fn vm_events() -> (Option<VmEvents>, Option<HugetlbEvents>) {
    let mut raw = helpers::vbrs_vm_events::default();
    let mut raw_hugetlb = helpers::vbrs_hugetlb_events::default();
    let mut has_hugetlb = false;
    // SAFETY: All three are valid for writes.
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
