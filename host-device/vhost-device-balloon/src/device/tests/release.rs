// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inflation and free page reporting: memory that is released to the host.

use std::sync::Arc;

use guest_migration::Pinning;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{Guest, ALL, DISCARD, FREE, LENGTH, SECOND, SECOND_LENGTH, START};
use crate::device::Device;

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
    let events = guest.events.take();
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
fn bytes_are_counted_exactly_if_part_of_a_range_is_outside_memory() {
    let mut guest = Guest::new(ALL, ALL);
    // The last page of the region and two pages behind it are one range.
    let last = START + LENGTH - 0x1000;
    guest.send_pfns(Queue::Inflate, &[last, last + 0x1000, last + 0x2000]);
    guest.send(
        Queue::Reporting,
        &[(last, 0x3000, true), (SECOND - 0x1000, 0x2000, true)],
    );
    let status = guest.device.virtio_status();
    assert_eq!(
        (status.bytes_released, status.bytes_reported),
        (0x1000, 0x2000)
    );
    assert_eq!(status.errors, 2);
    assert!(
        guest.last_error().contains("0x2000 bytes outside")
            || guest.last_error().contains("8192 bytes outside"),
        "{}",
        guest.last_error()
    );
}

/// Sends the pages in requests of `chunk` pages each, `at_once` requests for each notification, and returns the number of
/// system calls that released them.
fn punches_for(addresses: &[u64], chunk: usize, at_once: usize) -> u64 {
    let mut guest = Guest::new(Features::NONE, Features::NONE);
    let before = guest.device.virtio_status().punches;
    let requests: Vec<&[u64]> = addresses.chunks(chunk).collect();
    for turn in requests.chunks(at_once) {
        let base = guest.queue(Queue::Inflate).0.base;
        for (head, pages) in turn.iter().enumerate() {
            let at = Guest::SCRATCH + 0x1000 * head as u64;
            let numbers: Vec<u8> = pages
                .iter()
                .flat_map(|it| ((it >> 12) as u32).to_le_bytes())
                .collect();
            let memory = guest.memory.memory();
            memory.write_slice(&numbers, GuestAddress(at)).unwrap();
            let length = numbers.len() as u32;
            guest.write_descriptor(base, head as u16, at, length, 0, 0);
            guest.offer(Queue::Inflate, head as u16);
        }
        guest.kick(Queue::Inflate);
        assert_eq!(usize::from(guest.returned(Queue::Inflate)), turn.len());
    }
    let status = guest.device.virtio_status();
    assert_eq!(status.bytes_released, addresses.len() as u64 * 0x1000);
    assert_eq!((guest.byte(FREE), status.errors), (0, 0));
    status.punches - before
}

#[test]
fn system_calls_follow_the_ranges_of_a_turn_in_any_order() {
    // The free part of the first region: requests of Linux's size, and smaller ones.
    let ascending: Vec<u64> = (0..512).map(|it| FREE + it * 0x1000).collect();
    let descending: Vec<u64> = ascending.iter().rev().copied().collect();
    let interleaved: Vec<u64> = (0..256)
        .flat_map(|it| [ascending[it], descending[it]])
        .collect();
    for pages in [&ascending, &descending, &interleaved] {
        // As Linux's driver: one request at a time.
        let single = punches_for(pages, 256, 1);
        // As this project's driver: several requests at a time.
        let turn = punches_for(pages, 64, 8);
        println!("{single} system calls for 2 turns, {turn} for 1 turn");
        assert!(single <= 3, "{single}");
        assert_eq!(turn, 1);
    }
}

/// Pages of a granule of 16 pages.
const GRANULE: u64 = 0x1_0000;

/// A granule of the memory file that the guest does not use.
const WHOLE: u64 = 0x60_0000;

fn guest_with_granules(features: Features) -> Guest {
    let mut guest = Guest::new(features, features);
    guest.device.ram.set_granule(GRANULE);
    guest
}

fn pages(numbers: impl IntoIterator<Item = u64>) -> Vec<u64> {
    numbers.into_iter().map(|it| WHOLE + it * 0x1000).collect()
}

#[test]
fn pages_in_the_balloon_add_up_to_a_huge_page_over_requests() {
    let mut guest = guest_with_granules(Features::MUST_TELL_HOST);
    let released = |guest: &Guest| guest.device.virtio_status().bytes_released;
    // Two halves of two huge pages, interleaved and in descending order.
    guest.send_pfns(Queue::Inflate, &pages((0..32).rev().step_by(2)));
    assert_eq!((released(&guest), guest.byte(WHOLE)), (0, 0x5a));
    guest.send_pfns(Queue::Inflate, &pages((0..31).rev().step_by(2)));
    assert_eq!((released(&guest), guest.byte(WHOLE)), (2 * GRANULE, 0));
    // A page that the guest uses again keeps its huge page.
    guest.send_pfns(Queue::Inflate, &pages(32..40));
    guest.send_pfns(Queue::Deflate, &pages([35]));
    guest.send_pfns(Queue::Inflate, &pages(40..48));
    assert_eq!(
        (released(&guest), guest.byte(WHOLE + 2 * GRANULE)),
        (2 * GRANULE, 0x5a)
    );
    guest.send_pfns(Queue::Inflate, &pages([35]));
    assert_eq!(released(&guest), 3 * GRANULE);
    // The next driver has an empty balloon.
    guest.send_pfns(Queue::Inflate, &pages(48..56));
    guest.start_driver(Features::MUST_TELL_HOST);
    guest.send_pfns(Queue::Inflate, &pages(56..64));
    assert_eq!(released(&guest), 3 * GRANULE);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn pages_do_not_add_up_if_the_driver_may_use_them_before_it_tells() {
    let mut guest = guest_with_granules(Features::NONE);
    guest.send_pfns(Queue::Inflate, &pages(0..8));
    guest.send_pfns(Queue::Inflate, &pages(8..16));
    assert_eq!(guest.device.virtio_status().bytes_released, 0);
    assert_eq!(guest.byte(WHOLE), 0x5a);
    guest.send_pfns(Queue::Inflate, &pages(0..16));
    assert_eq!(guest.device.virtio_status().bytes_released, GRANULE);
}

#[test]
fn reported_pages_do_not_add_up_over_reports() {
    let features = Features::REPORTING | Features::MUST_TELL_HOST;
    let mut guest = guest_with_granules(features);
    for half in [WHOLE, WHOLE + GRANULE / 2] {
        guest.send(Queue::Reporting, &[(half, GRANULE as u32 / 2, true)]);
    }
    assert_eq!(
        (
            guest.device.virtio_status().bytes_reported,
            guest.byte(WHOLE)
        ),
        (0, 0x5a)
    );
    guest.send(
        Queue::Reporting,
        &[
            (WHOLE + GRANULE / 2, GRANULE as u32 / 2, true),
            (WHOLE, GRANULE as u32 / 2, true),
        ],
    );
    assert_eq!(guest.device.virtio_status().bytes_reported, GRANULE);
}

#[test]
fn memory_whose_discarding_is_inhibited_keeps_its_content() {
    let features = DISCARD | Features::MUST_TELL_HOST;
    let mut guest = Guest::new(features, features);
    guest.device.inhibit_discard(true);
    guest.send_pfns(Queue::Inflate, &[FREE]);
    guest.send(Queue::Reporting, &[(FREE + 0x1000, 0x1000, true)]);
    guest.start_hint_round();
    guest.hint(FREE + 0x2000, 0x1000);
    // The hint spares sending, as for a driver without the promise.
    assert_eq!(guest.device.hinting_status().pages_cleared, 1);
    let status = guest.device.virtio_status();
    let released = status.bytes_released + status.bytes_reported + status.punches;
    assert_eq!((released, status.pages_inflated, status.errors), (0, 1, 0));
    assert!(!status.discards_hinted);
    for page in 0..3 {
        assert_eq!(guest.byte(FREE + page * 0x1000), 0x5a);
    }
    guest.device.inhibit_discard(false);
    guest.hint(FREE + 0x2000, 0x1000);
    guest.send_pfns(Queue::Inflate, &[FREE]);
    assert_eq!((guest.byte(FREE), guest.byte(FREE + 0x2000)), (0, 0));
}

#[test]
fn a_device_can_leave_other_processes_alone() {
    for searches in [true, false] {
        let device = Device::new(ALL, Arc::default());
        let device = match searches {
            true => device,
            false => device.without_pin_search(),
        };
        let mut guest = Guest::with_device(device, ALL);
        guest.send_pfns(Queue::Inflate, &[FREE]);
        assert_eq!(guest.device.discard_inhibition.scan.has_started(), searches);
        assert_eq!(guest.device.searches_for_pins(), searches);
    }
}

#[test]
fn a_device_that_pins_memory_inhibits_discarding() {
    let mut guest = Guest::new(Features::NONE, Features::NONE);
    let reason = "process 7 (vmm) maps guest memory and has /dev/vfio/1 open".to_owned();
    guest.device.set_pinning(Pinning {
        reason: Some(reason.clone()),
        examined: vec![5, 7],
    });
    assert_eq!(guest.device.discard_status().reasons, [reason]);
    assert!(guest.device.discard_status().is_inhibited);
    // A client cannot allow what would corrupt the guest.
    guest.device.inhibit_discard(false);
    assert!(guest.device.discard_status().is_inhibited);
    // It cannot be examined again, and others can. That tells nothing of it.
    for examined in [vec![], vec![5]] {
        let reason = None;
        guest.device.update_pinning(Pinning { reason, examined });
        assert!(guest.device.discard_status().is_inhibited);
    }
    guest.device.update_pinning(Pinning {
        reason: None,
        examined: vec![5, 7],
    });
    assert!(!guest.device.discard_status().is_inhibited);
}
