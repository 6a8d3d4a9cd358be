// SPDX-License-Identifier: GPL-2.0

//! Timeouts for a host that makes no progress, from the module parameter `host_timeout_ms`.
//!
//! All functions read the parameter. Any context.

use kernel::time::Delta;
use kernel::{dev_warn, device};

use crate::virtio::compat::parameter;

/// The range of the parameter, in milliseconds.
const MIN_MS: u32 = 1;
const MAX_MS: u32 = 600_000;

/// The total timeout, in multiples of the timeout without progress.
const TOTAL: i64 = 5;

fn parameter_ms() -> u32 {
    parameter(crate::module_parameters::host_timeout_ms.value())
}

fn clamped_ms() -> u32 {
    parameter_ms().clamp(MIN_MS, MAX_MS)
}

/// Logs a warning if the parameter is out of range.
pub(crate) fn warn_if_clamped(dev: &device::Device) {
    let (requested, used) = (parameter_ms(), clamped_ms());
    if requested != used {
        dev_warn!(
            dev,
            "host_timeout_ms={} is out of range ({} to {}); using {}\n",
            requested,
            MIN_MS,
            MAX_MS,
            used
        );
    }
}

/// Returns how long the host may make no progress.
pub(crate) fn host() -> Delta {
    Delta::from_millis(i64::from(clamped_ms()))
}

/// Returns how long the migration of one page may take: half of [`host`], since the kernel can
/// migrate another page instead.
pub(crate) fn page_migration() -> Delta {
    Delta::from_micros(i64::from(clamped_ms()) * 500)
}

/// Returns how long a wait may take in total while the host makes progress.
pub(crate) fn total() -> Delta {
    Delta::from_millis(i64::from(clamped_ms()) * TOTAL)
}

/// Returns [`total`] in whole seconds, at least 1.
pub(crate) fn total_seconds() -> u32 {
    (total().as_millis() / 1000).clamp(1, i64::from(u32::MAX)) as u32
}
