// SPDX-License-Identifier: GPL-2.0

//! NUMA nodes, and those that are short of memory.
//!
//! C headers: `include/linux/mmzone.h`, `include/linux/nodemask.h`.

use core::iter;

use kernel::bindings;
use kernel::ffi::c_int;
use kernel::prelude::*;

use super::zone::{AnyZone, ZoneCounts};
use super::BalloonPage;
use crate::bindings as helpers;

/// A NUMA node.
///
/// # Invariants
///
/// The node was online. It is less than `MAX_NUMNODES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node(c_int);

impl Node {
    /// Returns the online nodes in ascending order.
    #[doc(alias = "for_each_online_node")]
    pub(super) fn online() -> impl Iterator<Item = Self> {
        iter::successors(Self::first(), |node| node.next())
    }

    /// Returns the first online node.
    #[doc(alias = "first_online_node")]
    pub(super) fn first() -> Option<Self> {
        // SAFETY: The helper only reads the kernel's set of online nodes.
        Self::from_raw(unsafe { helpers::vbrs_first_online_node() })
    }

    /// Returns the next online node.
    #[doc(alias = "next_online_node")]
    pub(super) fn next(self) -> Option<Self> {
        // SAFETY: By the type invariants, the node is less than `MAX_NUMNODES`. The helper only
        // reads the kernel's set of online nodes.
        Self::from_raw(unsafe { helpers::vbrs_next_online_node(self.0) })
    }

    /// Creates a `Node` from the number that a search for online nodes has found.
    fn from_raw(node: c_int) -> Option<Self> {
        // INVARIANT: A number less than `MAX_NUMNODES` is that of an online node.
        (node < bindings::MAX_NUMNODES as c_int).then_some(Self(node))
    }

    pub(super) fn as_raw(self) -> c_int {
        self.0
    }

    /// Returns whether the node has pages of a balloon, of any driver.
    #[doc(alias = "NR_BALLOON_PAGES")]
    fn has_balloon_pages(self) -> bool {
        let item = bindings::node_stat_item_NR_BALLOON_PAGES;
        // SAFETY: By the type invariants, the node exists. The helper only reads a counter.
        unsafe { helpers::vbrs_node_page_state(self.0, item) > 0 }
    }

    /// Returns whether the node is short of memory.
    fn is_below_watermark(self) -> bool {
        all_below_watermark(
            AnyZone::of_node(self).map(|zone| (zone.serves_kernel(), zone.counts())),
        )
    }
}

/// Returns whether a node is short of memory.
///
/// `zones` are the zones of the node from the lowest to the highest, and whether each of them
/// serves kernel allocations. Those zones determine the result: free pages of `ZONE_MOVABLE` do not
/// help all allocations. If the node has none of them, the lowest other zone determines it.
fn all_below_watermark(zones: impl Iterator<Item = (bool, ZoneCounts)>) -> bool {
    let mut has_memory = false;
    for (serves_kernel, counts) in zones.filter(|(_, counts)| counts.is_managed()) {
        if has_memory && !serves_kernel {
            break;
        }
        if !counts.is_below_watermark() {
            return false;
        }
        has_memory = true;
    }
    has_memory
}

/// A set of NUMA nodes: those that are short of memory and have balloon pages, as
/// [`now`](Self::now) finds them.
///
/// A node is short of memory if each of its zones for kernel allocations is. A node without such
/// zones is judged by its other zones. A zone is short of memory if it has no more free pages than
/// the sum of:
///
/// - its high watermark, including any watermark boost;
/// - its lowmem reserve, which allocations that another zone could serve do not get;
/// - its free CMA pages, which most allocations cannot use.
///
/// A task may find no memory although no node is short of memory. Then a cpuset or a memory policy
/// restricts the task to other nodes, the task needs a block of a higher order, or memory has been
/// freed since.
#[doc(alias = "nodemask_t")]
pub struct NodesBelowWatermark(bindings::nodemask_t);

impl NodesBelowWatermark {
    /// Returns the nodes that are short of memory and have balloon pages. Only reads counters. Any
    /// context.
    #[doc(alias = "high_wmark_pages")]
    pub fn now() -> Self {
        let mut nodes = bindings::nodemask_t::default();
        for node in Node::online() {
            if node.has_balloon_pages() && node.is_below_watermark() {
                // SAFETY: `nodes` is valid for writes, and has a bit for each node.
                unsafe { helpers::vbrs_node_set(node.as_raw(), &mut nodes) };
            }
        }
        Self(nodes)
    }

    /// Returns the set of all nodes.
    pub fn all() -> Self {
        let mut nodes = bindings::nodemask_t::default();
        nodes.bits.fill(!0);
        Self(nodes)
    }

    /// Returns an empty set.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn none() -> Self {
        Self(bindings::nodemask_t::default())
    }

    /// Returns whether the set is empty.
    #[doc(alias = "nodes_empty")]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.bits.iter().all(|word| *word == 0)
    }

    /// Returns whether `page` is on a node in the set.
    #[doc(alias = "node_isset")]
    #[doc(alias = "page_to_nid")]
    #[inline]
    pub fn contains(&self, page: &BalloonPage) -> bool {
        // SAFETY: The page and the node mask are borrowed, and therefore valid.
        unsafe { helpers::vbrs_page_is_on_nodes(page.as_raw().as_ptr(), &self.0) }
    }
}

/// Returns whether exactly one node has memory. Any context.
#[doc(alias = "num_node_state")]
#[inline]
pub fn has_one_node() -> bool {
    // SAFETY: The helper only reads the kernel's set of nodes with memory.
    unsafe { helpers::vbrs_nr_memory_nodes() == 1 }
}

/// Returns whether any node is short of memory, with balloon pages or without: see
/// [`NodesBelowWatermark`]. Only reads counters. Any context.
pub fn any_node_is_below_watermark() -> bool {
    Node::online().any(Node::is_below_watermark)
}

#[kunit_tests(virtio_balloon_rs_mm_nodes)]
mod tests {
    use super::*;

    const UNMANAGED: usize = 0;

    /// Returns the counts of a zone with a high watermark of 10.
    fn zone(managed: usize, free: usize) -> ZoneCounts {
        ZoneCounts(helpers::vbrs_zone {
            managed,
            free,
            high: 10,
            ..Default::default()
        })
    }

    fn is_below<const N: usize>(zones: [(bool, ZoneCounts); N]) -> bool {
        all_below_watermark(zones.into_iter())
    }

    #[test]
    fn zones_for_kernel_allocations_determine_the_node() {
        let (short, roomy) = (zone(100, 10), zone(100, 11));
        let unmanaged = zone(UNMANAGED, 0);
        assert!(is_below([(true, short), (true, short)]));
        assert!(!is_below([(true, short), (true, roomy)]));
        assert!(!is_below([(true, roomy), (true, short)]));
        assert!(is_below([(true, unmanaged), (true, short)]));
        // Other zones only count if there is none for kernel allocations, and then only the lowest.
        assert!(is_below([(true, short), (false, roomy)]));
        assert!(!is_below([(true, roomy), (false, short)]));
        assert!(!is_below([(true, unmanaged), (false, roomy)]));
        assert!(is_below([(true, unmanaged), (false, short)]));
        assert!(is_below([(false, short), (false, roomy)]));
        // A node without memory is not short of it.
        assert!(!is_below([(true, unmanaged), (false, unmanaged)]));
        assert!(!is_below([]));
    }

    #[test]
    fn online_nodes_come_once_in_ascending_order() {
        let mut count = 0;
        let mut last = None;
        for node in Node::online() {
            assert!(last.is_none_or(|last: Node| last.as_raw() < node.as_raw()));
            last = Some(node);
            count += 1;
        }
        // A node may be online for its processors and have no memory.
        assert!(count > 1 || has_one_node());
        assert!(last.is_some_and(|last| last.next().is_none()));
    }
}
