// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of one connection, from a front end's first message to its last.

use std::cell::Cell;
use std::sync::Arc;

use shared_abi::queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::pending_request::PendingRequest;
use crate::memory::sys::GuestMappings;
use crate::vring::Vring;

/// Notifies the front end of configuration changes.
pub trait NotifyConfigChange: Send + Sync {
    /// Notifies the front end, if it has provided a channel for such messages. Runs under the device's lock: it must
    /// neither wait nor lock the device.
    fn notify(&self);
}

/// Counters of one queue.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueCounters {
    pub(super) wakeups: u64,
    pub(super) requests: u64,
    /// The next available index when the queue was last checked: see
    /// [`Device::detect_driver_restart`](super::Device::detect_driver_restart).
    pub(super) last_avail_idx: Option<u16>,
}

/// State that exists only while a front end is connected.
#[derive(Default)]
pub(super) struct Connection {
    /// `None` only in the default value.
    pub(super) notifier: Option<Arc<dyn NotifyConfigChange>>,
    /// Guest memory, which the front end may replace at any time, and the guarded mappings of what it shared last.
    pub(super) memory: Option<(GuestMemoryAtomic<GuestMemoryMmap>, GuestMappings)>,
    /// The queues that wait for new guest memory, one bit for each.
    pub(super) postponed_queues: u64,
    pub(super) vrings: Vec<Vring>,
    /// For each queue, the request that its next turn continues.
    pub(super) pending_requests: [Option<PendingRequest>; Queue::MAX_COUNT],
    pub(super) counters: [QueueCounters; Queue::MAX_COUNT],
    /// The queue of each index that the driver has used.
    pub(super) queues: [Option<Queue>; Queue::MAX_COUNT],
    pub(super) config_reads: u64,
    pub(super) config_writes: u64,
    pub(super) config_changes: Cell<u64>,
    /// Whether the configuration changed while the queues were stopped, and the driver was not notified.
    pub(super) config_change_pending: Cell<bool>,
    /// Whether the driver was notified of a change and has not read the command id since.
    pub(super) cmd_id_unread: Cell<bool>,
    /// Whether the driver has accepted features and has not used a queue since.
    pub(super) driver_starting: bool,
    /// Whether the log already says why hinted blocks are not discarded.
    pub(super) discard_warning_logged: bool,
}
