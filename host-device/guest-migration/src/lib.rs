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
//! - [`HintSource`] is who asks the guest for hints, [`track::DirtyTracker`] is who knows what the guest has written, and
//!   [`machine::Machine`] is who can pause it.
//!
//! ```
//! use migration::{Layout, Region, SyncPhase, PAGE_SIZE};
//!
//! let layout = Layout::of_regions([Region::new(0x10_0000, 64 * PAGE_SIZE)?])?;
//! let sync = SyncPhase::new(&layout.into())?;
//! sync.set_all();
//!
//! let window = sync.finish();
//! let hinted = window.hint(0x10_0000, 16 * PAGE_SIZE)?;
//! assert_eq!(hinted.cleared, 16);
//! assert_eq!(window.bitmap().dirty_pages(), 48);
//!
//! let sync = window.close();
//! sync.mark_dirty(0x10_0000, 1)?;
//! assert_eq!(sync.bitmap().dirty_pages(), 49);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod bitmap;
mod bits;
#[cfg(test)]
mod bits_tests;
mod cancel;
pub mod digest;
mod hints;
mod layout;
pub mod machine;
mod mappers;
mod memory;
pub mod precopy;
mod runs;
pub mod status;
pub mod stream;
mod sync;
pub mod track;
mod window;

pub use bitmap::DirtyBitmap;
pub use cancel::Cancel;
pub use hints::{HintSource, HintSourceError, Waited};
pub use layout::{Block, Layout, LayoutError, Region, MAX_NAME};
pub use memory::{Memory, MemoryError};
pub use runs::{Run, Runs};
pub use window::{HintError, HintWindow, Hinted, SyncPhase};

/// Bytes of guest memory that one bit stands for.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
