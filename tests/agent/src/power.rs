// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end of the guest.

use std::process::ExitCode;

use nix::sys::reboot::{reboot, RebootMode};

/// Switches the guest off. Returns only if the kernel refuses, and then the kernel panics: its first process has ended.
pub fn off() -> ExitCode {
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("agent: cannot switch off: {error}");
    ExitCode::FAILURE
}
