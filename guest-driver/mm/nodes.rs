// SPDX-License-Identifier: GPL-2.0

//! NUMA nodes that are short of memory.
//!
//! C headers: `include/linux/mmzone.h`, `include/linux/nodemask.h`.

use kernel::bindings;

use super::BalloonPage;
use crate::bindings as helpers;

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
pub struct NodesBelowWatermark(bindings::nodemask_t);

impl NodesBelowWatermark {
    /// Returns the nodes that are short of memory and have balloon pages. Only reads counters. Any
    /// context.
    pub fn now() -> Self {
        let mut nodes = bindings::nodemask_t::default();
        // SAFETY: `nodes` is valid for writes.
        unsafe { helpers::vbrs_nodes_below_watermark(&mut nodes) };
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
    pub fn is_empty(&self) -> bool {
        self.0.bits.iter().all(|word| *word == 0)
    }

    /// Returns whether `page` is on a node in the set.
    pub fn contains(&self, page: &BalloonPage) -> bool {
        // SAFETY: The page and the node mask are borrowed, and therefore valid.
        unsafe { helpers::vbrs_page_is_on_nodes(page.as_raw().as_ptr(), &self.0) }
    }
}

/// Returns whether exactly one node is online. Any context.
pub fn has_one_node() -> bool {
    // SAFETY: The helper only reads the kernel's count of online nodes.
    unsafe { helpers::vbrs_has_one_node() }
}
