// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of one turn of a queue is limited, whatever the guest sends. Between turns the device's lock is free.

use std::sync::Arc;

use rustix::fs::ftruncate;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_user_backend::VringT;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};

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
    large_guest_with(features, features)
}

fn large_guest_with(offered: Features, accepted: Features) -> Guest {
    let regions = [(START, LENGTH), (LARGE, LARGE_LENGTH)].map(|(start, length)| {
        let file = FileOffset::new(memfd(length), 0);
        (GuestAddress(start), length as usize, Some(file))
    });
    let memory = GuestMemoryMmap::from_ranges_with_files(regions).unwrap();
    let device = Device::new(offered, Arc::default());
    Guest::with_memory(device, accepted, memory)
}

/// Makes a request available whose buffer is the descriptor `head`, with its page frame numbers at `at`.
fn offer_pages(guest: &mut Guest, queue: Queue, head: u16, at: u64, pages: &[u64]) {
    let bytes: Vec<u8> = pages
        .iter()
        .flat_map(|address| ((address >> 12) as u32).to_le_bytes())
        .collect();
    let memory = guest.memory.memory();
    memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    let base = guest.queue(queue).0.base;
    guest.write_descriptor(base, head, at, bytes.len() as u32, 0, 0);
    guest.offer(queue, head);
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
    offer_pages(&mut guest, Queue::Inflate, 0, FREE, &pages);
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

#[test]
fn r17_a_buffer_is_returned_after_the_pages_of_all_requests_of_its_turn() {
    const PAGES: u64 = 100;
    const REQUESTS: u64 = 16;
    let mut guest = large_guest(ALL);
    // Each second request has the pages between those of the request before it.
    for request in 0..REQUESTS {
        let first = LARGE + (request / 2 * 0x1000 + request % 2) * 0x1000;
        let pages: Vec<u64> = (0..PAGES).map(|page| first + page * 0x2000).collect();
        let at = FREE + request * 0x1000;
        offer_pages(&mut guest, Queue::Inflate, request as u16, at, &pages);
    }
    let (_, index) = guest.queue(Queue::Inflate);
    let (mut turns, mut returned, mut punches) = (0, 0, 0);
    loop {
        let more = guest.kick_index(index);
        turns += 1;
        returned += u64::from(guest.returned(Queue::Inflate));
        let status = guest.device.virtio_status();
        assert!(status.bytes_released >> 12 >= returned * PAGES);
        assert!(status.punches - punches <= DRAIN_BUDGET as u64);
        punches = status.punches;
        if !more {
            break;
        }
    }
    assert_eq!(returned, REQUESTS);
    assert!(turns > 1, "{turns}");
    let status = guest.device.virtio_status();
    assert_eq!(status.bytes_released >> 12, REQUESTS * PAGES);
    // Two requests are one range. The end of a turn divides the pages of two requests at most.
    let most = REQUESTS / 2 + 2 * PAGES * (turns - 1);
    println!("{punches} system calls in {turns} turns");
    assert!(punches <= most, "{punches} > {most}");
}

/// Pages of huge pages of 2 MiB: `number` modulo 2 of each of the first `count` huge pages.
fn half_of_huge_pages(count: u64, number: u64) -> Vec<u64> {
    let pages = (0..count * 256).map(|it| it * 2 + number);
    pages.map(|it| LARGE + it * 0x1000).collect()
}

#[test]
fn pages_of_requests_of_several_turns_add_up_to_huge_pages() {
    const COUNT: u64 = 20;
    let mut guest = large_guest(Features::MUST_TELL_HOST);
    guest.device.ram.set_granule(2 << 20);
    let released = |guest: &Guest| guest.device.virtio_status().bytes_released;
    for (half, expected) in [(0, 0), (1, COUNT * (2 << 20))] {
        let pages = half_of_huge_pages(COUNT, half);
        offer_pages(&mut guest, Queue::Inflate, 0, FREE, &pages);
        let turns = turns(&mut guest, Queue::Inflate, |guest| {
            guest.device.virtio_status().bytes_released
        });
        assert!(turns.len() > 4, "{}", turns.len());
        assert_eq!(guest.returned(Queue::Inflate), 1);
        assert_eq!(released(&guest), expected);
    }
    // A deflation takes several turns as well, because each page of a huge page is work.
    let pages = half_of_huge_pages(COUNT, 0);
    offer_pages(&mut guest, Queue::Deflate, 0, FREE, &pages);
    let (_, index) = guest.queue(Queue::Deflate);
    let mut turns = 1;
    while guest.kick_index(index) {
        assert_eq!(
            guest.returned(Queue::Deflate),
            0,
            "the device still owns it"
        );
        turns += 1;
    }
    assert!(turns > 4, "{turns}");
    assert_eq!(guest.returned(Queue::Deflate), 1);
    let status = guest.device.virtio_status();
    assert_eq!(status.pages_deflated, COUNT * 256);
    // The other half is still in the balloon, and alone it frees nothing.
    guest.send_pfns(Queue::Inflate, &half_of_huge_pages(1, 1));
    assert_eq!(released(&guest), COUNT * (2 << 20));
    guest.send_pfns(Queue::Inflate, &half_of_huge_pages(1, 0));
    assert_eq!(released(&guest), (COUNT + 1) * (2 << 20));
    assert_eq!(guest.errors(), 0);
}

#[test]
fn r17_a_stopped_queue_finishes_its_request_however_the_driver_numbers_the_queues() {
    let mut guest = large_guest_with(ALL, Features::REPORTING);
    // The rings 0, 1 and 4 are started, as in the list of the specification.
    for index in [2, 3] {
        guest.vrings[index].set_queue_ready(false);
    }
    guest.features = ALL;
    guest.add(Queue::Reporting, &[(LARGE, 1 << 30, true)]);
    assert!(guest.kick_index(4));
    while guest.device.finish_request(4) {}
    assert_eq!(guest.returned(Queue::Reporting), 1);
    assert_eq!(guest.device.virtio_status().bytes_reported, 1 << 30);
}

#[test]
fn r17_no_buffer_is_returned_and_nothing_released_after_a_truncation() {
    let mut guest = large_guest(ALL);
    guest.add(Queue::Reporting, &[(LARGE, 1 << 30, true)]);
    let (_, index) = guest.queue(Queue::Reporting);
    assert!(guest.kick_index(index));
    let before = guest.device.virtio_status().bytes_reported;
    // An access to the file that has the rings fails, and zeros replace its page.
    let memory = guest.memory.memory();
    let region = memory.find_region(GuestAddress(START)).unwrap();
    ftruncate(region.file_offset().unwrap().file(), 0).unwrap();
    assert_eq!(guest.byte(FREE), 0);
    assert!(guest.device.memory_fault().is_some());
    while guest.kick_index(index) {}
    assert!(!guest.device.finish_request(index));
    assert_eq!(guest.device.virtio_status().bytes_reported, before);
    assert_eq!(guest.returned(Queue::Reporting), 0);
}

#[test]
fn r17_a_buffer_is_returned_after_its_own_page_was_released() {
    let mut guest = Guest::new(ALL, ALL);
    // The page contains the used ring. What the device wrote before the release would be gone.
    let used_ring = guest.queue(Queue::Inflate).0.base + 0x2000;
    guest.send_pfns(Queue::Inflate, &[used_ring]);
    let used_ring = guest.queue(Queue::Reporting).0.base + 0x2000;
    guest.send(Queue::Reporting, &[(used_ring, 0x1000, true)]);
    let status = guest.device.virtio_status();
    assert_eq!(
        (status.bytes_released, status.bytes_reported),
        (0x1000, 0x1000)
    );
}
