// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory statistics.

use shared_abi::queue::Queue;
use shared_abi::stats::{Stat, StatTag};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{Guest, ALL};

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
