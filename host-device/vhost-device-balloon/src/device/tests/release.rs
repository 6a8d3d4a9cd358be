// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inflation and free page reporting: memory that is released to the host.

use shared_abi::features::Features;
use shared_abi::queue::Queue;

use super::{Guest, ALL, FREE, LENGTH, SECOND, SECOND_LENGTH, START};

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
