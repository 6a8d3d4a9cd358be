// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests and rings that no correct driver produces.

use proptest::prelude::*;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{
    Guest, ALL, DISCARD, FREE, INDIRECT, LENGTH, NEXT, SECOND, SECOND_LENGTH, SIZE, START, WRITE,
};
use crate::device::queues::DRAIN_BUDGET;

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
    // Every second page frame number, so that no ranges merge. All are outside memory, which costs as much work.
    let bytes: Vec<u8> = (0..40_000u32)
        .flat_map(|number| (0x10_0000 + number * 2).to_le_bytes())
        .collect();
    guest
        .memory
        .memory()
        .write_slice(&bytes, GuestAddress(FREE))
        .unwrap();
    guest.add(Queue::Inflate, &[(FREE, bytes.len() as u32, false)]);
    guest.offer(Queue::Inflate, 0);
    let (_, index) = guest.queue(Queue::Inflate);
    let mut turns = 1;
    while guest.kick_index(index) {
        turns += 1;
    }
    // A unit of work for each range.
    assert!(turns >= 2 * 40_000 / DRAIN_BUDGET, "{turns}");
    assert_eq!(guest.returned(Queue::Inflate), 2);
    assert_eq!(guest.errors(), 2, "one for each request");
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
            while guest.kick_index(index) {}
        }
        let status = guest.device.hinting_status();
        let clean: u64 = guest.device.hinted_ranges(0, usize::MAX).iter().map(|(_, length)| length >> 12).sum();
        prop_assert_eq!(status.pages_total - status.pages_dirty, clean);
        prop_assert_eq!(guest.config().num_pages, 0);
    }
}
