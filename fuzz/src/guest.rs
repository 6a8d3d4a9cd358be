// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that consists of memory and virtqueues, and what fuzz targets have in common: features, locks, memory files.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_device_balloon::device::hinting::hinted_ranges;
use vhost_device_balloon::device::{Device, NotifyConfigChange, MAX_QUEUE_SIZE};
use vhost_device_balloon::events::Events;
use vhost_device_balloon::memory::Ram;
use vhost_device_balloon::vring::Vring;
use vhost_user_backend::VringT;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap,
};

pub const PAGE: u64 = 4096;
/// Start of guest memory: an irregular address, as in user-mode Linux.
pub const START: u64 = 0x3e_f000;
/// Length of the first region, with the queues and the pages that the guest does not use.
pub const LENGTH: u64 = 0x2_0000;
/// Start of the second region, after a hole.
pub const SECOND: u64 = 0x100_0000;
/// Length of the second region.
pub const SECOND_LENGTH: u64 = 0x8000;
/// The first address that the driver does not use.
pub const FREE: u64 = START + 0x1_0000;
/// The data of honest requests.
pub const SCRATCH: u64 = START + 0xf000;
/// Distance of the parts of a queue: descriptor table, available ring, used ring.
const PART: u64 = 0x1000;

/// The most turns of a queue after one kick. A turn does 1024 units of work. A request has at most 65536 page frame numbers,
/// each of which is in at most three parts inside or outside guest memory, and each part is a unit.
const MAX_TURNS: usize = MAX_QUEUE_SIZE as usize * (3 * 65536 / 1024 + 2);

/// Flag of a descriptor: another one follows.
pub const NEXT: u16 = 1;
/// Flag of a descriptor: the device writes to the segment.
pub const WRITE: u16 = 2;

/// All features that need no other option.
pub const ALL: Features = Features::MUST_TELL_HOST
    .union(Features::STATS_VQ)
    .union(Features::DEFLATE_ON_OOM)
    .union(Features::FREE_PAGE_HINT)
    .union(Features::PAGE_POISON)
    .union(Features::REPORTING)
    .union(Features::KEEPS_HINTED_UNTIL_RETURNED);

/// A set of features from one byte: bits 0 to 5, and the private bit 63.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct FeatureByte(u8);

impl FeatureByte {
    pub fn features(self) -> Features {
        let bits = u64::from(self.0 & 0x3f) | u64::from(self.0 >> 6 & 1) << 63;
        Features::from_bits(bits)
    }
}

/// Creates a device. It does not search other processes for devices that pin memory: what they do is no input.
pub fn device(offered: Features, events: Arc<Events>) -> Device {
    Device::new(offered, events).without_pin_search()
}

/// Decodes elements until the input ends, at most `most`. There are no bytes between them, so a mutation that inserts or
/// removes some changes few elements.
pub fn rest_of<'a, T: Arbitrary<'a>>(input: &mut Unstructured<'a>, most: usize) -> Vec<T> {
    let mut elements = Vec::new();
    while elements.len() < most && !input.is_empty() {
        let Ok(element) = T::arbitrary(input) else {
            break;
        };
        elements.push(element);
    }
    elements
}

/// Ignores the result of an operation that may fail.
pub fn ignore<T>(_: T) {}

/// Creates a memory file of `length` bytes.
pub fn memory_file(length: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memory file"));
    ftruncate(&file, length).expect("a memory file of this length");
    file
}

/// Creates guest memory in one file. The second region is first in the file.
pub fn memory() -> GuestMemoryMmap {
    let file = memory_file(SECOND_LENGTH + LENGTH);
    let second = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
    let first = FileOffset::new(file, SECOND_LENGTH);
    GuestMemoryMmap::from_ranges_with_files([
        (GuestAddress(START), LENGTH as usize, Some(first)),
        (GuestAddress(SECOND), SECOND_LENGTH as usize, Some(second)),
    ])
    .expect("guest memory")
}

/// Counts the notifications of configuration changes.
#[derive(Debug, Default)]
pub struct Changes(AtomicU64);

impl NotifyConfigChange for Changes {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A virtqueue, as the driver sees it.
#[derive(Clone, Copy, Debug)]
pub struct DriverQueue {
    /// Address of the descriptor table.
    pub base: u64,
    /// Number of entries.
    pub size: u16,
    /// The available index.
    pub added: u16,
}

impl DriverQueue {
    pub fn new(index: usize, size: u16) -> Self {
        Self {
            base: START + index as u64 * 3 * PART,
            size,
            added: 0,
        }
    }

    pub fn available(&self) -> u64 {
        self.base + PART
    }

    pub fn used(&self) -> u64 {
        self.base + 2 * PART
    }

    /// Length of the used ring in bytes, with the event index.
    pub fn used_length(&self) -> u64 {
        6 + 8 * u64::from(self.size)
    }

    /// Writes a descriptor.
    pub fn describe(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        (address, length, flags, next): (u64, u32, u16, u16),
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        write(memory, self.base + 16 * u64::from(index), &bytes);
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.added % self.size);
        write(memory, slot, &head.to_le_bytes());
        self.added = self.added.wrapping_add(1);
        write(memory, self.available() + 2, &self.added.to_le_bytes());
    }

    /// Returns the used index.
    pub fn used_index(&self, memory: &GuestMemoryMmap) -> u16 {
        let index: u16 = memory
            .read_obj(GuestAddress(self.used() + 2))
            .expect("the used ring is in guest memory");
        u16::from_le(index)
    }
}

/// Writes to guest memory, as the guest. Bytes outside guest memory are left out.
pub fn write(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) {
    let _ = memory.write(bytes, GuestAddress(address));
}

/// A device with guest memory, virtqueues and a driver.
pub struct Guest {
    pub device: Device,
    pub memory: GuestMemoryAtomic<GuestMemoryMmap>,
    pub vrings: Vec<Vring>,
    pub queues: Vec<DriverQueue>,
    pub features: Features,
}

impl Guest {
    /// Connects a front end to `device`, and shares guest memory.
    pub fn new(mut device: Device) -> Self {
        device.front_end_connected(Arc::new(Changes::default()));
        let memory = GuestMemoryAtomic::new(memory());
        device
            .set_memory(memory.clone(), Ram::of_front_end(&memory.memory()), None)
            .expect("the memory file is as long as its regions");
        let vrings = (0..Queue::MAX_COUNT)
            .map(|_| Vring::new(memory.clone(), MAX_QUEUE_SIZE).expect("a queue"))
            .collect();
        Self {
            device,
            memory,
            vrings,
            queues: Vec::new(),
            features: Features::NONE,
        }
    }

    /// Starts a driver: negotiates features, and sets up the queues from index 0.
    pub fn start_driver(&mut self, features: Features, size: u16) {
        self.device.set_features(features.bits());
        self.features = features & self.device.offered_features();
        self.queues = (0..Queue::MAX_COUNT)
            .map(|index| DriverQueue::new(index, size))
            .collect();
        for (queue, vring) in self.queues.iter().zip(&self.vrings) {
            write(&self.memory.memory(), queue.base, &[0; 3 * PART as usize]);
            vring.set_queue_ready(false);
            vring.set_queue_size(size);
            vring.set_queue_next_avail(0);
            vring.set_queue_next_used(0);
            vring
                .set_queue_info(queue.base, queue.available(), queue.used())
                .expect("valid addresses");
            vring.set_queue_ready(true);
            vring.set_enabled(true);
        }
    }

    /// Gives a queue turns until it needs none.
    pub fn kick(&mut self, index: usize) {
        for _ in 0..MAX_TURNS {
            let more = self.device.handle_queue(index, &self.vrings);
            self.free_retired();
            if !more {
                return;
            }
        }
        panic!("queue {index} never becomes empty");
    }

    /// Waits until the device has served the request of a queue that has been stopped.
    pub fn finish_request(&mut self, index: usize) {
        for _ in 0..MAX_TURNS {
            let more = self.device.finish_request(index);
            self.free_retired();
            if !more {
                return;
            }
        }
        panic!("the last request of queue {index} never ends");
    }

    /// Frees the memory that the device has retired, as the end of each hold of its lock does.
    pub fn free_retired(&mut self) {
        drop(self.device.take_retired());
    }

    /// Returns the ranges of guest memory that hints have skipped: (start, length).
    pub fn hinted_ranges(&self) -> Vec<(u64, u64)> {
        let bitmap = self.device.hinting_bitmap();
        bitmap.map_or_else(Vec::new, |bitmap| hinted_ranges(&bitmap, 0, usize::MAX))
    }

    /// Sends one chain as an honest driver. Returns how many buffers were used.
    pub fn send(&mut self, queue: Queue, segments: &[(u64, u32, bool)]) -> u16 {
        let Some(index) = queue.index(self.features) else {
            return 0;
        };
        let memory = self.memory.memory();
        let Some(driver) = self.queues.get_mut(index) else {
            return 0;
        };
        for (at, (address, length, writable)) in (0..driver.size).zip(segments) {
            let more = usize::from(at) + 1 < segments.len().min(driver.size.into());
            let flags = if more { NEXT } else { 0 } | if *writable { WRITE } else { 0 };
            driver.describe(&memory, at, (*address, *length, flags, at + 1));
        }
        let before = driver.used_index(&memory);
        driver.offer(&memory, 0);
        let driver = *driver;
        self.kick(index);
        driver.used_index(&memory).wrapping_sub(before)
    }

    /// Sends `bytes` as an honest driver. Returns how many buffers were used.
    pub fn send_bytes(&mut self, queue: Queue, bytes: &[u8]) -> u16 {
        write(&self.memory.memory(), SCRATCH, bytes);
        self.send(queue, &[(SCRATCH, bytes.len() as u32, false)])
    }

    /// Checks that the device serves a new and honest driver on all queues.
    pub fn check_honest_driver(&mut self) {
        self.device.stop_hinting();
        self.device.inhibit_discard(false);
        self.device.reset();
        self.start_driver(ALL, 16);
        for index in 0..Queue::count(self.features) {
            self.kick(index);
        }
        let errors = self.device.virtio_status().errors;
        let before = self.device.virtio_status();
        let pfn = ((FREE / PAGE) as u32).to_le_bytes();
        assert_eq!(self.send_bytes(Queue::Inflate, &pfn), 1);
        assert_eq!(self.send_bytes(Queue::Deflate, &pfn), 1);
        let after = self.device.virtio_status();
        assert_eq!(after.pages_inflated - before.pages_inflated, 1);
        assert_eq!(after.pages_deflated - before.pages_deflated, 1);
        assert_eq!(after.bytes_released - before.bytes_released, PAGE);

        if self.features.contains(Features::STATS_VQ) {
            let stat = [4, 0, 1, 2, 3, 4, 5, 6, 7, 8];
            let generation = self.device.stats().generation;
            assert_eq!(
                self.send_bytes(Queue::Stats, &stat),
                0,
                "the buffer is kept"
            );
            assert_ne!(self.device.stats().generation, generation);
            assert_eq!(self.device.stats().values.len(), 1);
            assert!(self.device.request_stats(), "the buffer is returned");
            assert!(!self.device.request_stats(), "it is returned once");
        }
        let page = [(FREE + PAGE, PAGE as u32, true)];
        if self.features.contains(Features::REPORTING) {
            let before = self.device.virtio_status().bytes_reported;
            assert_eq!(self.send(Queue::Reporting, &page), 1);
            let after = self.device.virtio_status().bytes_reported;
            assert_eq!(after - before, PAGE);
        }
        if self.features.contains(Features::FREE_PAGE_HINT) {
            let id = self.device.start_hinting().expect("a hint round");
            assert_eq!(
                self.send_bytes(Queue::FreePage, &id.number().to_le_bytes()),
                1
            );
            assert_eq!(self.send(Queue::FreePage, &page), 1);
            assert_eq!(self.send_bytes(Queue::FreePage, &0u32.to_le_bytes()), 1);
            let status = self.device.hinting_status();
            assert_eq!((status.blocks, status.pages_cleared), (1, 1));
            assert_eq!(
                self.hinted_ranges(),
                [(FREE + PAGE, PAGE)],
                "the page is clean"
            );
            self.device.finish_hinting();
        }
        assert_eq!(self.device.virtio_status().errors, errors);
    }
}
