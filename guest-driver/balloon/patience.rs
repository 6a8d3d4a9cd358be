// SPDX-License-Identifier: GPL-2.0

//! How long the driver waits for a host that does not answer.

use kernel::time::Delta;
use kernel::{dev_warn, device};

use crate::virtio::compat::parameter;

/// What the administrator can have, in milliseconds.
const SHORTEST_MS: u32 = 1;
const LONGEST_MS: u32 = 600_000;

fn limit_ms() -> i64 {
    let wanted: u32 = parameter(crate::module_parameters::host_patience_ms.value());
    i64::from(wanted.clamp(SHORTEST_MS, LONGEST_MS))
}

/// Says in the log if it cannot be as the administrator wants it.
pub(crate) fn check(dev: &device::Device) {
    let wanted: u32 = parameter(crate::module_parameters::host_patience_ms.value());
    if i64::from(wanted) != limit_ms() {
        dev_warn!(
            dev,
            "host_patience_ms={} is not within {} and {}; taking {}\n",
            wanted,
            SHORTEST_MS,
            LONGEST_MS,
            limit_ms()
        );
    }
}

/// How long a host from which something is wanted may make no progress.
pub(crate) fn usual() -> Delta {
    Delta::from_millis(limit_ms())
}

/// How long the kernel waits for one page that it moves: it can take another.
pub(crate) fn for_one_page() -> Delta {
    Delta::from_micros(limit_ms() * 500)
}

/// The longest wait for a host that makes progress now and then.
pub(crate) fn longest() -> Delta {
    Delta::from_millis(limit_ms() * 5)
}

/// As [`longest`], in whole seconds, and not zero.
pub(crate) fn longest_in_seconds() -> u32 {
    (longest().as_millis() / 1000).clamp(1, i64::from(u32::MAX)) as u32
}
