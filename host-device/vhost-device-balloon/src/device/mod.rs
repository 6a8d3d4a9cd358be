// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon: what it shows in configuration space, and what it does with its queues.
//!
//! One [`Device`] lives as long as the program and sees front ends, and drivers in them, come and go. It sits
//! behind one mutex; locks are taken in the order device, queue. Everything that is done under them is
//! bounded, whatever the guest sends.

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

/// The longest queue that is offered.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Why an operator's request for the balloon cannot be done.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BalloonError {
    /// The size of guest memory is not known yet.
    #[error(
        "no front end has shared its memory yet: start the VMM with this device's socket first"
    )]
    NoMemory,
    /// A guest without memory is not a target.
    #[error("the target must be a size in bytes, larger than 0")]
    ZeroTarget,
    /// The interface counts pages in 32 bits.
    #[error("the balloon cannot hold {0} pages: 2^32 - 1 of 4 KiB are the most")]
    TooLarge(u64),
}

/// What an operator sees of a queue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueStatus {
    /// Which queue.
    pub queue: Queue,
    /// Its index, with the features that the driver accepted.
    pub index: usize,
    /// Notifications that the driver made: each an exit of the guest.
    pub notifications: u64,
    /// How often the device turned to the queue: after one or more notifications, or when the queue started.
    pub wakeups: u64,
    /// Interrupts that the driver was given.
    pub interrupts: u64,
    /// How many chains were taken from it.
    pub requests: u64,
}

/// What an operator sees of the connection.
#[derive(Clone, Debug)]
pub struct VirtioStatus {
    /// Whether a front end is connected.
    pub is_connected: bool,
    /// Whether the guest's driver can use the queues.
    pub is_running: bool,
    /// What the device offers.
    pub offered_features: Features,
    /// What the driver accepted; nothing before it did.
    pub negotiated_features: Option<Features>,
    /// What the guest fills its free pages with, if it says so.
    pub poison_val: Option<u32>,
    /// The queues that exist.
    pub queues: Vec<QueueStatus>,
    /// How often configuration space was read since the front end connected.
    pub config_reads: u64,
    /// How often it was written.
    pub config_writes: u64,
    /// How often the front end was told that it has changed.
    pub config_changes: u64,
    /// Whether the memory of hinted blocks is given back to the host.
    pub discards_hinted: bool,
    /// Pages that the driver put into the balloon and took out of it.
    pub pages_inflated: u64,
    /// See `pages_inflated`.
    pub pages_deflated: u64,
    /// Bytes that inflating has given back to the host.
    pub bytes_released: u64,
    /// Bytes that free page reporting has given back to the host.
    pub bytes_reported: u64,
    /// The guest's mistakes.
    pub errors: u64,
    /// The last of them that was logged.
    pub last_error: Option<String>,
}

/// The statistics as an operator sees them.
#[derive(Clone, Debug, Default)]
pub struct StatsReport {
    /// The values that the guest gave.
    pub values: Vec<(StatTag, u64)>,
    /// When.
    pub updated: Option<SystemTime>,
    /// Changes with every update.
    pub generation: u64,
}

/// Counters of one queue.
#[derive(Clone, Copy, Debug, Default)]
struct QueueCounters {
    wakeups: u64,
    requests: u64,
    /// The queue's place in the available ring when it was last looked at: see [`Device::detect_driver_restart`].
    last_avail_idx: Option<u16>,
}

/// What is there only while a front end is.
#[derive(Default)]
struct Connection {
    notifier: Arc<ConfigNotifier>,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    vrings: Vec<Vring>,
    counters: [QueueCounters; Queue::MAX_COUNT],
    config_reads: u64,
    config_writes: u64,
    config_changes: Cell<u64>,
    /// The configuration has changed while the queues were stopped, and the driver was not told.
    config_change_pending: Cell<bool>,
    /// The driver was told of a change, and has not read the command id since.
    cmd_id_unread: Cell<bool>,
    /// The driver has accepted features, and no queue was used since.
    driver_starting: bool,
    /// The log says why hinted memory is not discarded.
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

/// A memory balloon.
pub struct Device {
    offered_features: Features,
    suppression: NotificationSuppression,
    negotiated_features: Option<Features>,
    config: ConfigSpace,
    ram: Ram,
    hinting: Hinting,
    /// There while a migration has hinting.
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
    /// Where requests are read into, kept for its space.
    buffer: Vec<u8>,
}

impl Device {
    /// A balloon that offers `offered_features`, with no front end.
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

    /// What the device offers.
    pub fn offered_features(&self) -> Features {
        self.offered_features
    }

    /// Asks drivers to leave out notifications in another way.
    #[must_use]
    pub fn with_suppression(mut self, suppression: NotificationSuppression) -> Self {
        self.suppression = suppression;
        self
    }

    /// How drivers are asked to leave out notifications.
    pub fn suppression(&self) -> NotificationSuppression {
        self.suppression
    }

    // The front end's side.

    /// A front end has connected; `notifier` is the way to tell it of configuration changes.
    pub fn front_end_connected(&mut self, notifier: Arc<ConfigNotifier>) {
        self.connection = Some(Connection {
            notifier,
            ..Connection::default()
        });
        self.events.emit("FRONTEND_CONNECTED", json!({}));
    }

    /// The front end has gone, for this `reason`. With it go the driver, its queues and its memory.
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

    /// The front end shares this memory.
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

    /// The driver has accepted these features.
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

    /// The front end resets the device.
    pub fn reset(&mut self) {
        self.reset_driver_state();
        self.negotiated_features = None;
    }

    /// Bytes of configuration space. The space is as long as the features say (R10): the accepted ones, or
    /// before there are any the offered ones.
    ///
    /// A front end that asks for more, as QEMU's generic device does with its fixed size, gets zeros there.
    /// Beyond the longest layout there is nothing: an empty answer.
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

    /// The front end writes configuration space: the driver's fields of it count, as far as they exist.
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

    /// The queue `index` wants attention. Returns whether it needs more of it than one turn.
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

    /// Whether the driver's queues can be used: it is there, and the guest is not paused.
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

    /// Finds out whether another driver has taken over since the queues were last looked at.
    ///
    /// The front end does not say: a reset of the device, and a guest that was paused and goes on, are both
    /// queues that stop and start again. But after a reset the queues start from the beginning, and after a
    /// pause they go on where they were.
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

    /// Whether the memory of hinted blocks is given back to the host (R17).
    pub fn discards_hinted(&self) -> bool {
        self.negotiated_features
            .is_some_and(|features| features.contains(Features::KEEPS_HINTED_UNTIL_RETURNED))
    }

    /// Says why nothing is discarded, if that was wanted: once for each connection.
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

    /// Notices the first use of a queue after the driver has accepted its features.
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
            // It missed the notice of a command that came while it was not there.
            self.notify_config_change();
        }
    }

    /// A driver starts from nothing: what the last one held and promised is no more.
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

    // What the outside is told.

    /// Whether there were queues, and they are stopped: the driver has gone, or the guest is paused.
    fn are_queues_stopped(&self) -> bool {
        let vrings = self.connection.iter().flat_map(|it| &it.vrings);
        vrings
            .take(1)
            .any(|vring| !vring.get_ref().get_queue().ready())
    }

    /// Tells the driver of a change that it could not be told of when it happened.
    fn send_pending_config_change(&self) {
        let config_change_pending = self
            .connection
            .as_ref()
            .map(|it| it.config_change_pending.take());
        if config_change_pending == Some(true) {
            self.notify_config_change();
        }
    }

    /// Tells the driver that its configuration has changed; later, if it is not there to hear it. QEMU 11.1 crashes
    /// when it starts the queues of a generic vhost-user device that has told it of a change while they were stopped.
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

/// The name of a phase in answers and events.
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
