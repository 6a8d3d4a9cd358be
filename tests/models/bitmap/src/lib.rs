// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty bitmap of the crate `guest_migration`, from the same files, with loom's atomics in the place of the processor's.
//!
//! loom runs a piece of code again and again, each time with its threads in another order and with another of the values
//! that the memory model lets a load see, until there is none left.

#![forbid(unsafe_code)]
// Parts of the sources that only the rest of their crate needs.
#![allow(dead_code)]

#[path = "../../../../host-device/guest-migration/src/atomic_bitmap.rs"]
mod atomic_bitmap;
#[path = "../../../../host-device/guest-migration/src/bitmap.rs"]
mod bitmap;
#[path = "../../../../host-device/guest-migration/src/hint_window.rs"]
mod hint_window;
#[path = "../../../../host-device/guest-migration/src/layout.rs"]
mod layout;
#[path = "../../../../host-device/guest-migration/src/page_runs.rs"]
mod page_runs;

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

pub use bitmap::DirtyBitmap;
pub use hint_window::{HintError, HintWindow, Hinted, SyncPhase};
pub use layout::{Layout, LayoutError, RamBlock, Region, RAM_BLOCK_NAME_MAX};
pub use page_runs::{PageRun, PageRuns};

/// As in the crate `guest_migration`.
pub const PAGE_SIZE: u64 = 4096;
