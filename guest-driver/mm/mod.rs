// SPDX-License-Identifier: GPL-2.0

//! Memory management for drivers that hold free pages of the guest.
//!
//! Safe wrappers of kernel interfaces that the `kernel` crate does not have yet. They do not depend
//! on the balloon driver:
//!
//! * [`PageBlock`]: a free block, `2^order` pages with one owner. [`BlockList`]: a list of free
//!   blocks that allocates no memory.
//! * [`HintedBlock`]: a free block that the device may change or discard. [`HintedPages`]: single
//!   pages of one.
//! * [`PageRef`]: a reference to a page that may have other owners.
//! * [`BalloonPages`]: the pages in a balloon, with page migration.
//! * [`PageReporting`]: free page reporting.
//! * [`Shrinker`]: a shrinker, which frees memory under memory pressure.
//! * [`OomNotifier`]: an OOM notifier, which frees memory before the OOM killer runs.
//! * [`Notifier`]: notifiers for memory hotplug and system sleep.
//! * [`Zone`]: the zones for kernel allocations, and their free blocks.
//! * [`NodesBelowWatermark`]: the NUMA nodes that are short of memory.
//! * [`page_alloc`]: counts, watermarks and settings of the page allocator.
//! * [`vmstat`]: memory statistics of the kernel.
//!
//! C headers: `include/linux/gfp.h`, `include/linux/balloon.h`, `include/linux/shrinker.h`,
//! `include/linux/oom.h`, `include/linux/page_reporting.h`, `include/linux/mmzone.h`.

mod balloon_pages;
mod block;
mod hinted_block;
mod list;
mod nodes;
mod notifier;
mod oom_notifier;
pub mod page_alloc;
mod page_ref;
mod reporting;
mod shrinker;
pub mod vmstat;
mod zone;

pub use balloon_pages::{BalloonPage, BalloonPages, MigrateMode, MigratePages, Migrated};
pub use block::PageBlock;
pub use hinted_block::{HintedBlock, HintedPages};
pub use list::{BlockExtent, BlockList};
pub use nodes::{any_node_is_below_watermark, has_one_node, NodesBelowWatermark};
pub use notifier::{MemoryHotplug, Notifier, OnMemoryOffline, OnSystemSleep, SystemSleep};
pub use oom_notifier::{OnOutOfMemory, OomNotifier};
pub use page_ref::PageRef;
pub use reporting::{FreePages, PageReporting, ReportPages};
pub use shrinker::{Shrink, Shrinker};
pub use zone::{Zone, ZoneState};
