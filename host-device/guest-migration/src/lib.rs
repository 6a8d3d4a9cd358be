// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The migration side of free page hinting.
//!
//! A migration keeps one bit for each page of guest memory that it still has to send. A *hint* says that a
//! range of guest memory holds nothing worth sending, and clears its bits. This crate owns both, and knows
//! neither who gives the hints nor how: a balloon is one source of them.
//!
//! - [`Layout`] says where guest memory lies: in named blocks, which a migration moves, and in regions, through which
//!   the guest addresses them. [`Memory`] are the files of these blocks.
//! - [`DirtyBitmap`] is the bits, shared by whoever sends pages and whoever asks how much is left.
//! - [`SyncPhase`] and [`HintWindow`] are the two states of a migration round, each owning the right to do
//!   what only that state allows: bits are set in a `SyncPhase`, hints are taken in a `HintWindow`, and each
//!   is consumed to make the other. A hint that comes too late has no value to be given to.
//! - [`HintSource`] is who asks the guest for hints, [`dirty_tracking::DirtyTracker`] is who knows what the guest has written, and
//!   [`vm::Vm`] is who can pause it.
//!
//! ```
//! use guest_migration::{Layout, Region, SyncPhase, PAGE_SIZE};
//!
//! let layout = Layout::from_regions([Region::new(0x10_0000, 64 * PAGE_SIZE)?])?;
//! let sync = SyncPhase::new(&layout.into())?;
//! sync.set_all();
//!
//! let hint_window = sync.finish();
//! let hinted = hint_window.hint(0x10_0000, 16 * PAGE_SIZE)?;
//! assert_eq!(hinted.cleared, 16);
//! assert_eq!(hint_window.bitmap().dirty_pages(), 48);
//!
//! let sync = hint_window.close();
//! sync.mark_dirty(0x10_0000, 1)?;
//! assert_eq!(sync.bitmap().dirty_pages(), 49);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod atomic_bitmap;
#[cfg(test)]
mod atomic_bitmap_tests;
mod bitmap;
mod cancel;
pub mod digest;
pub mod dirty_tracking;
mod hint_source;
mod hint_window;
mod layout;
mod memory;
mod page_runs;
pub mod precopy;
mod processes;
pub mod status;
pub mod stream;
mod sync;
pub mod vm;

pub use bitmap::DirtyBitmap;
pub use cancel::CancelToken;
pub use hint_source::{HintSource, HintSourceError, WaitOutcome};
pub use hint_window::{HintError, HintWindow, Hinted, SyncPhase};
pub use layout::{Layout, LayoutError, RamBlock, Region, RAM_BLOCK_NAME_MAX};
pub use memory::{Memory, MemoryError};
pub use page_runs::{PageRun, PageRuns};

/// Bytes of guest memory that one bit stands for.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
