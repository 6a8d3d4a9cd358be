// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hint rounds.

use std::sync::Arc;

use shared_abi::features::Features;
use shared_abi::hinting::device::Phase;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use super::{Guest, ALL, FREE, LENGTH, SECOND, SECOND_LENGTH, START};
use crate::device::hinting::HintingError;
use crate::device::{BalloonError, Device, MissingMemory};
use crate::memory::Ram;
use crate::relay::ConfigNotifier;

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
fn r5_hints_outside_memory_are_refused_and_counted() {
    let mut guest = Guest::new(ALL, ALL);
    guest.start_hint_round();
    guest.hint(0x1000, 0x1000);
    guest.hint(u64::MAX - 0xfff, 0x2000);
    assert_eq!(guest.errors(), 2);
    assert!(guest
        .last_error()
        .starts_with("free-page queue: hint 0xfffffffffffff000"));
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
    let memory = guest.memory.clone();
    let ram = Ram::of_front_end(&memory.memory());
    guest.device.set_memory(memory, ram, None).unwrap();
    assert!(
        matches!(guest.device.hinting_status().phase, Phase::Started(_)),
        "the same layout ends nothing"
    );
    let other = crate::memory::tests::guest(&[(0, 0x10_0000, 0)]);
    let ram = Ram::of_front_end(&other);
    let memory = GuestMemoryAtomic::new(other);
    guest.device.set_memory(memory, ram, None).unwrap();
    assert_eq!(guest.device.hinting_status().phase, Phase::Stopped);
    let status = guest.device.hinting_status();
    // The last hint round was about the old memory.
    let total = (START + LENGTH + SECOND_LENGTH) >> 12;
    assert_eq!((status.pages_total, status.pages_dirty), (total, 0));
}

#[test]
fn hinting_needs_a_driver_that_accepted_it() {
    let mut device = Device::new(ALL, Arc::default());
    assert!(matches!(
        device.start_hinting(),
        Err(HintingError::NoFrontEnd)
    ));
    device.front_end_connected(Arc::<ConfigNotifier>::default());
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
    assert_eq!(
        guest.device.set_target(1),
        Err(BalloonError::NoMemory(MissingMemory::NoFrontEnd))
    );
}
