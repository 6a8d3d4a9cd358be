// SPDX-License-Identifier: GPL-2.0

//! Memory statistics of the kernel.
//!
//! Pages are pages of the guest, of [`PAGE_SIZE`](kernel::page::PAGE_SIZE) bytes.
//!
//! C headers: `include/linux/mm.h`, `include/linux/vmstat.h`.

use kernel::bindings::{self, node_stat_item, vm_event_item};
use kernel::ffi::c_ulong;
use kernel::prelude::*;

use super::page_alloc;
use crate::bindings as helpers;

/// The memory usage, in pages.
#[doc(alias = "sysinfo")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemInfo {
    /// Free pages.
    #[doc(alias = "freeram")]
    pub free: u64,
    /// Pages that the page allocator manages, free or not (`MemTotal`).
    #[doc(alias = "totalram")]
    pub total: u64,
    /// The kernel's estimate of pages that are available without swapping (`MemAvailable`).
    #[doc(alias = "si_mem_available")]
    pub available: u64,
    /// Pages of the page cache (`NR_FILE_PAGES`).
    #[doc(alias = "NR_FILE_PAGES")]
    pub file_pages: u64,
}

/// Counts of events since boot.
#[doc(alias = "vm_event_item")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmEvents {
    /// Pages read from swap.
    #[doc(alias = "PSWPIN")]
    pub swapped_in: u64,
    /// Pages written to swap.
    #[doc(alias = "PSWPOUT")]
    pub swapped_out: u64,
    /// Major page faults, which needed I/O.
    #[doc(alias = "PGMAJFAULT")]
    pub major_faults: u64,
    /// Page faults, minor and major.
    #[doc(alias = "PGFAULT")]
    pub faults: u64,
    /// Processes that the OOM killer killed.
    #[doc(alias = "OOM_KILL")]
    pub oom_kills: u64,
    /// Allocations that entered direct reclaim (`ALLOCSTALL`).
    #[doc(alias = "ALLOCSTALL_NORMAL")]
    pub allocation_stalls: u64,
    /// Pages that background reclaim (kswapd) scanned.
    #[doc(alias = "PGSCAN_KSWAPD")]
    pub async_scanned: u64,
    /// Pages that direct reclaim scanned.
    #[doc(alias = "PGSCAN_DIRECT")]
    pub direct_scanned: u64,
    /// Pages that background reclaim (kswapd) reclaimed.
    #[doc(alias = "PGSTEAL_KSWAPD")]
    pub async_reclaimed: u64,
    /// Pages that direct reclaim reclaimed.
    #[doc(alias = "PGSTEAL_DIRECT")]
    pub direct_reclaimed: u64,
}

/// Counts of huge page allocations since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugetlbEvents {
    /// Huge pages allocated from the buddy allocator (`HTLB_BUDDY_PGALLOC`).
    #[doc(alias = "HTLB_BUDDY_PGALLOC")]
    pub allocations: u64,
    /// Failed allocations of huge pages (`HTLB_BUDDY_PGALLOC_FAIL`).
    #[doc(alias = "HTLB_BUDDY_PGALLOC_FAIL")]
    pub failures: u64,
}

/// Returns the memory usage. Any context.
#[doc(alias = "si_meminfo")]
#[doc(alias = "si_mem_available")]
pub fn meminfo() -> MemInfo {
    let mut info = bindings::sysinfo::default();
    // SAFETY: `info` is valid for writes.
    unsafe { bindings::si_meminfo(&mut info) };
    MemInfo {
        free: info.freeram as u64,
        total: info.totalram as u64,
        available: page_alloc::available_pages() as u64,
        file_pages: node_pages(bindings::node_stat_item_NR_FILE_PAGES),
    }
}

/// Returns a count of pages, summed over all nodes.
fn node_pages(item: node_stat_item) -> u64 {
    // SAFETY: The helper only reads the counter of `item`, which is a constant of the kernel.
    unsafe { helpers::vbrs_global_node_page_state(item) as u64 }
}

/// The counts of all events since boot.
struct EventCounts([c_ulong; bindings::vm_event_item_NR_VM_EVENT_ITEMS as usize]);

impl EventCounts {
    /// Reads the counts. Returns `None` if the kernel does not count events. May sleep.
    fn read() -> Option<Self> {
        #[cfg(CONFIG_VM_EVENT_COUNTERS)]
        {
            let mut counts = [0; bindings::vm_event_item_NR_VM_EVENT_ITEMS as usize];
            // SAFETY: `counts` is valid for writes, and has an entry for each event.
            unsafe { bindings::all_vm_events(counts.as_mut_ptr()) };
            Some(Self(counts))
        }
        #[cfg(not(CONFIG_VM_EVENT_COUNTERS))]
        None
    }

    fn get(&self, event: vm_event_item) -> u64 {
        self.0.get(event as usize).map_or(0, |count| *count as u64)
    }

    /// Returns the number of allocations that entered direct reclaim. The kernel counts them per
    /// zone, in the order of `enum zone_type`.
    fn allocation_stalls(&self) -> u64 {
        const FIRST: vm_event_item =
            bindings::vm_event_item_ALLOCSTALL_NORMAL - bindings::zone_type_ZONE_NORMAL;

        (FIRST..FIRST + bindings::MAX_NR_ZONES)
            .map(|event| self.get(event))
            .sum()
    }

    #[cfg(CONFIG_HUGETLB_PAGE)]
    fn hugetlb(&self) -> Option<HugetlbEvents> {
        Some(HugetlbEvents {
            allocations: self.get(bindings::vm_event_item_HTLB_BUDDY_PGALLOC),
            failures: self.get(bindings::vm_event_item_HTLB_BUDDY_PGALLOC_FAIL),
        })
    }

    #[cfg(not(CONFIG_HUGETLB_PAGE))]
    fn hugetlb(&self) -> Option<HugetlbEvents> {
        None
    }
}

/// Returns the counts of events since boot, `None` for counts that this kernel does not keep. May
/// sleep.
#[doc(alias = "all_vm_events")]
pub fn vm_events() -> (Option<VmEvents>, Option<HugetlbEvents>) {
    let Some(counts) = EventCounts::read() else {
        return (None, None);
    };
    let vm_events = VmEvents {
        swapped_in: counts.get(bindings::vm_event_item_PSWPIN),
        swapped_out: counts.get(bindings::vm_event_item_PSWPOUT),
        major_faults: counts.get(bindings::vm_event_item_PGMAJFAULT),
        faults: counts.get(bindings::vm_event_item_PGFAULT),
        oom_kills: counts.get(bindings::vm_event_item_OOM_KILL),
        allocation_stalls: counts.allocation_stalls(),
        async_scanned: node_pages(bindings::node_stat_item_PGSCAN_KSWAPD),
        direct_scanned: node_pages(bindings::node_stat_item_PGSCAN_DIRECT),
        async_reclaimed: node_pages(bindings::node_stat_item_PGSTEAL_KSWAPD),
        direct_reclaimed: node_pages(bindings::node_stat_item_PGSTEAL_DIRECT),
    };
    (Some(vm_events), counts.hugetlb())
}

#[kunit_tests(virtio_balloon_rs_mm_vmstat)]
mod tests {
    use super::*;

    #[test]
    fn allocation_stalls_are_summed_over_all_zones() {
        let mut counts = EventCounts([1; bindings::vm_event_item_NR_VM_EVENT_ITEMS as usize]);
        assert_eq!(
            counts.allocation_stalls(),
            u64::from(bindings::MAX_NR_ZONES)
        );
        for event in [
            bindings::vm_event_item_ALLOCSTALL_NORMAL,
            bindings::vm_event_item_ALLOCSTALL_MOVABLE,
        ] {
            counts.0[event as usize] += 10;
        }
        let expected = u64::from(bindings::MAX_NR_ZONES) + 20;
        assert_eq!(counts.allocation_stalls(), expected);
    }

    #[test]
    fn a_running_guest_has_memory_and_page_faults() {
        let info = meminfo();
        assert!(info.total > 0 && info.free <= info.total);
        assert_eq!(info.total, page_alloc::managed_pages() as u64);
        if let (Some(events), _) = vm_events() {
            assert!(events.faults >= events.major_faults);
        }
    }
}
