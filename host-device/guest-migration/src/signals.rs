// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Signals of this process.

use std::fs;
use std::io;
use std::sync::Arc;

use nix::sys::signal::SigSet;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// Lets this process ignore SIGHUP, SIGINT, SIGTERM and SIGQUIT, and gives it a session of its own, so that whatever ends
/// its parent does not end it. A write beyond the limit of file sizes then fails, and does not end it either (SIGXFSZ).
///
/// # Errors
///
/// If a signal cannot be ignored.
pub fn outlive_parent() -> io::Result<()> {
    for signal in [SIGHUP, SIGINT, SIGTERM, SIGQUIT, SIGXFSZ] {
        flag::register(signal, Arc::default())?;
    }
    // Fails only for the leader of a process group, which is no child of our parent.
    let _ = rustix::process::setsid();
    Ok(())
}

/// Unblocks all signals for the calling thread, and the threads that it starts later. The program that has started this one
/// may have blocked them.
///
/// # Errors
///
/// If the kernel refuses.
pub fn unblock_all() -> io::Result<()> {
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Returns whether this process ignores a signal. Under `nohup`, SIGHUP is ignored from the start of a program, and a
/// program should leave it so.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let bit = signal
        .checked_sub(1)
        .and_then(|bit| u32::try_from(bit).ok());
    let bit = bit.and_then(|bit| 1u64.checked_shl(bit));
    matches!((mask, bit), (Some(mask), Some(bit)) if mask & bit != 0)
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::{SIGHUP, SIGPIPE};

    use super::is_ignored;

    /// The runtime of Rust ignores SIGPIPE in each program.
    #[test]
    fn the_mask_of_the_kernel_is_read() {
        assert!(is_ignored(SIGPIPE));
        for signal in [SIGHUP, 0, -1, i32::MIN, 65] {
            // SIGHUP is ignored if the tests run under nohup.
            assert!(!is_ignored(signal) || signal == SIGHUP, "{signal}");
        }
    }
}
