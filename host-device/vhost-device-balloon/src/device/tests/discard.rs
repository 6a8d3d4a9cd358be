// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hints that discard (R17).

use guest_migration::SyncPhase;
use shared_abi::queue::Queue;

use super::{Guest, ALL, DISCARD, FREE, LENGTH, SECOND, START};
use crate::device::hinting;

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
        .starts_with("free-page queue: hint 0xfffffffffffff000"));
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
fn r17_hints_below_a_huge_page_spare_sending_only() {
    let mut guest = Guest::new(DISCARD, DISCARD);
    guest.device.ram.set_granule(0x1_0000);
    guest.start_hint_round();
    // A whole huge page and a half.
    guest.hint(0x60_0000, 0x1_8000);
    guest.hint(0x64_0000, 0x1000);
    let status = guest.device.hinting_status();
    assert_eq!(
        (status.bytes_discarded, status.pages_cleared),
        (0x1_0000, 25)
    );
    let bytes = [0x60_ffff, 0x61_0000, 0x64_0000].map(|it| guest.byte(it));
    assert_eq!(bytes, [0, 0x5a, 0x5a]);
}

#[test]
fn r17_a_migration_that_compares_content_gets_no_hint_that_discards_nothing() {
    let mut guest = Guest::new(DISCARD, DISCARD);
    guest.device.ram.set_granule(0x1_0000);
    let claimed = guest.device.claim(Box::new(|_| {})).unwrap();
    assert!(claimed.discards);
    let window = || {
        let sync = SyncPhase::new(claimed.memory.layout()).unwrap();
        sync.set_all();
        sync.finish()
    };
    for (inhibited, needs_discard, spared) in [
        (false, true, 0x10),
        (true, true, 0),
        (false, false, 0x18),
        (true, false, 0x18),
    ] {
        guest.device.inhibit_discard(inhibited);
        guest.device.set_hints_need_discard(needs_discard);
        let Ok(id) = guest.device.open_window(window()) else {
            panic!("the window opens");
        };
        guest.send_cmd_id(id.number());
        guest.hint(0x60_0000, 0x1_8000);
        let window = guest.device.close_window().unwrap();
        let bitmap = window.bitmap();
        assert_eq!(
            bitmap.pages() - bitmap.dirty_pages(),
            spared,
            "{inhibited} {needs_discard}"
        );
    }
    guest.device.release_claim();
}
