// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What signals do to the program.
//!
//! SIGTERM, SIGINT, SIGHUP (the terminal was closed), SIGQUIT and SIGXCPU (the limit of processor time) end it cleanly: a
//! migration is cancelled and rolled back, and the sockets are removed. A signal that was ignored when the program
//! started stays ignored, as `nohup` and shells without job control want it. A signal that was blocked then is unblocked.
//! SIGUSR1 and SIGUSR2 have no meaning and do
//! nothing. SIGXFSZ does nothing: a write beyond the limit of file sizes fails. SIGPIPE is ignored, as in each Rust
//! program.

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use guest_migration::signals::{is_ignored, unblock_all};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGXFSZ};
use signal_hook::flag;
use signal_hook::low_level::pipe;

use crate::server::ShutdownHandle;

/// Lets signals end the server that `shutdown_handle` belongs to.
///
/// # Errors
///
/// If the host has no descriptors left, or a signal cannot be handled.
pub fn handle_signals(shutdown_handle: &ShutdownHandle) -> io::Result<()> {
    unblock_all()?;
    for signal in [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGXCPU] {
        if !is_ignored(signal) {
            pipe::register(signal, shutdown_handle.stream()?)?;
        }
    }
    for signal in [SIGUSR1, SIGUSR2, SIGXFSZ] {
        flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}
