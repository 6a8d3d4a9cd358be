// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty bitmap of the crate `migration`, from the same files, with loom's atomics in the place of the processor's.
//!
//! loom runs a piece of code again and again, each time with its threads in another order and with another of the values
//! that the memory model lets a load see, until there is none left.

#![forbid(unsafe_code)]
// Parts of the sources that only the rest of their crate needs.
#![allow(dead_code)]

#[path = "../../../../host-device/guest-migration/src/bitmap.rs"]
mod bitmap;
#[path = "../../../../host-device/guest-migration/src/bits.rs"]
mod bits;
#[path = "../../../../host-device/guest-migration/src/layout.rs"]
mod layout;
#[path = "../../../../host-device/guest-migration/src/runs.rs"]
mod runs;
#[path = "../../../../host-device/guest-migration/src/window.rs"]
mod window;

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

pub use bitmap::DirtyBitmap;
pub use layout::{Block, Layout, LayoutError, Region, MAX_NAME};
pub use runs::{Run, Runs};
pub use window::{HintError, HintWindow, Hinted, SyncPhase};

/// As in the crate `migration`.
pub const PAGE_SIZE: u64 = 4096;
