// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the device, as QMP clients see it.

use std::time::SystemTime;

use shared_abi::features::Features;
use shared_abi::hinting::device::Phase;
use shared_abi::queue::Queue;
use shared_abi::stats::StatTag;

/// State and counters of a queue, as QMP clients see them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueStatus {
    /// The queue.
    pub queue: Queue,
    /// Its index, as the driver numbers the queues.
    pub index: usize,
    /// Notifications by the driver. Each is a VM exit.
    pub notifications: u64,
    /// Turns of the queue: after one or more notifications, when the queue starts, or after a turn
    /// that exhausted its budget.
    pub wakeups: u64,
    /// Interrupts that were sent to the driver.
    pub interrupts: u64,
    /// Descriptor chains that were taken from the queue.
    pub requests: u64,
}

/// State of the connection, as QMP clients see it.
#[derive(Clone, Debug)]
pub struct VirtioStatus {
    /// Whether a front end is connected.
    pub is_connected: bool,
    /// Whether the driver's queues are running.
    pub is_running: bool,
    /// Whether the front end has shared guest memory.
    pub is_memory_shared: bool,
    /// The features that the device offers.
    pub offered_features: Features,
    /// The features that the driver accepted; `None` before it has accepted any.
    pub negotiated_features: Option<Features>,
    /// The value that the guest fills free pages with, if page poison is negotiated.
    pub poison_val: Option<u32>,
    /// The queues that exist under the negotiated features.
    pub queues: Vec<QueueStatus>,
    /// Reads of configuration space since the front end connected.
    pub config_reads: u64,
    /// Writes of configuration space since the front end connected.
    pub config_writes: u64,
    /// Notifications of configuration changes since the front end connected.
    pub config_changes: u64,
    /// Whether hinted blocks are discarded.
    pub discards_hinted: bool,
    /// Pages that the driver has put into the balloon since the daemon started.
    pub pages_inflated: u64,
    /// Pages that the driver has taken out of the balloon since the daemon started.
    pub pages_deflated: u64,
    /// Bytes that inflation has released to the host.
    pub bytes_released: u64,
    /// Bytes that free page reporting has released to the host.
    pub bytes_reported: u64,
    /// System calls that punched holes in memory files.
    pub punches: u64,
    /// Errors of the guest.
    pub errors: u64,
    /// The last error that was logged.
    pub last_error: Option<String>,
}

/// The memory statistics, as QMP clients see them.
#[derive(Clone, Debug, Default)]
pub struct StatsReport {
    /// The values that the guest reported.
    pub values: Vec<(StatTag, u64)>,
    /// Time of the last update.
    pub updated: Option<SystemTime>,
    /// Changes with every update.
    pub generation: u64,
}

/// Returns the name of a phase in QMP answers and events.
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Stopped => "stopped",
        Phase::Syncing => "syncing",
        Phase::Requested(_) => "requested",
        Phase::Started(_) => "started",
        Phase::Finished(_) => "finished",
        Phase::Done => "done",
    }
}
