// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon: what it shows in configuration space, and what it does with its queues.
//!
//! One [`Device`] lives as long as the program and sees front ends, and drivers in them, come and go. It sits
//! behind one mutex; locks are taken in the order device, queue. Everything that is done under them is
//! bounded, whatever the guest sends.

pub mod complaints;
pub mod hinting;
pub mod lending;
mod operator;
pub mod pages;
mod queues;
pub mod request;
pub mod saved;
pub mod stats;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::json;
use shared_abi::command::CommandId;
use shared_abi::config::{self, Config};
use shared_abi::features::Features;
use shared_abi::hinting::device::Phase;
use shared_abi::queue::Queue;
use shared_abi::stats::Tag;
use tracing::{debug, info, warn};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::events::Events;
use crate::memory::Ram;
use crate::relay::ConfigNotifier;
use crate::signal::Signal;
use crate::vring::{Suppression, Vring};
use complaints::Complaints;
use hinting::{Changes, Hinting};
use lending::{Claim, Trouble};
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
    pub connected: bool,
    /// Whether the guest's driver can use the queues.
    pub running: bool,
    /// What the device offers.
    pub offered: Features,
    /// What the driver accepted; nothing before it did.
    pub negotiated: Option<Features>,
    /// What the guest fills its free pages with, if it says so.
    pub poison: Option<u32>,
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
    pub values: Vec<(Tag, u64)>,
    /// When.
    pub updated: Option<SystemTime>,
    /// Changes with every update.
    pub generation: u64,
}

/// Counters of one queue.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    wakeups: u64,
    requests: u64,
    /// The queue's place in the available ring when it was last looked at: see [`Device::notice_new_driver`].
    seen: Option<u16>,
}

/// What is there only while a front end is.
#[derive(Default)]
struct Connection {
    notifier: Arc<ConfigNotifier>,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    vrings: Vec<Vring>,
    counters: [Counters; Queue::MAX_COUNT],
    config_reads: u64,
    config_writes: u64,
    config_changes: Cell<u64>,
    /// The configuration has changed while the queues were stopped, and the driver was not told.
    untold: Cell<bool>,
    /// The driver was told of a change, and has not read the command id since.
    unread: Cell<bool>,
    /// The driver has accepted features, and no queue was used since.
    starting: bool,
    /// The log says why hinted memory is not discarded.
    discarding_explained: bool,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("offered", &self.offered)
            .field("negotiated", &self.negotiated)
            .field("config", &self.config)
            .field("hinting", &self.hinting)
            .finish_non_exhaustive()
    }
}

/// A memory balloon.
pub struct Device {
    offered: Features,
    suppression: Suppression,
    negotiated: Option<Features>,
    config: Config,
    ram: Ram,
    hinting: Hinting,
    /// There while a migration has hinting.
    claim: Option<Claim>,
    signal: Arc<Signal>,
    stats: Stats,
    complaints: Complaints,
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
    /// A balloon that offers `offered`, with no front end.
    pub fn new(offered: Features, events: Arc<Events>) -> Self {
        Self {
            offered,
            suppression: Suppression::default(),
            negotiated: None,
            config: Config::default(),
            ram: Ram::default(),
            hinting: Hinting::default(),
            claim: None,
            signal: Arc::default(),
            stats: Stats::default(),
            complaints: Complaints::default(),
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
    pub fn offered(&self) -> Features {
        self.offered
    }

    /// Asks drivers to leave out notifications in another way.
    #[must_use]
    pub fn with_suppression(mut self, suppression: Suppression) -> Self {
        self.suppression = suppression;
        self
    }

    /// How drivers are asked to leave out notifications.
    pub fn suppression(&self) -> Suppression {
        self.suppression
    }

    // The front end's side.

    /// A front end has connected; `notifier` is the way to tell it of configuration changes.
    pub fn connected(&mut self, notifier: Arc<ConfigNotifier>) {
        self.connection = Some(Connection {
            notifier,
            ..Connection::default()
        });
        self.events.emit("FRONTEND_CONNECTED", json!({}));
    }

    /// The front end has gone, for this `reason`. With it go the driver, its queues and its memory.
    pub fn disconnected(&mut self, reason: &str) {
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
        let changes = self.hinting.forget_memory();
        self.emit_phase(changes);
        self.connection = None;
        self.negotiated = None;
        self.ram = Ram::default();
        self.stats.reset();
        self.config = Config {
            num_pages: self.config.num_pages,
            ..Config::default()
        };
        self.tell_trouble(Trouble::FrontEnd(reason.into()));
        self.events
            .emit("FRONTEND_DISCONNECTED", json!({ "reason": reason }));
    }

    /// The front end shares this memory.
    pub fn set_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) {
        let mut ram = Ram::new(&memory.memory());
        if !self.ram.same_layout(&ram) {
            info!(
                "guest memory: {} MiB in {} regions",
                ram.bytes() >> 20,
                ram.regions_len()
            );
            if let Some(id) = self.hinting.phase().id() {
                warn!(
                    "hinting round {:#x} ends: the guest's memory has changed",
                    id.number()
                );
            }
            let changes = self.hinting.forget_memory();
            self.pass_on(changes);
            let text = "the front end has changed the layout of guest memory, or its files";
            self.tell_trouble(Trouble::Memory(text.into()));
        } else {
            ram.note_holes(self.ram.hole_notes());
        }
        self.ram = ram;
        if let Some(connection) = &mut self.connection {
            connection.memory = Some(memory);
        }
    }

    /// The driver has accepted these features.
    pub fn set_features(&mut self, bits: u64) {
        let features = Features::from_bits(bits) & self.offered;
        info!("the driver accepted: {features}");
        if self.negotiated.is_some_and(|before| before != features) {
            self.new_driver();
        }
        self.negotiated = Some(features);
        if let Some(connection) = &mut self.connection {
            connection.starting = true;
        }
    }

    /// The front end resets the device.
    pub fn reset(&mut self) {
        self.new_driver();
        self.negotiated = None;
    }

    /// Bytes of configuration space. The space is as long as the features say (R10): the accepted ones, or
    /// before there are any the offered ones.
    ///
    /// A front end that asks for more, as QEMU's generic device does with its fixed size, gets zeros there.
    /// Beyond the longest layout there is nothing: an empty answer.
    pub fn read_config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        self.notice_new_driver();
        let command = config::FREE_PAGE_HINT_CMD_ID as u64;
        let end = u64::from(offset) + u64::from(size);
        if let Some(connection) = &mut self.connection {
            connection.config_reads += 1;
            if u64::from(offset) <= command && command < end && connection.unread.take() {
                self.signal.give();
            }
        }
        self.config.free_page_hint_cmd_id = self.hinting.command().number();
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
        self.notice_new_driver();
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
        config::size_for(self.negotiated.unwrap_or(self.offered))
    }

    /// The queue `index` wants attention. Returns whether it needs more of it than one turn.
    pub fn handle_queue(&mut self, index: usize, vrings: &[Vring]) -> bool {
        if let Some(connection) = &mut self.connection {
            if connection.vrings.is_empty() {
                connection.vrings = vrings.to_vec();
            }
        }
        self.notice_new_driver();
        self.notice_start();
        self.tell_late();
        let features = self.negotiated.unwrap_or_default();
        let (Some(queue), Some(vring)) = (Queue::at(index, features), vrings.get(index)) else {
            debug!("queue {index} was kicked, and does not exist with these features");
            return false;
        };
        self.count(index, |counters| counters.wakeups += 1);
        let Some(memory) = self.connection.as_ref().and_then(|it| it.memory.clone()) else {
            return false;
        };
        let more = self.drain(queue, index, vring, &memory);
        let place = vring.get_ref().get_queue().next_avail();
        self.count(index, |counters| counters.seen = Some(place));
        more
    }

    fn count(&mut self, index: usize, change: impl FnOnce(&mut Counters)) {
        if let Some(counters) = self
            .connection
            .as_mut()
            .and_then(|connection| connection.counters.get_mut(index))
        {
            change(counters);
        }
    }

    /// Whether the driver's queues can be used: it is there, and the guest is not paused.
    fn running(&self) -> bool {
        let inflate = self
            .connection
            .as_ref()
            .and_then(|connection| connection.vrings.first());
        self.negotiated.is_some()
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
    fn notice_new_driver(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let mut moved = false;
        for (counters, vring) in connection.counters.iter_mut().zip(&connection.vrings) {
            let place = vring.get_ref().get_queue().next_avail();
            moved |= counters.seen.is_some_and(|seen| seen != place);
            counters.seen = counters.seen.map(|_| place);
        }
        if moved {
            info!("the guest's driver was started anew");
            self.new_driver();
        }
    }

    /// Whether the memory of hinted blocks is given back to the host (R17).
    pub fn discards_hinted(&self) -> bool {
        self.negotiated
            .is_some_and(|features| features.contains(Features::KEEPS_HINTED_UNTIL_RETURNED))
    }

    /// Says why nothing is discarded, if that was wanted: once for each connection.
    fn explain_discarding(&mut self) {
        let wanted = self.offered.contains(Features::KEEPS_HINTED_UNTIL_RETURNED);
        let refused = wanted && !self.discards_hinted();
        let Some(connection) = &mut self.connection else {
            return;
        };
        if refused && !std::mem::replace(&mut connection.discarding_explained, true) {
            warn!(
                "hinted memory is not discarded: the guest's driver has not promised to keep a hinted block until \
                 its buffer is returned (it did not accept the private feature bit {}), so the block may be in \
                 use again; hints only spare sending",
                Features::KEEPS_HINTED_UNTIL_RETURNED.bit_number()
            );
        }
    }

    /// Notices the first use of a queue after the driver has accepted its features.
    fn notice_start(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        if !std::mem::take(&mut connection.starting) {
            return;
        }
        self.explain_discarding();
        let features: Vec<_> = self.negotiated.unwrap_or_default().names().collect();
        self.events
            .emit("DRIVER_STARTED", json!({ "features": features }));
        if self.hinting.command() != CommandId::Stop {
            // It missed the notice of a command that came while it was not there.
            self.notify();
        }
    }

    /// A driver starts from nothing: what the last one held and promised is no more.
    fn new_driver(&mut self) {
        if let Some(id) = self.hinting.phase().id() {
            warn!(
                "hinting round {:#x} ends: the guest's driver has gone",
                id.number()
            );
        }
        let changes = self.hinting.reset();
        self.pass_on(changes);
        self.stats.reset();
        self.config.poison_val = 0;
    }

    // What the outside is told.

    /// Whether there were queues, and they are stopped: the driver has gone, or the guest is paused.
    fn stopped(&self) -> bool {
        let vrings = self.connection.iter().flat_map(|it| &it.vrings);
        vrings
            .take(1)
            .any(|vring| !vring.get_ref().get_queue().ready())
    }

    /// Tells the driver of a change that it could not be told of when it happened.
    fn tell_late(&self) {
        let untold = self.connection.as_ref().map(|it| it.untold.take());
        if untold == Some(true) {
            self.notify();
        }
    }

    /// Tells the driver that its configuration has changed; later, if it is not there to hear it. QEMU 11.1 crashes
    /// when it starts the queues of a generic vhost-user device that has told it of a change while they were stopped.
    fn notify(&self) {
        if let Some(connection) = &self.connection {
            if self.stopped() {
                connection.untold.set(true);
                return;
            }
            connection.notifier.notify();
            connection.unread.set(true);
            connection
                .config_changes
                .set(connection.config_changes.get() + 1);
        }
    }

    fn pass_on(&self, changes: Changes) {
        if changes.config {
            self.notify();
        }
        self.emit_phase(changes);
    }

    fn emit_phase(&self, changes: Changes) {
        if changes.phase {
            self.signal.give();
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
