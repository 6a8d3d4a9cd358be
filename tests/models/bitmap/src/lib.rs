// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A loom model of the dirty bitmap: the source files of the crate `guest_migration`, with loom's atomics.
//!
//! loom runs each test once for every interleaving of its threads, and for every value that the memory model allows a
//! load to return.

#![forbid(unsafe_code)]
// The included source files contain items that only the rest of their crate uses.
#![allow(dead_code)]

#[path = "../../../../host-device/guest-migration/src/atomic_bitmap.rs"]
mod atomic_bitmap;
#[path = "../../../../host-device/guest-migration/src/bitmap.rs"]
mod bitmap;
#[path = "../../../../host-device/guest-migration/src/hint_window.rs"]
mod hint_window;
#[path = "../../../../host-device/guest-migration/src/layout/mod.rs"]
mod layout;
#[path = "../../../../host-device/guest-migration/src/page_run.rs"]
mod page_run;
#[path = "../../../../host-device/guest-migration/src/page_runs.rs"]
mod page_runs;
#[path = "../../../../host-device/guest-migration/src/ram_block_bits.rs"]
mod ram_block_bits;

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

pub use bitmap::DirtyBitmap;
pub use hint_window::{HintError, HintWindow, Hinted, SyncPhase};
pub use layout::{Layout, LayoutError, RamBlock, Region, RAM_BLOCK_NAME_MAX};
pub use page_run::PageRun;
pub use page_runs::PageRuns;

/// Size of a page in bytes, as in the crate `guest_migration`.
pub const PAGE_SIZE: u64 = 4096;
