// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of one turn of a queue is limited, whatever the guest sends. Between turns the device's lock is free.

use std::sync::Arc;

use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::{Device, Guest, ALL, DISCARD, FREE, LENGTH, START};
use crate::device::hinting::MAX_DISCARD;
use crate::device::queues::DRAIN_BUDGET;
use crate::memory::tests::memfd;

/// A region of a large guest. Its memory file is a hole, so that releasing it is quick.
const LARGE: u64 = 1 << 36;
const LARGE_LENGTH: u64 = 64 << 30;

/// The most bytes that a turn releases.
const TURN_BYTES: u64 = (DRAIN_BUDGET as u64) << 16;

fn large_guest(features: Features) -> Guest {
    let regions = [(START, LENGTH), (LARGE, LARGE_LENGTH)].map(|(start, length)| {
        let file = FileOffset::new(memfd(length), 0);
        (GuestAddress(start), length as usize, Some(file))
    });
    let memory = GuestMemoryMmap::from_ranges_with_files(regions).unwrap();
    let device = Device::new(features, Arc::default());
    Guest::with_memory(device, features, memory)
}

/// Gives the queue turns until it is empty, and returns the difference of `count` in each turn.
fn turns(guest: &mut Guest, queue: Queue, count: impl Fn(&Guest) -> u64) -> Vec<u64> {
    let (_, index) = guest.queue(queue);
    let mut turns = Vec::new();
    loop {
        let before = count(guest);
        let more = guest.kick_index(index);
        turns.push(count(guest) - before);
        if !more {
            return turns;
        }
        // The buffers are returned at the end.
        let done = turns.iter().sum::<u64>();
        assert!(done > 0 || turns.len() < 10);
    }
}

#[test]
fn a_turn_releases_a_limited_number_of_bytes() {
    let mut guest = large_guest(ALL);
    let length = u32::MAX - 0xfff;
    // A chain has less than 4 GiB.
    guest.add(Queue::Reporting, &[(LARGE, length, true)]);
    let turns = turns(&mut guest, Queue::Reporting, |guest| {
        guest.device.virtio_status().bytes_reported
    });
    assert_eq!(guest.returned(Queue::Reporting), 1);
    assert_eq!(turns.iter().sum::<u64>(), u64::from(length));
    assert!(turns.iter().all(|bytes| *bytes <= TURN_BYTES), "{turns:?}");
    assert_eq!(guest.errors(), 0);
}

#[test]
fn a_turn_releases_a_limited_number_of_pages() {
    let mut guest = large_guest(ALL);
    let pages: Vec<_> = (0..10_000).map(|page| LARGE + page * 0x2000).collect();
    let bytes: Vec<u8> = pages
        .iter()
        .flat_map(|address| ((address >> 12) as u32).to_le_bytes())
        .collect();
    vm_memory::Bytes::write_slice(
        &*vm_memory::GuestAddressSpace::memory(&guest.memory),
        &bytes,
        GuestAddress(FREE),
    )
    .unwrap();
    guest.add(Queue::Inflate, &[(FREE, bytes.len() as u32, false)]);
    let turns = turns(&mut guest, Queue::Inflate, |guest| {
        guest.device.virtio_status().bytes_released >> 12
    });
    assert_eq!(guest.returned(Queue::Inflate), 1);
    assert_eq!(turns.iter().sum::<u64>(), 10_000);
    let most = DRAIN_BUDGET as u64;
    assert!(turns.iter().all(|pages| *pages <= most), "{turns:?}");
}

#[test]
fn a_turn_walks_a_limited_number_of_descriptors() {
    let mut guest = large_guest(ALL);
    // Chains that loop: each is walked as far as a chain can be.
    for queue in [Queue::Deflate, Queue::Inflate] {
        let base = guest.queue(queue).0.base;
        guest.write_descriptor(base, 0, FREE, 4, super::NEXT, 0);
        let mut chains = 0;
        let (_, index) = guest.queue(queue);
        for _ in 0..super::SIZE {
            guest.offer(queue, 0);
            chains += 1;
        }
        let mut turns = 0;
        while guest.kick_index(index) {
            turns += 1;
        }
        assert_eq!(guest.returned(queue), chains);
        assert!(turns <= chains, "{turns}");
    }
}

#[test]
fn r6_what_is_left_of_a_block_at_the_end_of_its_hint_round_is_no_hint() {
    for discards in [true, false] {
        let features = if discards { DISCARD } else { ALL };
        let mut guest = large_guest(features);
        guest.start_hint_round();
        // Far more than a turn discards. Without discarding, a turn takes the whole block.
        let length = MAX_DISCARD as u32;
        guest.add(Queue::FreePage, &[(LARGE, length, true)]);
        let (_, index) = guest.queue(Queue::FreePage);
        let more = guest.kick_index(index);
        assert_eq!(more, discards);
        let cleared = guest.device.hinting_status().pages_cleared << 12;
        if !discards {
            assert_eq!(cleared, MAX_DISCARD);
            continue;
        }
        assert!(cleared > 0 && cleared <= TURN_BYTES, "{cleared:#x}");
        assert_eq!(
            guest.returned(Queue::FreePage),
            0,
            "the device still owns it"
        );
        guest.device.sync_hinting().unwrap();
        guest.kick(Queue::FreePage);
        assert_eq!(guest.returned(Queue::FreePage), 1);
        let status = guest.device.hinting_status();
        assert_eq!(
            (status.bytes_discarded, status.ignored_blocks),
            (cleared, 1)
        );
        assert_eq!(guest.device.hinted_ranges(0, 9), [(LARGE, cleared)]);
    }
}

#[test]
fn a_block_of_several_turns_is_hinted_completely() {
    let mut guest = large_guest(DISCARD);
    guest.start_hint_round();
    guest.add(
        Queue::FreePage,
        &[(LARGE + 0x800, MAX_DISCARD as u32, true)],
    );
    let turns = turns(&mut guest, Queue::FreePage, |guest| {
        guest.device.hinting_status().bytes_discarded
    });
    assert!(turns.len() > 3 && turns.iter().all(|bytes| *bytes <= TURN_BYTES));
    let status = guest.device.hinting_status();
    assert_eq!((status.blocks, status.ignored_blocks), (1, 0));
    assert_eq!(
        guest.device.hinted_ranges(0, 9),
        [(LARGE + 0x1000, MAX_DISCARD - 0x1000)]
    );
}

#[test]
fn r17_a_stopped_queue_finishes_its_request_and_a_reset_drops_it() {
    let report = |guest: &mut Guest| {
        guest.add(Queue::Reporting, &[(LARGE, 1 << 30, true)]);
        let (_, index) = guest.queue(Queue::Reporting);
        assert!(guest.kick_index(index));
        let bytes = guest.device.virtio_status().bytes_reported;
        assert!(bytes > 0 && bytes < 1 << 30);
        index
    };
    let mut guest = large_guest(ALL);
    let index = report(&mut guest);
    while guest.device.finish_request(index) {}
    assert_eq!(guest.returned(Queue::Reporting), 1);
    assert_eq!(guest.device.virtio_status().bytes_reported, 1 << 30);
    assert!(!guest.device.finish_request(index));

    let mut guest = large_guest(ALL);
    let index = report(&mut guest);
    let before = guest.device.virtio_status().bytes_reported;
    guest.device.reset();
    guest.device.set_features(ALL.bits());
    assert!(!guest.device.finish_request(index));
    assert!(!guest.kick_index(index));
    assert_eq!(guest.device.virtio_status().bytes_reported, before);
    assert_eq!(guest.returned(Queue::Reporting), 0);
}
