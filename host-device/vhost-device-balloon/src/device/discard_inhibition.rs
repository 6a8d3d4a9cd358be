// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reasons why memory is not released or discarded.

use crate::memory::pin_scan::PinScan;

/// Why memory is not released.
#[derive(Debug, Default)]
pub(super) struct DiscardInhibition {
    /// The option of the command line, or a QMP client.
    pub(super) by_user: bool,
    /// A process that pins guest memory, and how.
    pub(super) pinned_by: Option<PinnedBy>,
    /// Whether the log already says that no process can be examined.
    pub(super) is_blindness_logged: bool,
    pub(super) scan: PinScan,
    /// Whether other processes are left alone.
    pub(super) is_search_off: bool,
}

/// A process that pins guest memory.
#[derive(Debug)]
pub(super) struct PinnedBy {
    pub(super) pid: u32,
    /// The process and how it pins memory, for the user.
    pub(super) reason: String,
}

/// Whether memory is released, as QMP clients see it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DiscardStatus {
    /// Whether memory in the balloon, reported pages and hinted pages stay allocated.
    pub is_inhibited: bool,
    /// Why, for the user.
    pub reasons: Vec<String>,
}
