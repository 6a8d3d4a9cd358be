// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests our driver over the rings and transports of QEMU's device.

use anyhow::{ensure, Result};
use shared_abi::features::Features;

use crate::features::{all_of_qemu, machine, plug_and_try, InitOnFree};

/// Rings and transports: options for QEMU, a feature bit, and whether driver and device negotiate that feature.
const TRANSPORTS: [(&[&str], u32, bool); 8] = [
    (&["packed=on"], 34, true),
    (&["event_idx=off"], 29, false),
    (&["packed=on", "event_idx=off"], 29, false),
    // Our driver never accepts indirect descriptors.
    (&["indirect_desc=off"], 28, false),
    (&["in_order=on"], 35, true),
    (IN_ORDER_PACKED, 35, true),
    (&["disable-legacy=off"], 32, true),
    (&["disable-modern=on", "disable-legacy=off"], 32, false),
];

/// A packed ring with in-order use. Over it QEMU 11.1 never returns a request of several buffers to Linux 7.3, with our
/// driver or the C driver. A free page report has several buffers, so the test does not offer reporting.
const IN_ORDER_PACKED: &[&str] = &["packed=on", "in_order=on"];

#[test]
fn our_driver_works_over_any_ring_and_transport_of_qemu() -> Result<()> {
    let init_on_free = InitOnFree::Off;
    let mut guest = machine(init_on_free)?;
    for (options, bit, agreed) in TRANSPORTS {
        let mut offer = all_of_qemu();
        if options == IN_ORDER_PACKED {
            offer = offer.without(Features::REPORTING);
        }
        let features = plug_and_try(&mut guest, offer, init_on_free, options)?;
        ensure!(
            features.contains(Features::from_bits(1 << bit)) == agreed,
            "{options:?}: {:#x}",
            features.bits()
        );
    }
    guest.power_off()?;
    Ok(())
}
