// SPDX-License-Identifier: GPL-2.0

//! Memory management for drivers that hold free pages of the guest.
//!
//! Safe wrappers over what the `kernel` crate does not have yet, usable without a balloon:
//!
//! * [`PageBlock`]: `2^order` pages with one owner, and [`BlockList`], a list of them that needs no
//!   memory of its own;
//! * [`HintedBlock`]: a block that the device has been shown, and may have spoilt;
//! * [`PageRef`]: a page that has other owners too;
//! * [`BalloonPages`]: the kernel's list of pages that a balloon holds, which compaction may move;
//! * [`PageReporting`]: showing free pages to a device that can use their memory;
//! * [`Shrinker`]: giving memory back when the guest is short of it;
//! * [`OomNotifier`]: giving memory back before a process is killed for want of it;
//! * [`Notifier`]: notifications of memory that goes offline, and of the system's sleep;
//! * [`Zone`]: the zones that the kernel uses for itself, and their free blocks;
//! * [`NodesBelowWatermark`]: which NUMA nodes are short of memory;
//! * [`page_alloc`]: how much memory is free, and how much must stay so;
//! * [`vmstat`]: what the kernel counts about memory.
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
pub use nodes::{has_one_node, NodesBelowWatermark};
pub use notifier::{MemoryHotplug, Notifier, OnMemoryOffline, OnSystemSleep, SystemSleep};
pub use oom_notifier::{OnOutOfMemory, OomNotifier};
pub use page_ref::PageRef;
pub use reporting::{FreePages, PageReporting, ReportPages};
pub use shrinker::{Shrink, Shrinker};
pub use zone::{Zone, ZoneState};
