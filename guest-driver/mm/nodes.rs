// SPDX-License-Identifier: GPL-2.0

//! Which nodes are short of memory.
//!
//! C headers: `include/linux/mmzone.h`, `include/linux/nodemask.h`.

use kernel::bindings;

use super::BalloonPage;
use crate::bindings as helpers;

/// The nodes that are short of memory and have balloon pages.
///
/// A node is short of memory if none of the zones that the kernel uses for itself has more free pages
/// than its high watermark (with what it is boosted by for the moment) and what it keeps from
/// allocations that could be served elsewhere; free CMA pages do not count, for most allocations cannot
/// have them. If a task finds no memory although a node is not short, it is not allowed there (by a
/// cpuset or a memory policy), it needs a larger block, or other tasks have freed pages since.
pub struct NodesBelowWatermark(bindings::nodemask_t);

impl NodesBelowWatermark {
    /// Finds out. Reads counters; any context.
    pub fn now() -> Self {
        let mut nodes = bindings::nodemask_t::default();
        // SAFETY: `nodes` is valid for writes.
        unsafe { helpers::vbrs_nodes_below_watermark(&mut nodes) };
        Self(nodes)
    }

    /// All nodes.
    pub fn all() -> Self {
        let mut nodes = bindings::nodemask_t::default();
        nodes.bits.fill(!0);
        Self(nodes)
    }

    /// No node.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn none() -> Self {
        Self(bindings::nodemask_t::default())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.bits.iter().all(|word| *word == 0)
    }

    /// Whether `page` lies on one of them.
    pub fn contains(&self, page: &BalloonPage) -> bool {
        // SAFETY: The page is valid, for it is borrowed, and so is the mask.
        unsafe { helpers::vbrs_page_is_on_nodes(page.as_raw().as_ptr(), &self.0) }
    }
}

/// Returns whether one node is online. Any context.
pub fn has_one_node() -> bool {
    // SAFETY: The helper only reads the kernel's number of online nodes, in any context.
    unsafe { helpers::vbrs_has_one_node() }
}
