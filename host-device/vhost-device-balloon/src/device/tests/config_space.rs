// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Configuration space, and notifications of its changes.

use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{Guest, ALL, FREE, LENGTH, SECOND_LENGTH};

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
fn a_reset_empties_the_balloon() {
    let all = LENGTH + SECOND_LENGTH;
    let resets: [fn(&mut Guest); 3] = [
        |guest| guest.device.reset(),
        |guest| {
            guest.send_pfns(Queue::Inflate, &[FREE]);
            guest.start_driver(ALL);
        },
        |guest| guest.start_driver(Features::STATS_VQ),
    ];
    for reset in resets {
        let mut guest = Guest::new(ALL, ALL);
        guest.device.write_config(4, &7u32.to_le_bytes());
        assert_eq!(guest.device.actual_size(), Ok(all - 0x7000));
        reset(&mut guest);
        assert_eq!(guest.device.actual_size(), Ok(all));
        assert_eq!(guest.config().actual, 0);
    }
    // A paused guest keeps it.
    let mut guest = Guest::new(ALL, ALL);
    guest.send_pfns(Queue::Inflate, &[FREE]);
    guest.device.write_config(4, &1u32.to_le_bytes());
    for ready in [false, true] {
        for vring in &guest.vrings {
            vring.set_queue_ready(ready);
        }
        guest.device.set_features(ALL.bits());
        assert_eq!(guest.device.actual_size(), Ok(all - 0x1000));
    }
}

#[test]
fn a_driver_is_gone_when_its_stopped_rings_are_overwritten() {
    let mut guest = Guest::new(ALL, ALL);
    guest.start_hint_round();
    guest.send_cmd_id(0);
    guest.device.write_config(4, &7u32.to_le_bytes());
    for vring in &guest.vrings {
        vring.set_queue_ready(false);
    }
    // The guest is paused, and its rings have not changed.
    guest.device.detect_driver_gone();
    let all = LENGTH + SECOND_LENGTH;
    assert_eq!(guest.device.actual_size(), Ok(all - 0x7000));
    assert!(guest.device.hinting_status().phase.id().is_some());
    let used_idx = GuestAddress(guest.queue(Queue::FreePage).0.base + 0x2002);
    let memory = guest.memory.memory();
    memory.write_obj(0xabcdu16, used_idx).unwrap();
    // A front end that sets the queues up may be between two drivers.
    guest.device.set_features(ALL.bits());
    guest.device.detect_driver_gone();
    assert_eq!(guest.device.actual_size(), Ok(all - 0x7000));
    guest.device.handle_driver_start();
    guest.device.detect_driver_gone();
    assert_eq!(guest.device.actual_size(), Ok(all));
    assert_eq!(guest.device.hinting_status().phase.id(), None);
    assert_eq!(guest.device.virtio_status().negotiated_features, None);
}

#[test]
fn a_target_above_guest_memory_is_all_of_it() {
    let mut guest = Guest::new(ALL, ALL);
    guest.device.set_target(LENGTH).unwrap();
    guest.device.set_target(u64::MAX).unwrap();
    assert_eq!(guest.config().num_pages, 0);
}
