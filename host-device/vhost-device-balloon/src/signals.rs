// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What signals do to the program.
//!
//! SIGTERM, SIGINT, SIGHUP (the terminal was closed) and SIGQUIT end it cleanly: a migration is cancelled and rolled
//! back, and the sockets are removed. A signal that was ignored when the program started stays ignored, as `nohup`
//! and shells without job control want it. SIGUSR1 and SIGUSR2 have no meaning and do nothing. SIGPIPE is ignored, as in
//! each Rust program.

use std::fs;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::flag;
use signal_hook::low_level::pipe;

use crate::server::ShutdownHandle;

/// Lets signals end the server that `shutdown_handle` belongs to.
///
/// # Errors
///
/// If the host has no descriptors left, or a signal cannot be handled.
pub fn handle_signals(shutdown_handle: &ShutdownHandle) -> io::Result<()> {
    let ignored = ignored_signals(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    let is_ignored = |signal: i32| {
        let bit = u32::try_from(signal - 1).ok();
        bit.is_some_and(|bit| ignored.checked_shr(bit).unwrap_or(0) & 1 == 1)
    };
    for signal in [SIGTERM, SIGINT, SIGHUP, SIGQUIT] {
        if !is_ignored(signal) {
            pipe::register(signal, shutdown_handle.stream()?)?;
        }
    }
    for signal in [SIGUSR1, SIGUSR2] {
        flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}

/// Returns the mask of ignored signals in a `/proc/PID/status`: signal 1 is bit 0.
fn ignored_signals(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        let status = "Name:\tcat\nSigBlk:\t00000000000000ff\nSigIgn:\t0000000000001001\n";
        assert_eq!(ignored_signals(status), 0x1001);
        assert_eq!(ignored_signals("Name:\tcat\n"), 0);
    }
}
