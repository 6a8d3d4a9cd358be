// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A panic in any thread ends the program, after a message. Without that thread the program would still accept
//! connections, and would no longer serve them.

use std::panic::{self, PanicHookInfo};
use std::thread;

use tracing::error;

use crate::server::ShutdownHandle;

/// Makes each panic a log message and an orderly end of the server that `shutdown_handle` belongs to, which then
/// fails.
pub fn end_server_on_panic(shutdown_handle: ShutdownHandle) {
    panic::set_hook(Box::new(move |info| {
        error!("{}", describe(info));
        shutdown_handle.fail();
    }));
}

fn describe(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("unknown reason");
    let thread = thread::current();
    let name = thread.name().unwrap_or("unnamed");
    match info.location() {
        Some(at) => {
            format!("thread {name} panicked at {at}: {text}; this is a fault of the daemon")
        }
        None => format!("thread {name} panicked: {text}; this is a fault of the daemon"),
    }
}
