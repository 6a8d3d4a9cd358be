// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Live migration of guest memory that skips free pages.
//!
//! A migration keeps one dirty bit for each page of guest memory. The bit is set while the page has still to be sent. A
//! *hint* states that a range of guest memory holds nothing worth sending, and clears the bits of that range. This
//! crate owns dirty bits and hints. It does not depend on virtio: a balloon is one possible source of hints.
//!
//! - [`Layout`] describes guest memory: named RAM blocks, which a migration sends, and regions, through which the guest
//!   addresses the RAM blocks. [`Memory`] holds the files of the RAM blocks.
//! - [`DirtyBitmap`] holds the dirty bits. The thread that sends pages shares it with threads that read the progress.
//! - [`SyncPhase`] and [`HintWindow`] are the two states of an iteration. A `SyncPhase` sets bits, a `HintWindow`
//!   accepts hints, and each is consumed to make the other. A hint that arrives too late therefore cannot be applied.
//! - [`HintSource`] asks the guest for hints, [`dirty_tracking::DirtyTracker`] finds the pages that the guest has
//!   written, and [`vm::Vm`] pauses the guest.
//! - [`precopy::Precopy`] runs the migration, and [`stream`] carries pages to the destination.
//! - [`guard`] starts a process that resumes the guest if this one is killed while the guest is paused. [`resume_service`]
//!   is the work of that process.
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
pub mod guard;
mod hint_forwarder;
mod hint_source;
mod hint_window;
mod layout;
mod memory;
mod page_bitmaps;
mod page_run;
mod page_runs;
pub mod precopy;
mod processes;
mod ram_block_bits;
pub mod resume_service;
pub mod signals;
pub mod status;
pub mod stream;
mod sync;
pub mod vm;

pub use bitmap::DirtyBitmap;
pub use cancel::CancelToken;
pub use hint_forwarder::HintForwarder;
pub use hint_source::{HintSource, HintSourceError, WaitOutcome};
pub use hint_window::{HintError, HintWindow, Hinted, SyncPhase};
pub use layout::{Layout, LayoutError, RamBlock, Region, RAM_BLOCK_NAME_MAX};
pub use memory::{Memory, MemoryError};
pub use page_run::PageRun;
pub use page_runs::PageRuns;
pub use processes::{find_pinning, find_pinning_of, FileId, Pinning};

/// Size of a page of guest memory in bytes. One dirty bit covers one page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
