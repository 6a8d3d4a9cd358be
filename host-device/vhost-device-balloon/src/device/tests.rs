// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the device, with a fake guest that consists only of memory and virtqueues.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{sync_channel, Receiver};

use proptest::prelude::*;
use rustix::event::{eventfd, EventfdFlags};
use shared_abi::command::HintId;
use shared_abi::stats::Stat;
use vm_memory::{Bytes, GuestAddress};

use super::hinting::HintingError;
use super::*;
use crate::events::Subscription;
use crate::memory::tests::guest;

/// Start of guest memory: an irregular address, as in user-mode Linux.
const START: u64 = 0x3e_f000;
const LENGTH: u64 = 0x40_0000;
/// A second region, after a hole.
const SECOND: u64 = 0x100_0000;
const SECOND_LENGTH: u64 = 0x10_0000;

const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const ALL: Features = Features::STATS_VQ
    .union(Features::FREE_PAGE_HINT)
    .union(Features::PAGE_POISON)
    .union(Features::REPORTING);

/// A virtqueue, as the driver sees it.
struct DriverQueue {
    base: u64,
    added: u16,
    seen: u16,
}

struct Guest {
    device: Device,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    vrings: Vec<Vring>,
    queues: Vec<DriverQueue>,
    features: Features,
    /// The front end's end of the channel for configuration changes.
    changes: UnixStream,
    events: Receiver<String>,
    _subscription: Subscription,
}

impl Guest {
    fn new(offered: Features, accepted: Features) -> Self {
        Self::with_device(Device::new(offered, Arc::default()), accepted)
    }

    fn with_device(mut device: Device, accepted: Features) -> Self {
        let (lines, received) = sync_channel(1000);
        let subscription = device.events.subscribe(lines);
        let notifier = Arc::new(ConfigNotifier::default());
        let (changes, channel) = UnixStream::pair().unwrap();
        changes.set_nonblocking(true).unwrap();
        notifier.connect(channel.into()).unwrap();
        device.front_end_connected(notifier);

        let memory = guest(&[
            (START, LENGTH, START),
            (SECOND, SECOND_LENGTH, START + LENGTH),
        ]);
        let memory = GuestMemoryAtomic::new(memory);
        device.set_memory(memory.clone());
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
            events: received,
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
        self.device.handle_queue(index, &self.vrings)
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

#[test]
fn a_driver_whose_queues_are_stopped_is_told_of_a_change_when_they_start_again() {
    let mut guest = Guest::new(Features::NONE, Features::NONE);
    guest.vrings[0].set_queue_ready(false);
    guest.device.set_target(LENGTH).unwrap();
    assert_eq!(guest.config_changes(), 0);
    guest.vrings[0].set_queue_ready(true);
    guest.kick_index(0);
    assert_eq!(guest.config_changes(), 1);
    guest.kick_index(0);
    assert_eq!(guest.config_changes(), 0);
}

/// The first address that the fake driver does not use.
const FREE: u64 = START + 0x20_0000;

#[test]
fn inflate_gives_memory_back_to_the_host() {
    let mut guest = Guest::new(Features::NONE, Features::NONE);
    let before = guest.device.ram().allocated().unwrap().total;
    guest.device.set_target(LENGTH).unwrap();
    assert_eq!(guest.config_changes(), 1);
    assert_eq!(u64::from(guest.config().num_pages), SECOND_LENGTH >> 12);

    guest.send_pfns(
        Queue::Inflate,
        &[FREE, FREE + 0x2000, FREE + 0x1000, SECOND, FREE],
    );
    assert_eq!(
        before - guest.device.ram().allocated().unwrap().total,
        4 * 0x1000
    );
    assert_eq!(
        (guest.byte(FREE + 0x2fff), guest.byte(FREE + 0x3000)),
        (0, 0x5a)
    );
    assert_eq!((guest.byte(SECOND), guest.byte(SECOND + 0x1000)), (0, 0x5a));

    guest.send_pfns(Queue::Deflate, &[FREE, SECOND]);
    let status = guest.device.virtio_status();
    assert_eq!(
        (status.pages_inflated, status.pages_deflated, status.errors),
        (5, 2, 0)
    );

    guest.device.write_config(4, &4u32.to_le_bytes());
    assert_eq!(
        guest.device.actual_size(),
        Ok(LENGTH + SECOND_LENGTH - 0x4000)
    );
    let events: Vec<_> = guest.events.try_iter().collect();
    assert!(
        events.iter().any(|line| line.contains("BALLOON_CHANGE")),
        "{events:?}"
    );
}

#[test]
fn inflating_what_is_not_guest_memory_is_an_error_that_names_it() {
    let mut guest = Guest::new(Features::NONE, Features::NONE);
    guest.send_pfns(
        Queue::Inflate,
        &[0, FREE, START + LENGTH, 0xffff_ffff << 12],
    );
    assert_eq!(guest.errors(), 1);
    assert!(
        guest.last_error().contains("inflate queue"),
        "{}",
        guest.last_error()
    );
    assert!(guest.last_error().contains("0x0"), "{}", guest.last_error());
    assert_eq!(
        (guest.byte(FREE), guest.byte(START + LENGTH - 1)),
        (0, 0x5a)
    );
}

#[test]
fn a_whole_hint_round_clears_the_hinted_pages() {
    let mut guest = Guest::new(ALL, ALL);
    let id = guest.device.start_hinting().unwrap();
    assert_eq!(guest.config_changes(), 1);
    assert_eq!(guest.config().free_page_hint_cmd_id, id.number());
    assert_eq!(guest.device.hinting_status().phase, Phase::Requested(id));

    guest.send_cmd_id(id.number());
    assert_eq!(guest.device.hinting_status().phase, Phase::Started(id));
    guest.hint(FREE, 0x10_0000);
    guest.hint(SECOND, 0x8000);
    guest.send_cmd_id(0);

    let status = guest.device.hinting_status();
    // The bitmap covers the whole file, including the part that the guest does not map.
    let total = (START + LENGTH + SECOND_LENGTH) >> 12;
    assert_eq!(status.phase, Phase::Finished(id));
    assert_eq!(
        (status.blocks, status.bytes, status.pages_cleared),
        (2, 0x10_8000, 0x108)
    );
    assert_eq!(
        (status.pages_total, status.pages_dirty),
        (total, total - 0x108)
    );
    assert_eq!((status.ignored_blocks, status.stale_commands), (0, 0));
    assert_eq!(
        guest.device.hinted_ranges(0, usize::MAX),
        [(FREE, 0x10_0000), (SECOND, 0x8000)]
    );
    assert_eq!(guest.device.hinted_ranges(0, 1), [(FREE, 0x10_0000)]);
    assert_eq!(
        guest.device.hinted_ranges(FREE + 0x10_0000, 9),
        [(SECOND, 0x8000)]
    );
    // The duration is constant after the driver's STOP.
    assert_eq!(guest.device.hinting_status().duration, status.duration);

    guest.device.finish_hinting();
    assert_eq!(guest.config().free_page_hint_cmd_id, 1);
    assert_eq!(guest.config_changes(), 1);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn r1_an_empty_queue_ends_the_drain() {
    let mut guest = Guest::new(ALL, ALL);
    for queue in Queue::ALL {
        let (_, index) = guest.queue(queue);
        for _ in 0..3 {
            assert!(
                !guest.kick_index(index),
                "{queue:?} wants another turn with nothing in it"
            );
        }
        assert_eq!(guest.returned(queue), 0);
    }
    let status = guest.device.virtio_status();
    assert!(status
        .queues
        .iter()
        .all(|queue| queue.wakeups == 4 && queue.requests == 0));
}

/// Sets the kick and call descriptors of `queue`, and returns the front end's copies.
fn event_fds(guest: &mut Guest, queue: Queue) -> (File, File) {
    let (_, index) = guest.queue(queue);
    let event = || File::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let (kick, call) = (event(), event());
    guest.vrings[index].set_kick(Some(kick.try_clone().unwrap()));
    guest.vrings[index].set_call(Some(call.try_clone().unwrap()));
    (kick, call)
}

/// Returns the counter of an event descriptor.
fn events(mut fd: &File) -> u64 {
    let mut sum = [0; 8];
    fd.read(&mut sum).map_or(0, |_| u64::from_ne_bytes(sum))
}

#[test]
fn each_notification_counts_even_if_one_drain_handles_several() {
    let mut guest = Guest::new(ALL, ALL);
    let (mut kick, _call) = event_fds(&mut guest, Queue::Inflate);
    for _ in 0..3 {
        kick.write_all(&1u64.to_ne_bytes()).unwrap();
    }
    assert!(guest.vrings[0].read_kick().unwrap());
    guest.kick_index(0);
    let status = guest.device.virtio_status();
    // The start of the queue is the other wakeup.
    assert_eq!(
        (status.queues[0].notifications, status.queues[0].wakeups),
        (3, 2)
    );
    assert_eq!(status.queues[1].notifications, 0);
}

#[test]
fn an_interrupt_counts_and_is_spared_a_driver_that_wants_none() {
    let mut guest = Guest::new(ALL, ALL);
    let (_kick, call) = event_fds(&mut guest, Queue::Inflate);
    let interrupts = |guest: &Guest| guest.device.virtio_status().queues[0].interrupts;
    guest.send_pfns(Queue::Inflate, &[FREE]);
    assert_eq!((interrupts(&guest), events(&call)), (1, 1));
    let flags = GuestAddress(guest.queue(Queue::Inflate).0.base + 0x1000);
    let memory = guest.memory.memory();
    memory.write_obj(1u16, flags).unwrap();
    guest.send_pfns(Queue::Inflate, &[FREE]);
    assert_eq!(interrupts(&guest), 1);
    assert_eq!(events(&call), 0, "a call that the driver did not want");
    // With event index, the used event decides, and the flag has no meaning.
    guest.vrings[0].set_queue_event_idx(true);
    let used: u16 = memory
        .read_obj(GuestAddress(guest.queue(Queue::Inflate).0.base + 0x2002))
        .unwrap();
    let event = GuestAddress(flags.0 + 4 + 2 * u64::from(SIZE));
    memory.write_obj(used, event).unwrap();
    guest.send_pfns(Queue::Inflate, &[FREE]);
    assert_eq!((interrupts(&guest), events(&call)), (2, 1));
}

#[test]
fn notifications_that_cannot_be_read_are_a_failure_of_the_queue() {
    let guest = Guest::new(ALL, ALL);
    let (reader, writer) = std::io::pipe().unwrap();
    let vring = &guest.vrings[0];
    vring.set_kick(Some(File::from(OwnedFd::from(reader))));
    drop(writer);
    assert_eq!(vring.failure(), None);
    assert!(vring.read_kick().unwrap(), "the device is to look at it");
    assert!(vring.failure().is_some());
    vring.set_kick(None);
    assert_eq!(vring.failure(), None);
}

#[test]
fn accesses_to_configuration_space_are_counted() {
    let mut guest = Guest::new(ALL, ALL);
    let counts = |guest: &Guest| {
        let status = guest.device.virtio_status();
        (
            status.config_reads,
            status.config_writes,
            status.config_changes,
        )
    };
    let before = counts(&guest);
    guest.config();
    guest.device.write_config(4, &[0; 4]);
    guest.device.set_target(LENGTH).unwrap();
    let (reads, writes, changes) = before;
    assert_eq!(counts(&guest), (reads + 1, writes + 1, changes + 1));
}

#[test]
fn r2_a_stale_stop_does_not_end_the_hint_round() {
    let mut guest = Guest::new(ALL, ALL);
    let first = guest.start_hint_round();
    let second = guest.device.start_hinting().unwrap();
    // The queue still holds the driver's buffers for the first round. Its answer to the second follows.
    guest.hint(FREE, 0x1000);
    guest.send_cmd_id(0);
    guest.send_cmd_id(second.number());
    guest.send_cmd_id(17);
    guest.hint(FREE, 0x4000);
    let status = guest.device.hinting_status();
    assert_ne!(first, second);
    assert_eq!(status.phase, Phase::Started(second));
    assert_eq!((status.blocks, status.pages_cleared), (1, 4));
    assert_eq!((status.ignored_blocks, status.stale_commands), (1, 2));
}

#[test]
fn r3_hints_count_with_page_poison_whatever_its_value() {
    for poison in [0u32, 0xaaaa_aaaa] {
        let mut guest = Guest::new(ALL, ALL);
        guest.device.write_config(12, &poison.to_le_bytes());
        guest.start_hint_round();
        guest.hint(FREE, 0x2000);
        assert_eq!(
            guest.device.hinting_status().pages_cleared,
            2,
            "poison {poison:#x}"
        );
    }
}

#[test]
fn r3_reported_pages_are_released_only_where_zeros_are_expected() {
    for (accepted, poison, released) in [
        (Features::REPORTING, 0, true),
        (Features::REPORTING | Features::PAGE_POISON, 0, true),
        (Features::REPORTING | Features::PAGE_POISON, 0xaau32, false),
    ] {
        let mut guest = Guest::new(ALL, accepted);
        guest.device.write_config(12, &poison.to_le_bytes());
        guest.send(
            Queue::Reporting,
            &[(FREE, 0x4000, true), (SECOND, 0x1000, true)],
        );
        let bytes = guest.device.virtio_status().bytes_reported;
        assert_eq!(
            bytes,
            if released { 0x5000 } else { 0 },
            "{accepted} {poison:#x}"
        );
        assert_eq!(guest.byte(FREE) == 0, released);
    }
}

#[test]
fn r5_hints_outside_memory_are_refused_and_counted() {
    let mut guest = Guest::new(ALL, ALL);
    guest.start_hint_round();
    guest.hint(0x1000, 0x1000);
    guest.hint(u64::MAX - 0xfff, 0x2000);
    assert_eq!(guest.errors(), 2);
    assert!(guest
        .last_error()
        .starts_with("free-page queue: the range at 0xfffffffffffff000"));
    // Across the end of a region: only the part inside counts, and no other region.
    guest.hint(START + LENGTH - 0x1000, 0x10_0000);
    let status = guest.device.hinting_status();
    assert_eq!(status.pages_cleared, 1);
    assert_eq!(
        guest.device.hinted_ranges(0, usize::MAX),
        [(START + LENGTH - 0x1000, 0x1000)]
    );
    assert_eq!(status.ignored_blocks, 2);
}

#[test]
fn r6_a_sync_kills_the_old_id_and_asks_again() {
    let mut guest = Guest::new(ALL, ALL);
    let first = guest.start_hint_round();
    guest.hint(FREE, 0x1000);
    let second = guest.device.sync_hinting().unwrap();
    assert_eq!(second, first.successor());
    // Blocks that were sent before the new id do not count. The old id does not count either.
    guest.hint(FREE + 0x1000, 0x1000);
    guest.send_cmd_id(first.number());
    guest.hint(FREE + 0x1000, 0x1000);
    assert_eq!(guest.device.hinted_ranges(0, usize::MAX), [(FREE, 0x1000)]);
    guest.send_cmd_id(second.number());
    guest.hint(FREE + 0x1000, 0x1000);
    // Bits that were cleared before the sync stay clear: no page was written in between.
    assert_eq!(guest.device.hinted_ranges(0, usize::MAX), [(FREE, 0x2000)]);
}

#[test]
fn r6_no_hint_counts_after_stop_or_done() {
    for end in [Device::stop_hinting, Device::finish_hinting] {
        let mut guest = Guest::new(ALL, ALL);
        guest.start_hint_round();
        end(&mut guest.device);
        guest.hint(FREE, 0x1000);
        let status = guest.device.hinting_status();
        assert_eq!((status.pages_cleared, status.ignored_blocks), (0, 1));
        assert!(matches!(
            guest.device.sync_hinting(),
            Err(HintingError::NoHintRound)
        ));
    }
}

#[test]
fn r8_each_hint_round_has_its_own_id_in_the_range() {
    let mut guest = Guest::new(ALL, ALL);
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(guest.device.start_hinting().unwrap().number());
    }
    // Ids are also unique across a driver restart.
    guest.send_cmd_id(ids[19]);
    guest.start_driver(ALL);
    ids.push(guest.device.start_hinting().unwrap().number());
    assert!(ids.iter().all(|id| *id >= 0x8000_0000));
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 21);
}

#[test]
fn r16_a_new_driver_finds_no_hint_round() {
    let mut guest = Guest::new(ALL, ALL);
    guest.start_hint_round();
    guest.hint(FREE, 0x1000);
    guest.start_driver(ALL);
    assert_eq!(guest.device.hinting_status().phase, Phase::Stopped);
    assert_eq!(guest.config().free_page_hint_cmd_id, 0);
    // The hints of the new driver belong to no hint round.
    guest.hint(FREE, 0x1000);
    assert_eq!(guest.device.hinting_status().ignored_blocks, 1);
}

#[test]
fn r16_done_is_shown_in_every_phase() {
    let mut guest = Guest::new(ALL, ALL);
    let reach: [fn(&mut Guest); 4] = [
        |_| {},
        |guest| {
            guest.device.start_hinting().unwrap();
        },
        |guest| {
            guest.start_hint_round();
        },
        |guest| {
            guest.start_hint_round();
            guest.send_cmd_id(0);
        },
    ];
    for phase in reach {
        phase(&mut guest);
        guest.device.finish_hinting();
        assert_eq!(guest.config().free_page_hint_cmd_id, 1);
        guest.send_cmd_id(0);
    }
}

#[test]
fn r17_a_hint_changes_no_page() {
    let mut guest = Guest::new(ALL, ALL);
    let before = guest.device.ram().allocated().unwrap();
    guest.start_hint_round();
    guest.hint(FREE, 0x10_0000);
    guest.hint(SECOND, SECOND_LENGTH as u32);
    guest.send_cmd_id(0);
    guest.device.finish_hinting();
    assert_eq!(guest.device.hinting_status().pages_cleared, 0x200);
    assert_eq!(guest.device.ram().allocated().unwrap(), before);
    for (start, length) in [(FREE, 0x10_0000), (SECOND, SECOND_LENGTH)] {
        let mut bytes = vec![0; length as usize];
        guest
            .memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(start))
            .unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == 0x5a),
            "the content of a hinted page is untouched"
        );
    }
}

#[test]
fn r9_the_saved_state_goes_on_in_a_fresh_device() {
    let mut guest = Guest::new(ALL, ALL);
    guest.device.set_target(LENGTH).unwrap();
    guest.device.write_config(4, &7u32.to_le_bytes());
    guest.device.write_config(12, &0xaaaa_aaaau32.to_le_bytes());
    let used: Vec<_> = (0..3).map(|_| guest.start_hint_round()).collect();
    let before = guest.config();
    // The JSON text that QMP clients and files get.
    let text = serde_json::to_string(&guest.device.saved_state()).unwrap();
    let saved: saved_state::SavedState = serde_json::from_str(&text).unwrap();
    assert_eq!(saved, guest.device.saved_state());

    let mut device = Device::new(ALL, Arc::default());
    device.restore(&saved).unwrap();
    assert_eq!(device.saved_state().clone(), {
        let value = serde_json::to_value(&saved).unwrap();
        let mut value = value.as_object().unwrap().clone();
        value.insert("command-id".into(), 1.into());
        serde_json::from_value(value.into()).unwrap()
    });
    // The same driver continues: it has the same features, and writes nothing again.
    device.front_end_connected(Arc::default());
    device.set_features(ALL.bits());
    let config = ConfigSpace::from_bytes(device.read_config(0, 16).try_into().unwrap());
    assert_eq!(
        (config.num_pages, config.actual, config.poison_val),
        (before.num_pages, 7, 0xaaaa_aaaa)
    );
    // R16: the hint round is over, and the guest frees its hinted blocks.
    assert_eq!(config.free_page_hint_cmd_id, 1);
    // R8: no id is issued twice.
    let mut next = Guest::with_device(device, ALL);
    assert_eq!(next.device.start_hinting().unwrap(), used[2].successor());
    // A driver with other features is a new driver: its poison value starts at 0.
    next.start_driver(Features::PAGE_POISON);
    assert_eq!(next.config().poison_val, 0);
}

#[test]
fn r9_a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let good = serde_json::to_value(Guest::new(ALL, ALL).device.saved_state()).unwrap();
    for (key, value, word) in [
        ("next-hint-id", json!(0x7fff_ffff), "0x7fffffff"),
        ("command-id", json!(2), "0x2, which is reserved"),
        ("negotiated-features", json!(["stats", "wings"]), "'wings'"),
        (
            "negotiated-features",
            json!(["discard-hinted"]),
            "uses discard-hinted",
        ),
    ] {
        let mut state = good.clone();
        state[key] = value;
        let state: saved_state::SavedState = serde_json::from_value(state).unwrap();
        let mut device = Device::new(ALL, Arc::default());
        let before = device.saved_state();
        let error = device.restore(&state).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(device.saved_state(), before);
    }
}

const DISCARD: Features = ALL.union(Features::KEEPS_HINTED_UNTIL_RETURNED);

#[test]
fn r17_a_hint_discards_for_a_driver_that_keeps_the_block() {
    // Page poison changes nothing: a hinted page is uninitialised memory.
    for poison in [0u32, 0xaaaa_aaaa] {
        let mut guest = Guest::new(DISCARD, DISCARD);
        guest.device.write_config(12, &poison.to_le_bytes());
        let before = guest.device.ram().allocated().unwrap().total;
        // Hints before the round is started and after it has ended discard nothing.
        guest.hint(FREE, 0x1000);
        guest.start_hint_round();
        // The first and the last page are covered only in part.
        guest.hint(FREE + 0x800, 0x4000);
        guest.send(
            Queue::FreePage,
            &[(SECOND, 0x2000, true), (SECOND + 0x4000, 0x1000, true)],
        );
        guest.device.sync_hinting().unwrap();
        guest.hint(FREE + 0x8000, 0x1000);
        guest.send_cmd_id(0);
        guest.device.finish_hinting();
        guest.hint(FREE + 0x9000, 0x1000);

        let status = guest.device.hinting_status();
        assert_eq!(status.bytes_discarded, 0x6000);
        assert_eq!(status.pages_total - status.pages_dirty, 6);
        assert_eq!(
            guest.device.hinted_ranges(0, usize::MAX),
            [
                (FREE + 0x1000, 0x3000),
                (SECOND, 0x2000),
                (SECOND + 0x4000, 0x1000)
            ]
        );
        let after = guest.device.ram().allocated().unwrap().total;
        assert_eq!(before - after, 0x6000);
        for (address, byte) in [
            (FREE, 0x5a),
            (FREE + 0xfff, 0x5a),
            (FREE + 0x1000, 0),
            (FREE + 0x3fff, 0),
            (FREE + 0x4000, 0x5a),
            (FREE + 0x8000, 0x5a),
            (FREE + 0x9000, 0x5a),
            (SECOND, 0),
            (SECOND + 0x2000, 0x5a),
            (SECOND + 0x4000, 0),
        ] {
            assert_eq!(guest.byte(address), byte, "{address:#x}");
        }
        assert_eq!(guest.errors(), 0);
    }
}

#[test]
fn r17_nothing_is_discarded_without_the_drivers_promise() {
    for (offered, accepted) in [(DISCARD, ALL), (ALL, DISCARD)] {
        let mut guest = Guest::new(offered, accepted & offered);
        assert!(!guest.device.discards_hinted());
        let before = guest.device.ram().allocated().unwrap();
        guest.start_hint_round();
        guest.hint(FREE, 0x10_0000);
        let status = guest.device.hinting_status();
        assert_eq!((status.pages_cleared, status.bytes_discarded), (0x100, 0));
        assert_eq!(guest.device.ram().allocated().unwrap(), before);
        assert_eq!(guest.byte(FREE), 0x5a);
    }
}

#[test]
fn r17_what_is_discarded_is_what_is_struck_out() {
    let mut guest = Guest::new(DISCARD, DISCARD);
    guest.start_hint_round();
    // R5: outside guest memory, across the end of the address space, and across the end of a region.
    guest.hint(0x1000, 0x1000);
    guest.hint(u64::MAX - 0xfff, 0x2000);
    assert_eq!(guest.errors(), 2);
    assert!(guest
        .last_error()
        .starts_with("free-page queue: the range at 0xfffffffffffff000"));
    guest.hint(START + LENGTH - 0x1000, 0x10_0000);
    assert_eq!(
        guest.device.hinted_ranges(0, usize::MAX),
        [(START + LENGTH - 0x1000, 0x1000)]
    );
    assert_eq!(
        (guest.byte(START + LENGTH - 1), guest.byte(SECOND)),
        (0, 0x5a)
    );
    // A request of more than the discard limit: the excess is not discarded, and stays dirty.
    let far = hinting::MAX_DISCARD as u32;
    for (length, byte) in [(far, 0x5a), (far - 0x1000, 0)] {
        guest.send(
            Queue::FreePage,
            &[(SECOND + 0x8000, length, true), (SECOND, 0x1000, true)],
        );
        assert_eq!(guest.byte(SECOND + 0x8000), 0);
        assert_eq!(guest.byte(SECOND), byte);
    }
}

#[test]
fn a_paused_guest_continues_its_hint_round() {
    let mut guest = Guest::new(ALL, ALL);
    let id = guest.start_hint_round();
    guest.hint(FREE, 0x1000);
    // A front end does this around a pause: the queues stop, features are set again, and the queues continue.
    for vring in &guest.vrings {
        vring.set_queue_ready(false);
    }
    assert!(matches!(
        guest.device.start_hinting(),
        Err(HintingError::NoDriver)
    ));
    guest.device.set_features(ALL.bits());
    for vring in &guest.vrings {
        vring.set_queue_ready(true);
    }
    guest.hint(FREE + 0x1000, 0x1000);
    assert_eq!(guest.device.hinting_status().phase, Phase::Started(id));
    assert_eq!(guest.device.hinting_status().blocks, 2);
}

#[test]
fn another_memory_layout_ends_the_hint_round() {
    let mut guest = Guest::new(ALL, ALL);
    guest.start_hint_round();
    guest.device.set_memory(guest.memory.clone());
    assert!(
        matches!(guest.device.hinting_status().phase, Phase::Started(_)),
        "the same layout ends nothing"
    );
    let other = crate::memory::tests::guest(&[(0, 0x10_0000, 0)]);
    guest.device.set_memory(GuestMemoryAtomic::new(other));
    assert_eq!(guest.device.hinting_status().phase, Phase::Stopped);
    assert_eq!(guest.device.hinting_status().pages_total, 0);
}

#[test]
fn r10_config_space_is_as_long_as_the_accepted_features_say() {
    let poison = 0x11u32.to_le_bytes();
    for (accepted, size) in [
        (Features::NONE, 8),
        (Features::FREE_PAGE_HINT, 12),
        (Features::PAGE_POISON, 16),
    ] {
        let mut guest = Guest::new(ALL, accepted);
        // A front end that writes all fields back, including absent ones and those of the device.
        guest.device.write_config(0, &[0xff; 16]);
        guest.device.write_config(12, &poison);
        let bytes = guest.device.read_config(0, 16);
        assert_eq!(bytes[..4], [0; 4], "num_pages is the device's");
        assert_eq!(bytes[4..8], [0xff; 4], "actual is the driver's");
        assert!(
            bytes[size..].iter().all(|byte| *byte == 0),
            "{accepted}: {bytes:x?}"
        );
        assert_eq!(bytes[12..] == poison, size == 16);
    }
    let mut guest = Guest::new(ALL, ALL);
    assert_eq!(guest.device.read_config(4, 4).len(), 4);
    assert!(guest.device.read_config(0, 17).is_empty());
    assert!(guest.device.read_config(u32::MAX, u32::MAX).is_empty());
    guest.device.write_config(u32::MAX, &[1; 300]);
}

#[test]
fn r10_queues_are_where_the_accepted_features_put_them() {
    let mut guest = Guest::new(ALL, Features::FREE_PAGE_HINT);
    assert_eq!(Queue::FreePage.index(guest.features), Some(2));
    guest.start_hint_round();
    guest.hint(FREE, 0x1000);
    assert_eq!(guest.device.hinting_status().blocks, 1);
    assert!(!guest.kick_index(3), "there is no queue 3");
    let names: Vec<_> = guest
        .device
        .virtio_status()
        .queues
        .iter()
        .map(|queue| queue.queue)
        .collect();
    assert_eq!(names, [Queue::Inflate, Queue::Deflate, Queue::FreePage]);
}

#[test]
fn hinting_needs_a_driver_that_accepted_it() {
    let mut device = Device::new(ALL, Arc::default());
    assert!(matches!(
        device.start_hinting(),
        Err(HintingError::NoFrontEnd)
    ));
    device.front_end_connected(Arc::default());
    assert!(matches!(
        device.start_hinting(),
        Err(HintingError::NoDriver)
    ));
    let mut guest = Guest::new(Features::STATS_VQ, Features::STATS_VQ);
    assert!(matches!(
        guest.device.start_hinting(),
        Err(HintingError::NotOffered)
    ));
    let mut guest = Guest::new(ALL, Features::STATS_VQ);
    assert!(matches!(
        guest.device.start_hinting(),
        Err(HintingError::NotNegotiated)
    ));
    let mut guest = Guest::new(ALL, ALL);
    guest.device.front_end_disconnected("it was told to");
    assert!(matches!(
        guest.device.start_hinting(),
        Err(HintingError::NoFrontEnd)
    ));
    assert_eq!(guest.device.set_target(1), Err(BalloonError::NoMemory));
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let mut guest = Guest::new(ALL, ALL);
    let stat = |value| Stat { tag: 4, value }.to_bytes();
    let memory = guest.memory.clone();
    let write = move |bytes: &[u8]| {
        memory
            .memory()
            .write_slice(bytes, GuestAddress(Guest::SCRATCH))
            .unwrap();
    };
    write(&stat(100));
    guest.add(Queue::Stats, &[(Guest::SCRATCH, 10, false)]);
    guest.kick(Queue::Stats);
    assert_eq!(
        guest.returned(Queue::Stats),
        0,
        "the device keeps the buffer"
    );
    assert_eq!(guest.device.stats().values, [(StatTag::FreeMemory, 100)]);

    assert!(guest.device.request_stats());
    assert_eq!(guest.returned(Queue::Stats), 1);
    assert!(
        !guest.device.request_stats(),
        "there is no buffer to ask with"
    );
    write(&stat(200));
    guest.add(Queue::Stats, &[(Guest::SCRATCH, 10, false)]);
    guest.kick(Queue::Stats);
    assert_eq!(guest.device.stats().values, [(StatTag::FreeMemory, 200)]);
    assert_eq!(guest.errors(), 0);

    // A second buffer is an error. The device returns the first one.
    guest.send(Queue::Stats, &[(Guest::SCRATCH, 10, false)]);
    assert_eq!(guest.errors(), 1);
    // The device does not return a buffer of the previous driver to a restarted one.
    guest.start_driver(ALL);
    assert!(!guest.device.request_stats());
}

#[test]
fn hostile_chains_are_counted_and_come_back() {
    let mut guest = Guest::new(ALL, ALL);
    guest.start_hint_round();
    let mut errors = 0;
    for queue in Queue::ALL {
        let base = guest.queue(queue).0.base;
        // Two loops, a descriptor outside the table, an indirect table outside memory, an indirect table of a bad
        // length, and a segment that is too long.
        for (address, length, flags, next) in [
            (FREE, 0x1000, NEXT, 0),
            (FREE, 0x1000, NEXT | WRITE, 0),
            (FREE, 0x1000, NEXT, SIZE),
            (0xdead_0000, 0x100, INDIRECT, 0),
            (FREE, 17, INDIRECT, 0),
            (FREE, u32::MAX, 0, 0),
        ] {
            guest.write_descriptor(base, 0, address, length, flags, next);
            guest.offer(queue, 0);
            guest.kick(queue);
            errors += 1;
            assert_eq!(
                guest.errors(),
                errors,
                "{queue:?} {address:x} {length:x} {flags} {next}"
            );
            assert_eq!(
                guest.returned(queue),
                1,
                "{queue:?} {address:x} {length:x} {flags} {next}"
            );
        }
    }
    // Segments with the wrong direction. Mixed directions, bad lengths and addresses outside memory follow.
    let wrong = [
        (Queue::Inflate, true),
        (Queue::Deflate, true),
        (Queue::Stats, true),
        (Queue::Reporting, false),
    ];
    for (queue, writable) in wrong {
        guest.send(queue, &[(FREE, 40, writable)]);
        errors += 1;
        assert_eq!(guest.errors(), errors, "{queue:?}");
    }
    guest.send(Queue::FreePage, &[(FREE, 0x1000, true), (FREE, 4, false)]);
    guest.send(Queue::FreePage, &[(FREE, 5, false)]);
    guest.send(Queue::Inflate, &[(FREE, 6, false)]);
    guest.send(Queue::Inflate, &[(0x1000, 8, false)]);
    guest.send(Queue::Inflate, &[(FREE, 4 * (1 << 16) + 4, false)]);
    errors += 5;
    assert_eq!(guest.errors(), errors);
    assert_eq!(guest.byte(FREE), 0x5a);
}

#[test]
fn a_broken_ring_ends_the_drain() {
    let mut guest = Guest::new(ALL, ALL);
    let (driver, index) = guest.queue(Queue::Inflate);
    let base = driver.base;
    // More available chains than the queue has entries.
    guest
        .memory
        .memory()
        .write_obj(1000u16, GuestAddress(base + 0x1002))
        .unwrap();
    assert!(!guest.kick_index(index));
    assert_eq!(guest.errors(), 1);
    // A head that does not exist cannot be returned. The device skips it.
    guest
        .memory
        .memory()
        .write_obj(1u16, GuestAddress(base + 0x1002))
        .unwrap();
    guest
        .memory
        .memory()
        .write_obj(SIZE, GuestAddress(base + 0x1004))
        .unwrap();
    assert!(!guest.kick_index(index));
    assert_eq!(guest.errors(), 2);
    assert_eq!(guest.returned(Queue::Inflate), 0);
}

#[test]
fn a_large_request_exhausts_the_drain_budget() {
    let mut guest = Guest::new(ALL, ALL);
    // Every second page frame number, so that no ranges merge. Most are outside memory, which costs as much work.
    let bytes: Vec<u8> = (0..40_000u32)
        .flat_map(|number| (number * 2).to_le_bytes())
        .collect();
    guest
        .memory
        .memory()
        .write_slice(&bytes, GuestAddress(FREE))
        .unwrap();
    guest.add(Queue::Inflate, &[(FREE, bytes.len() as u32, false)]);
    guest.offer(Queue::Inflate, 0);
    let (_, index) = guest.queue(Queue::Inflate);
    assert!(
        guest.kick_index(index),
        "the turn ends after the first request"
    );
    assert_eq!(guest.returned(Queue::Inflate), 1);
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        (0..LENGTH + 0x1000).prop_map(|offset| START + offset),
        (0..SECOND_LENGTH + 0x1000).prop_map(|offset| SECOND + offset),
        any::<u64>(),
    ];
    let length = prop_oneof![0u32..64, 0u32..0x10_0000, any::<u32>()];
    (address, length, 0u16..8, 0..SIZE + 2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_is_on_the_queues_nothing_breaks(
        accepted in 0u64..64,
        keeps in any::<bool>(),
        poison in any::<u32>(),
        table in prop::collection::vec(descriptor(), SIZE as usize),
        steps in prop::collection::vec((0usize..5, 0..SIZE + 1, any::<Option<u16>>()), 1..30),
    ) {
        let mut accepted = Features::from_bits(accepted) & ALL;
        if keeps {
            accepted = accepted | Features::KEEPS_HINTED_UNTIL_RETURNED;
        }
        let mut guest = Guest::new(DISCARD, accepted);
        guest.device.write_config(12, &poison.to_le_bytes());
        let _ = guest.device.start_hinting();
        for index in 0..Queue::count(accepted) {
            for (at, (address, length, flags, next)) in table.iter().enumerate() {
                let base = guest.queues[index].base;
                guest.write_descriptor(base, at as u16, *address, *length, *flags, *next);
            }
        }
        for (index, head, added) in steps {
            let Some(queue) = Queue::from_index(index, accepted) else { continue };
            guest.offer(queue, head);
            if let Some(added) = added {
                // A random available index. The rings may also be in released memory.
                let at = guest.queues[index].base + 0x1002;
                let _ = guest.memory.memory().write_obj(added, GuestAddress(at));
            }
            for _ in 0..10 {
                if !guest.kick_index(index) {
                    break;
                }
            }
        }
        let status = guest.device.hinting_status();
        let clean: u64 = guest.device.hinted_ranges(0, usize::MAX).iter().map(|(_, length)| length >> 12).sum();
        prop_assert_eq!(status.pages_total - status.pages_dirty, clean);
        prop_assert_eq!(guest.config().num_pages, 0);
    }
}
