// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket. It speaks QMP, the protocol of QEMU's monitor.
//!
//! Each client gets a greeting, must send `qmp_capabilities`, and may then send commands. An answer repeats the `id`
//! of its command. Events may arrive between answers. Commands and arguments are those of QEMU where QEMU has them.
//!
//! A thread serves each client. It never waits for a client that does not read: memory and time are limited for each
//! client, and so is the number of threads.
//!
//! This file contains the set of connected clients. `table` knows who has a place, `client` serves one client, `outbox`
//! is what waits to be written to it, `protocol` is its session, `dispatch` finds the handler of a command, and
//! `commands` and `migration_commands` contain the handlers.

mod client;
mod command;
mod commands;
mod context;
mod dispatch;
mod frames;
mod json;
mod migration_commands;
mod outbox;
mod protocol;
mod table;
#[cfg(test)]
mod tests;

pub use client::QmpLimits;
pub use context::CommandContext;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use shared_abi::hinting::device::Phase;
use tracing::{info, warn};

use crate::sync::lock;
use client::serve_client;
use outbox::Outbox;
use table::{Entry, Table};

/// How long the end of the program waits for commands that are being executed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The connected QMP clients.
pub struct QmpClients {
    shared: Arc<Shared>,
    limits: QmpLimits,
    next: u64,
}

/// What the threads of the clients share.
struct Shared {
    context: CommandContext,
    table: Mutex<Table>,
    /// Notified when a client leaves the table.
    left: Condvar,
}

impl QmpClients {
    /// Creates an empty set of clients.
    pub fn new(context: CommandContext) -> Self {
        Self::with_limits(context, QmpLimits::default())
    }

    /// Creates an empty set of clients with other limits than usual.
    pub fn with_limits(context: CommandContext, limits: QmpLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                context,
                table: Mutex::default(),
                left: Condvar::new(),
            }),
            limits,
            next: 1,
        }
    }

    /// Returns the number of connected clients.
    pub fn count(&self) -> usize {
        lock(&self.shared.table).len()
    }

    /// Serves a client in a thread of its own. Refuses the client if too many are connected.
    pub fn serve(&mut self, stream: UnixStream) {
        let has_room = lock(&self.shared.table).make_room(Instant::now(), self.limits.idle);
        if !has_room {
            warn!(
                "QMP client refused: {} clients are connected",
                table::MAX_CLIENTS
            );
            let line = protocol::error(None, "GenericError", "too many QMP clients are connected");
            let _ = stream.set_nonblocking(true);
            let _ = (&stream).write_all(format!("{line}\r\n").as_bytes());
            return;
        }
        let number = self.next;
        self.next += 1;
        if let Err(error) = self.start(number, stream) {
            warn!("QMP client {number} cannot be served: {error}");
            lock(&self.shared.table).remove(number);
        }
    }

    fn start(&mut self, number: u64, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        // 0 stands for a process outside the PID namespace of this one. (rustix has no value for that.)
        let process = getsockopt(&stream, PeerCredentials).ok();
        let process = process.map(|peer| peer.pid()).filter(|pid| *pid != 0);
        let entry = Arc::new(Entry::new(Outbox::new()?, process, Instant::now()));
        lock(&self.shared.table).insert(number, entry.clone());
        let (shared, limits) = (self.shared.clone(), self.limits);
        thread::Builder::new()
            .name(format!("qmp-client-{number}"))
            .spawn(move || {
                // Also after a panic, so that the place becomes free.
                let _left = Leave {
                    shared: &shared,
                    number,
                };
                // Closed before the place becomes free.
                let (stream, entry) = (stream, entry);
                shared.serve(number, &stream, &entry, limits);
            })?;
        Ok(())
    }

    /// Closes all connections, and waits for their threads. What waits for a client is still written if it reads.
    pub fn close(self) {
        let mut table = lock(&self.shared.table);
        for client in table.clients() {
            client.close("daemon is shutting down");
        }
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while table.len() > 0 {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                warn!(
                    "{} commands of QMP clients are still being executed; exiting without their answers",
                    table.len()
                );
                return;
            }
            (table, _) = self
                .shared
                .left
                .wait_timeout(table, rest)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn serve(&self, number: u64, stream: &UnixStream, entry: &Entry, limits: QmpLimits) {
        info!("QMP client {number} connected");
        let why = serve_client(stream, entry, &self.context, limits);
        let phase = lock(&self.context.device).hinting_status().phase;
        match phase {
            Phase::Requested(id) | Phase::Started(id) => info!(
                "QMP client {number} disconnected: {why}; hint round {:#x} continues",
                id.number()
            ),
            _ => info!("QMP client {number} disconnected: {why}"),
        }
    }
}

/// Removes a client from the table when its thread ends.
struct Leave<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        lock(&self.shared.table).remove(self.number);
        self.shared.left.notify_all();
    }
}
