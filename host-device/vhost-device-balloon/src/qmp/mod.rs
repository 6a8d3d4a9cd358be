// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket. It speaks QMP, the protocol of QEMU's monitor.
//!
//! Each client gets a greeting, must send `qmp_capabilities`, and may then send commands. An answer repeats the `id`
//! of its command. Events may arrive between answers. Commands and arguments are those of QEMU where QEMU has them.
//!
//! Two threads serve each client: one reads and executes its commands, the other writes answers and events.
//!
//! This file contains the set of connected clients. `client` serves one of them, `protocol` is its session, `dispatch`
//! finds the handler of a command, and `commands` and `migration_commands` contain the handlers.

mod client;
mod command;
mod commands;
mod context;
mod dispatch;
mod frames;
mod migration_commands;
mod protocol;

pub use context::CommandContext;

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use shared_abi::hinting::device::Phase;
use tracing::{info, warn};

use crate::sync::lock;
use client::{serve_client, write};

/// The most clients that are connected at the same time.
const MAX_CLIENTS: usize = 16;

/// The most answers and events that are queued for a client.
const MAX_LINES: usize = 1024;

/// The connected QMP clients.
pub struct QmpClients {
    context: Arc<CommandContext>,
    clients: Arc<Mutex<HashMap<u64, UnixStream>>>,
    threads: Vec<JoinHandle<()>>,
    next: u64,
}

impl QmpClients {
    /// Creates an empty set of clients.
    pub fn new(context: CommandContext) -> Self {
        Self {
            context: Arc::new(context),
            clients: Arc::default(),
            threads: Vec::new(),
            next: 1,
        }
    }

    /// Returns the number of connected clients.
    pub fn count(&self) -> usize {
        lock(&self.clients).len()
    }

    /// Serves a client in threads of its own. Refuses the client if too many are connected.
    pub fn serve(&mut self, stream: UnixStream) {
        self.threads.retain(|thread| !thread.is_finished());
        if lock(&self.clients).len() >= MAX_CLIENTS {
            warn!("QMP client refused: {MAX_CLIENTS} clients are connected");
            let line = protocol::error(None, "GenericError", "too many QMP clients are connected");
            let _ = stream.set_nonblocking(true);
            let _ = (&stream).write_all(format!("{line}\r\n").as_bytes());
            return;
        }
        let number = self.next;
        self.next += 1;
        if let Err(error) = self.start(number, stream) {
            warn!("QMP client {number} cannot be served: {error}");
            lock(&self.clients).remove(&number);
        }
    }

    fn start(&mut self, number: u64, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        lock(&self.clients).insert(number, stream.try_clone()?);
        let (lines, waiting) = sync_channel(MAX_LINES);
        let writer = stream.try_clone()?;
        let name = format!("qmp-client-{number}");
        self.threads.push(
            thread::Builder::new()
                .name(name.clone())
                .spawn(move || write(writer, &waiting))?,
        );
        let (context, clients) = (self.context.clone(), self.clients.clone());
        self.threads
            .push(thread::Builder::new().name(name).spawn(move || {
                info!("QMP client {number} connected");
                let why = serve_client(&stream, lines, &context);
                // The client can send no more commands. The writer thread closes the connection after the last line.
                let _ = stream.shutdown(Shutdown::Read);
                lock(&clients).remove(&number);
                let phase = lock(&context.device).hinting_status().phase;
                match phase {
                    Phase::Requested(id) | Phase::Started(id) => info!(
                        "QMP client {number} disconnected: {why}; hint round {:#x} continues",
                        id.number()
                    ),
                    _ => info!("QMP client {number} disconnected: {why}"),
                }
            })?);
        Ok(())
    }

    /// Closes all connections, and waits for their threads.
    pub fn close(self) {
        for stream in lock(&self.clients).values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
        let Self {
            clients,
            threads,
            context,
            ..
        } = self;
        // Queued lines are still written, but a client that does not read should not delay the end of the program.
        for stream in lock(&clients).values() {
            let _ = stream.set_write_timeout(Some(std::time::Duration::from_millis(200)));
        }
        drop(context);
        for thread in threads {
            let _ = thread.join();
        }
    }
}
