// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the device, with a fake guest that consists only of memory and virtqueues.
//!
//! This file contains the fake guest. Each of the other files tests one part of the device.

mod config_space;
mod discard;
mod hinting;
mod hostile;
mod queues;
mod release;
mod saved_state;
mod stats;
mod turns;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use shared_abi::command::HintId;
use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::{Device, MAX_QUEUE_SIZE};
use crate::events::tests::Lines;
use crate::events::Subscription;
use crate::memory::tests::guest;
use crate::memory::Ram;
use crate::relay::ConfigNotifier;
use crate::vring::Vring;

/// Start of guest memory: an irregular address, as in user-mode Linux.
const START: u64 = 0x3e_f000;

const LENGTH: u64 = 0x40_0000;

/// A second region, after a hole.
const SECOND: u64 = 0x100_0000;

const SECOND_LENGTH: u64 = 0x10_0000;

/// The first address that the fake driver does not use.
const FREE: u64 = START + 0x20_0000;

const SIZE: u16 = 16;

const NEXT: u16 = 1;

const WRITE: u16 = 2;

const INDIRECT: u16 = 4;

const ALL: Features = Features::STATS_VQ
    .union(Features::FREE_PAGE_HINT)
    .union(Features::PAGE_POISON)
    .union(Features::REPORTING);

const DISCARD: Features = ALL.union(Features::KEEPS_HINTED_UNTIL_RETURNED);

/// A virtqueue, as the driver sees it.
struct DriverQueue {
    base: u64,
    added: u16,
    seen: u16,
}

impl Device {
    /// Returns the hinted ranges from the address `from`.
    fn hinted_ranges(&self, from: u64, limit: usize) -> Vec<(u64, u64)> {
        let bitmap = self.hinting_bitmap();
        bitmap.map_or_else(Vec::new, |bitmap| {
            crate::device::hinting::hinted_ranges(&bitmap, from, limit)
        })
    }
}

struct Guest {
    device: Device,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    vrings: Vec<Vring>,
    queues: Vec<DriverQueue>,
    features: Features,
    /// The front end's end of the channel for configuration changes.
    changes: UnixStream,
    events: Arc<Lines>,
    _subscription: Subscription,
}

impl Guest {
    fn new(offered: Features, accepted: Features) -> Self {
        Self::with_device(Device::new(offered, Arc::default()), accepted)
    }

    fn with_device(device: Device, accepted: Features) -> Self {
        let memory = guest(&[
            (START, LENGTH, START),
            (SECOND, SECOND_LENGTH, START + LENGTH),
        ]);
        Self::with_memory(device, accepted, memory)
    }

    fn with_memory(mut device: Device, accepted: Features, memory: GuestMemoryMmap) -> Self {
        let lines = Arc::new(Lines::default());
        let subscription = device.events.subscribe(lines.clone());
        let notifier = Arc::new(ConfigNotifier::default());
        let (changes, channel) = UnixStream::pair().unwrap();
        changes.set_nonblocking(true).unwrap();
        notifier.connect(channel.into()).unwrap();
        device.front_end_connected(notifier);

        let memory = GuestMemoryAtomic::new(memory);
        let ram = Ram::of_front_end(&memory.memory());
        device.set_memory(memory.clone(), ram, None).unwrap();
        let vrings = (0..Queue::MAX_COUNT)
            .map(|_| Vring::new(memory.clone(), MAX_QUEUE_SIZE).unwrap())
            .collect();
        let mut guest = Self {
            device,
            memory,
            vrings,
            queues: Vec::new(),
            features: Features::NONE,
            changes,
            events: lines,
            _subscription: subscription,
        };
        guest.start_driver(accepted);
        guest
    }

    /// Starts a driver: negotiates features, and sets up the queues from index 0.
    fn start_driver(&mut self, features: Features) {
        self.features = features;
        self.device.set_features(features.bits());
        self.queues = (0..Queue::MAX_COUNT as u64)
            .map(|index| DriverQueue {
                base: START + index * 0x3000,
                added: 0,
                seen: 0,
            })
            .collect();
        for (queue, vring) in self.queues.iter().zip(&self.vrings) {
            let memory = self.memory.memory();
            memory
                .write_slice(&[0; 0x3000], GuestAddress(queue.base))
                .unwrap();
            vring.set_queue_size(SIZE);
            vring.set_queue_next_avail(0);
            vring.set_queue_next_used(0);
            vring
                .set_queue_info(queue.base, queue.base + 0x1000, queue.base + 0x2000)
                .unwrap();
            vring.set_queue_ready(true);
            vring.set_enabled(true);
        }
        for index in 0..Queue::count(features) {
            self.kick_index(index);
        }
    }

    fn queue(&mut self, queue: Queue) -> (&mut DriverQueue, usize) {
        let index = queue.index(self.features).unwrap();
        (&mut self.queues[index], index)
    }

    fn write_descriptor(
        &self,
        base: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let memory = self.memory.memory();
        let at = base + 16 * u64::from(index);
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain at `head` available.
    fn offer(&mut self, queue: Queue, head: u16) {
        let (driver, _) = self.queue(queue);
        let slot = driver.base + 0x1000 + 4 + 2 * u64::from(driver.added % SIZE);
        driver.added = driver.added.wrapping_add(1);
        let (index, added) = (driver.base + 0x1002, driver.added);
        let memory = self.memory.memory();
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        memory.write_obj(added, GuestAddress(index)).unwrap();
    }

    /// Makes one chain of (address, length, writable) available, from descriptor 0 on.
    fn add(&mut self, queue: Queue, segments: &[(u64, u32, bool)]) {
        let base = self.queue(queue).0.base;
        for (index, (address, length, writable)) in segments.iter().enumerate() {
            let index = index as u16;
            let last = usize::from(index) + 1 == segments.len();
            let flags = if last { 0 } else { NEXT } | if *writable { WRITE } else { 0 };
            self.write_descriptor(base, index, *address, *length, flags, index + 1);
        }
        self.offer(queue, 0);
    }

    fn kick_index(&mut self, index: usize) -> bool {
        let more = self.device.handle_queue(index, &self.vrings);
        // The device's lock does this.
        for interrupt in self.device.take_interrupts() {
            interrupt.send().unwrap();
        }
        more
    }

    fn kick(&mut self, queue: Queue) {
        let (_, index) = self.queue(queue);
        while self.kick_index(index) {}
    }

    /// Returns the number of used buffers since the last call.
    fn returned(&mut self, queue: Queue) -> u16 {
        let (driver, _) = self.queue(queue);
        let (at, seen) = (driver.base + 0x2002, driver.seen);
        let used: u16 = self.memory.memory().read_obj(GuestAddress(at)).unwrap();
        self.queue(queue).0.seen = used;
        used.wrapping_sub(seen)
    }

    /// Sends one chain, and checks that its buffer is used.
    fn send(&mut self, queue: Queue, segments: &[(u64, u32, bool)]) {
        self.add(queue, segments);
        self.kick(queue);
        assert_eq!(self.returned(queue), 1, "{queue:?} {segments:x?}");
    }

    /// Address of the data that the guest sends.
    const SCRATCH: u64 = START + 0x10_0000;

    fn send_bytes(&mut self, queue: Queue, bytes: &[u8]) {
        self.memory
            .memory()
            .write_slice(bytes, GuestAddress(Self::SCRATCH))
            .unwrap();
        self.send(queue, &[(Self::SCRATCH, bytes.len() as u32, false)]);
    }

    fn send_pfns(&mut self, queue: Queue, addresses: &[u64]) {
        let bytes: Vec<u8> = addresses
            .iter()
            .flat_map(|address| ((address >> 12) as u32).to_le_bytes())
            .collect();
        self.send_bytes(queue, &bytes);
    }

    fn send_cmd_id(&mut self, number: u32) {
        self.send_bytes(Queue::FreePage, &number.to_le_bytes());
    }

    fn hint(&mut self, address: u64, length: u32) {
        self.send(Queue::FreePage, &[(address, length, true)]);
    }

    fn config(&mut self) -> ConfigSpace {
        let bytes = self.device.read_config(0, 16);
        ConfigSpace::from_bytes(bytes.try_into().unwrap())
    }

    /// Returns the number of configuration change messages since the last call.
    fn config_changes(&mut self) -> usize {
        let mut messages = [0; 1200];
        let length = self.changes.read(&mut messages).unwrap_or(0);
        assert_eq!(length % 12, 0);
        for message in messages[..length].chunks(12) {
            assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        }
        length / 12
    }

    fn start_hint_round(&mut self) -> HintId {
        let id = self.device.start_hinting().unwrap();
        self.send_cmd_id(id.number());
        id
    }

    fn errors(&self) -> u64 {
        self.device.virtio_status().errors
    }

    fn last_error(&self) -> String {
        self.device.virtio_status().last_error.unwrap_or_default()
    }

    fn byte(&self, address: u64) -> u8 {
        self.memory
            .memory()
            .read_obj(GuestAddress(address))
            .unwrap()
    }
}
