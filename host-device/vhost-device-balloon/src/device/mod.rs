// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon device: configuration space and virtqueues.
//!
//! One [`Device`] lives as long as the program. Front ends connect and disconnect, and drivers start and stop. One
//! mutex protects the device. Locks are taken in the order device, queue. All work under these locks is bounded,
//! whatever the guest sends.

mod control;
pub mod guest_errors;
pub mod hinting;
pub mod migration_claim;
pub mod pfn;
mod queues;
pub mod request;
pub mod saved_state;
pub mod stats;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::json;
use shared_abi::command::CommandId;
use shared_abi::config::{self, ConfigSpace};
use shared_abi::features::Features;
use shared_abi::hinting::device::Phase;
use shared_abi::queue::Queue;
use shared_abi::stats::StatTag;
use tracing::{debug, info, warn};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::event_count::EventCount;
use crate::events::Events;
use crate::memory::Ram;
use crate::relay::ConfigNotifier;
use crate::vring::{NotificationSuppression, Vring};
use guest_errors::GuestErrors;
use hinting::{Hinting, HintingChanges};
use migration_claim::{Invalidated, MigrationClaim};
use stats::Stats;

/// The largest queue size that is offered.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Why a balloon command fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BalloonError {
    /// Guest memory is not known yet.
    #[error(
        "no front end has shared its memory yet: start the VMM with this device's socket first"
    )]
    NoMemory,
    /// The target is 0.
    #[error("the target must be a size in bytes, larger than 0")]
    ZeroTarget,
    /// The balloon would need more pages than 32 bits can count.
    #[error("the balloon cannot hold {0} pages: 2^32 - 1 of 4 KiB are the most")]
    TooLarge(u64),
}

/// State and counters of a queue, as QMP clients see them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueStatus {
    /// The queue.
    pub queue: Queue,
    /// Its index, under the negotiated features.
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

/// Counters of one queue.
#[derive(Clone, Copy, Debug, Default)]
struct QueueCounters {
    wakeups: u64,
    requests: u64,
    /// The next available index when the queue was last checked: see [`Device::detect_driver_restart`].
    last_avail_idx: Option<u16>,
}

/// State that exists only while a front end is connected.
#[derive(Default)]
struct Connection {
    notifier: Arc<ConfigNotifier>,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    vrings: Vec<Vring>,
    counters: [QueueCounters; Queue::MAX_COUNT],
    config_reads: u64,
    config_writes: u64,
    config_changes: Cell<u64>,
    /// Whether the configuration changed while the queues were stopped, and the driver was not notified.
    config_change_pending: Cell<bool>,
    /// Whether the driver was notified of a change and has not read the command id since.
    cmd_id_unread: Cell<bool>,
    /// Whether the driver has accepted features and has not used a queue since.
    driver_starting: bool,
    /// Whether the log already says why hinted blocks are not discarded.
    discard_warning_logged: bool,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("offered", &self.offered_features)
            .field("negotiated", &self.negotiated_features)
            .field("config", &self.config)
            .field("hinting", &self.hinting)
            .finish_non_exhaustive()
    }
}

/// A virtio memory balloon.
pub struct Device {
    offered_features: Features,
    suppression: NotificationSuppression,
    negotiated_features: Option<Features>,
    config: ConfigSpace,
    ram: Ram,
    hinting: Hinting,
    /// The claim of a migration, while it lasts.
    claim: Option<MigrationClaim>,
    hinting_events: Arc<EventCount>,
    stats: Stats,
    guest_errors: GuestErrors,
    events: Arc<Events>,
    connection: Option<Connection>,
    pages_inflated: u64,
    pages_deflated: u64,
    bytes_released: u64,
    bytes_reported: u64,
    /// Buffer that requests are read into. Kept to reuse its allocation.
    buffer: Vec<u8>,
}

impl Device {
    /// Creates a balloon that offers `offered_features`, with no front end connected.
    pub fn new(offered_features: Features, events: Arc<Events>) -> Self {
        Self {
            offered_features,
            suppression: NotificationSuppression::default(),
            negotiated_features: None,
            config: ConfigSpace::default(),
            ram: Ram::default(),
            hinting: Hinting::default(),
            claim: None,
            hinting_events: Arc::default(),
            stats: Stats::default(),
            guest_errors: GuestErrors::default(),
            events,
            connection: None,
            pages_inflated: 0,
            pages_deflated: 0,
            bytes_released: 0,
            bytes_reported: 0,
            buffer: Vec::new(),
        }
    }

    /// Returns the features that the device offers.
    pub fn offered_features(&self) -> Features {
        self.offered_features
    }

    /// Sets how drivers are asked to leave out notifications.
    #[must_use]
    pub fn with_suppression(mut self, suppression: NotificationSuppression) -> Self {
        self.suppression = suppression;
        self
    }

    /// Returns how drivers are asked to leave out notifications.
    pub fn suppression(&self) -> NotificationSuppression {
        self.suppression
    }

    // Requests of the front end.

    /// Handles the connection of a front end. `notifier` reports configuration changes to it.
    pub fn front_end_connected(&mut self, notifier: Arc<ConfigNotifier>) {
        self.connection = Some(Connection {
            notifier,
            ..Connection::default()
        });
        self.events.emit("FRONTEND_CONNECTED", json!({}));
    }

    /// Handles the disconnection of the front end, for this `reason`. Drops the state of the driver, the
    /// queues and guest memory.
    pub fn front_end_disconnected(&mut self, reason: &str) {
        if let Some(id) = self.hinting.phase().id() {
            let status = self.hinting.status();
            warn!(
                "hinting round {:#x} ends after {} blocks: {reason}",
                id.number(),
                status.blocks
            );
        }
        let changes = self.hinting.reset();
        self.emit_phase(changes);
        let changes = self.hinting.handle_memory_change();
        self.emit_phase(changes);
        self.connection = None;
        self.negotiated_features = None;
        self.ram = Ram::default();
        self.stats.reset();
        self.config = ConfigSpace {
            num_pages: self.config.num_pages,
            ..ConfigSpace::default()
        };
        self.invalidate_claim(Invalidated::FrontEndDisconnected(reason.into()));
        self.events
            .emit("FRONTEND_DISCONNECTED", json!({ "reason": reason }));
    }

    /// Handles the guest memory that the front end shares. A changed layout ends the hint round and
    /// invalidates a migration's claim.
    pub fn set_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) {
        let mut ram = Ram::new(&memory.memory());
        if !self.ram.has_same_layout(&ram) {
            info!(
                "guest memory: {} MiB in {} regions",
                ram.size() >> 20,
                ram.num_regions()
            );
            if let Some(id) = self.hinting.phase().id() {
                warn!(
                    "hinting round {:#x} ends: the guest's memory has changed",
                    id.number()
                );
            }
            let changes = self.hinting.handle_memory_change();
            self.publish_changes(changes);
            let text = "the front end has changed the layout of guest memory, or its files";
            self.invalidate_claim(Invalidated::MemoryChanged(text.into()));
        } else {
            ram.set_hole_recorder(self.ram.hole_recorder());
        }
        self.ram = ram;
        if let Some(connection) = &mut self.connection {
            connection.memory = Some(memory);
        }
    }

    /// Handles the features that the driver accepted. Features that differ from the last ones are those
    /// of a new driver.
    pub fn set_features(&mut self, bits: u64) {
        let features = Features::from_bits(bits) & self.offered_features;
        info!("the driver accepted: {features}");
        if self
            .negotiated_features
            .is_some_and(|before| before != features)
        {
            self.reset_driver_state();
        }
        self.negotiated_features = Some(features);
        if let Some(connection) = &mut self.connection {
            connection.driver_starting = true;
        }
    }

    /// Handles a device reset by the front end.
    pub fn reset(&mut self) {
        self.reset_driver_state();
        self.negotiated_features = None;
    }

    /// Reads configuration space. Its size depends on the negotiated features (R10), or on the
    /// offered ones before negotiation.
    ///
    /// A front end may read more, as QEMU's generic device does with its fixed size. The absent fields read as zeros.
    /// A read beyond the longest layout returns nothing.
    pub fn read_config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        self.detect_driver_restart();
        let cmd_id_offset = config::FREE_PAGE_HINT_CMD_ID as u64;
        let end = u64::from(offset) + u64::from(size);
        if let Some(connection) = &mut self.connection {
            connection.config_reads += 1;
            if u64::from(offset) <= cmd_id_offset
                && cmd_id_offset < end
                && connection.cmd_id_unread.take()
            {
                self.hinting_events.notify_all();
            }
        }
        self.config.free_page_hint_cmd_id = self.hinting.cmd_id().number();
        let mut bytes = self.config.to_bytes();
        if let Some(absent) = bytes.get_mut(self.config_size()..) {
            absent.fill(0);
        }
        let range = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(size).ok())
            .and_then(|(offset, size)| Some(offset..offset.checked_add(size)?));
        range
            .and_then(|range| bytes.get(range))
            .map_or_else(Vec::new, <[u8]>::to_vec)
    }

    /// Writes configuration space. Only the driver's fields change, and only those that exist
    /// under the negotiated features.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.detect_driver_restart();
        if let Some(connection) = &mut self.connection {
            connection.config_writes += 1;
        }
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let before = self.config;
        let fits = self.config_size().saturating_sub(offset);
        let data = data.get(..fits).unwrap_or(data);
        self.config = self.config.with_driver_write(offset, data);
        if self.config.poison_val != before.poison_val {
            debug!(
                "the guest poisons its free pages with {:#x}",
                self.config.poison_val
            );
        }
        if self.config.actual != before.actual {
            let actual = self.actual_bytes();
            self.events
                .emit("BALLOON_CHANGE", json!({ "actual": actual }));
        }
    }

    fn config_size(&self) -> usize {
        config::size_for(self.negotiated_features.unwrap_or(self.offered_features))
    }

    /// Gives the queue `index` a turn. Returns whether the queue needs another one.
    pub fn handle_queue(&mut self, index: usize, vrings: &[Vring]) -> bool {
        if let Some(connection) = &mut self.connection {
            if connection.vrings.is_empty() {
                connection.vrings = vrings.to_vec();
            }
        }
        self.detect_driver_restart();
        self.handle_driver_start();
        self.send_pending_config_change();
        let features = self.negotiated_features.unwrap_or_default();
        let (Some(queue), Some(vring)) = (Queue::from_index(index, features), vrings.get(index))
        else {
            debug!("queue {index} was kicked, and does not exist with these features");
            return false;
        };
        self.update_counters(index, |counters| counters.wakeups += 1);
        let Some(memory) = self.connection.as_ref().and_then(|it| it.memory.clone()) else {
            return false;
        };
        let more = self.drain(queue, index, vring, &memory);
        let avail_idx = vring.get_ref().get_queue().next_avail();
        self.update_counters(index, |counters| counters.last_avail_idx = Some(avail_idx));
        more
    }

    fn update_counters(&mut self, index: usize, change: impl FnOnce(&mut QueueCounters)) {
        if let Some(counters) = self
            .connection
            .as_mut()
            .and_then(|connection| connection.counters.get_mut(index))
        {
            change(counters);
        }
    }

    /// Returns whether the driver's queues are running: a driver is started, and the guest is not paused.
    fn is_running(&self) -> bool {
        let inflate = self
            .connection
            .as_ref()
            .and_then(|connection| connection.vrings.first());
        self.negotiated_features.is_some()
            && inflate.is_some_and(|vring| {
                let vring = vring.get_ref();
                vring.is_enabled() && vring.get_queue().ready()
            })
    }

    /// Detects whether another driver has taken over since the queues were last checked. If so, resets the state
    /// of the previous driver.
    ///
    /// The front end does not tell a device reset from a paused guest: in both cases the queues stop and start again.
    /// After a reset, the queues start from the beginning. After a pause, they continue at their last index.
    fn detect_driver_restart(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let mut restarted = false;
        for (counters, vring) in connection.counters.iter_mut().zip(&connection.vrings) {
            let avail_idx = vring.get_ref().get_queue().next_avail();
            restarted |= counters
                .last_avail_idx
                .is_some_and(|last_avail_idx| last_avail_idx != avail_idx);
            counters.last_avail_idx = counters.last_avail_idx.map(|_| avail_idx);
        }
        if restarted {
            info!("the guest's driver was started anew");
            self.reset_driver_state();
        }
    }

    /// Returns whether hinted blocks are discarded (R17).
    pub fn discards_hinted(&self) -> bool {
        self.negotiated_features
            .is_some_and(|features| features.contains(Features::KEEPS_HINTED_UNTIL_RETURNED))
    }

    /// Logs, once for each connection, why hinted blocks are not discarded although that was requested.
    fn warn_discard_not_negotiated(&mut self) {
        let wanted = self
            .offered_features
            .contains(Features::KEEPS_HINTED_UNTIL_RETURNED);
        let refused = wanted && !self.discards_hinted();
        let Some(connection) = &mut self.connection else {
            return;
        };
        if refused && !std::mem::replace(&mut connection.discard_warning_logged, true) {
            warn!(
                "hinted memory is not discarded: the guest's driver has not promised to keep a hinted block until \
                 its buffer is returned (it did not accept the private feature bit {}), so the block may be in \
                 use again; hints only spare sending",
                Features::KEEPS_HINTED_UNTIL_RETURNED.bit_number()
            );
        }
    }

    /// Handles the first use of a queue after the driver has accepted its features.
    fn handle_driver_start(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        if !std::mem::take(&mut connection.driver_starting) {
            return;
        }
        self.warn_discard_not_negotiated();
        let features: Vec<_> = self
            .negotiated_features
            .unwrap_or_default()
            .names()
            .collect();
        self.events
            .emit("DRIVER_STARTED", json!({ "features": features }));
        if self.hinting.cmd_id() != CommandId::Stop {
            // The driver was not running when the command id changed, and missed the notification.
            self.notify_config_change();
        }
    }

    /// Resets the state of the previous driver: its hint round, its statistics buffer and its poison value.
    fn reset_driver_state(&mut self) {
        if let Some(id) = self.hinting.phase().id() {
            warn!(
                "hinting round {:#x} ends: the guest's driver has gone",
                id.number()
            );
        }
        let changes = self.hinting.reset();
        self.publish_changes(changes);
        self.stats.reset();
        self.config.poison_val = 0;
    }

    // Notifications of the driver and of QMP clients.

    /// Returns whether queues exist and are stopped: no driver runs, or the guest is paused.
    fn are_queues_stopped(&self) -> bool {
        let vrings = self.connection.iter().flat_map(|it| &it.vrings);
        vrings
            .take(1)
            .any(|vring| !vring.get_ref().get_queue().ready())
    }

    /// Notifies the driver of a change that happened while the queues were stopped.
    fn send_pending_config_change(&self) {
        let config_change_pending = self
            .connection
            .as_ref()
            .map(|it| it.config_change_pending.take());
        if config_change_pending == Some(true) {
            self.notify_config_change();
        }
    }

    /// Notifies the driver that its configuration has changed. Defers the notification while the queues are
    /// stopped. QEMU 11.1 crashes when it starts the queues of a generic vhost-user device that sent a notification
    /// while they were stopped.
    fn notify_config_change(&self) {
        if let Some(connection) = &self.connection {
            if self.are_queues_stopped() {
                connection.config_change_pending.set(true);
                return;
            }
            connection.notifier.notify();
            connection.cmd_id_unread.set(true);
            connection
                .config_changes
                .set(connection.config_changes.get() + 1);
        }
    }

    fn publish_changes(&self, changes: HintingChanges) {
        if changes.config {
            self.notify_config_change();
        }
        self.emit_phase(changes);
    }

    fn emit_phase(&self, changes: HintingChanges) {
        if changes.phase {
            self.hinting_events.notify_all();
            let mut data = json!({ "status": phase_name(self.hinting.phase()) });
            if let (Some(id), Some(data)) = (self.hinting.phase().id(), data.as_object_mut()) {
                data.insert("id".into(), id.number().into());
            }
            self.events.emit("FREE_PAGE_HINT", data);
        }
    }
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
