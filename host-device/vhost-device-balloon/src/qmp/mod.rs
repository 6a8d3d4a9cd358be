// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The operators' socket, in the manner of QMP, the protocol of QEMU's monitor.
//!
//! Each operator gets a greeting, has to say `qmp_capabilities`, and may then send commands; a command's `id`
//! comes back with its answer. Events come in between. Commands and arguments are those of QEMU where QEMU
//! has them.

mod commands;
mod frames;
mod migrate;
mod protocol;

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use shared_abi::hinting::device::Phase;
use tracing::{debug, info, warn};

use crate::device::Device;
use crate::events::Events;
use crate::lock;
use crate::migrate::Migrations;
use frames::{FrameError, Frames};
use protocol::Conversation;

/// The most operators at a time.
const MAX_OPERATORS: usize = 16;
/// The most answers and events that wait for an operator to read them.
const MAX_LINES: usize = 1024;

/// What commands act on.
pub struct Target {
    /// The balloon.
    pub device: Arc<Mutex<Device>>,
    /// Its migrations.
    pub migrations: Arc<Migrations>,
    /// Where events come from.
    pub events: Arc<Events>,
    /// Ends the program.
    pub quit: Box<dyn Fn() + Send + Sync>,
}

/// The operators that are connected.
pub struct Operators {
    target: Arc<Target>,
    connected: Arc<Mutex<HashMap<u64, UnixStream>>>,
    threads: Vec<JoinHandle<()>>,
    next: u64,
}

impl Operators {
    /// Nobody yet.
    pub fn new(target: Target) -> Self {
        Self {
            target: Arc::new(target),
            connected: Arc::default(),
            threads: Vec::new(),
            next: 1,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        lock(&self.connected).len()
    }

    /// Serves an operator in threads of its own, if there are not too many.
    pub fn serve(&mut self, stream: UnixStream) {
        self.threads.retain(|thread| !thread.is_finished());
        if lock(&self.connected).len() >= MAX_OPERATORS {
            warn!("an operator was refused: {MAX_OPERATORS} are connected");
            let line = protocol::error(None, "GenericError", "too many operators are connected");
            let _ = stream.set_nonblocking(true);
            let _ = (&stream).write_all(format!("{line}\r\n").as_bytes());
            return;
        }
        let number = self.next;
        self.next += 1;
        if let Err(error) = self.start(number, stream) {
            warn!("operator {number} cannot be served: {error}");
            lock(&self.connected).remove(&number);
        }
    }

    fn start(&mut self, number: u64, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        lock(&self.connected).insert(number, stream.try_clone()?);
        let (lines, waiting) = sync_channel(MAX_LINES);
        let writer = stream.try_clone()?;
        let name = format!("operator-{number}");
        self.threads.push(
            thread::Builder::new()
                .name(name.clone())
                .spawn(move || write(writer, &waiting))?,
        );
        let (target, connected) = (self.target.clone(), self.connected.clone());
        self.threads
            .push(thread::Builder::new().name(name).spawn(move || {
                info!("operator {number} has connected");
                let why = converse(&stream, lines, &target);
                // The writer still holds a copy; the operator is to see the end now.
                let _ = stream.shutdown(Shutdown::Read);
                lock(&connected).remove(&number);
                let round = lock(&target.device).hinting().phase;
                match round {
                    Phase::Requested(id) | Phase::Started(id) => info!(
                        "operator {number} has gone: {why}; hinting round {:#x} goes on",
                        id.number()
                    ),
                    _ => info!("operator {number} has gone: {why}"),
                }
            })?);
        Ok(())
    }

    /// Ends all connections and waits for their threads.
    pub fn close(self) {
        for stream in lock(&self.connected).values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
        let Self {
            connected,
            threads,
            target,
            ..
        } = self;
        // What waits to be written may be written, but nobody is waited for who does not read.
        for stream in lock(&connected).values() {
            let _ = stream.set_write_timeout(Some(std::time::Duration::from_millis(200)));
        }
        drop(target);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// Reads commands and answers them until the operator goes. Returns why it went.
fn converse(stream: &UnixStream, lines: SyncSender<String>, target: &Target) -> String {
    let mut conversation = Conversation::new(target);
    if lines.send(protocol::greeting()).is_err() {
        return "it does not read".into();
    }
    let mut frames = Frames::new(stream);
    loop {
        let (answer, over) = match frames.next() {
            Ok(None) => return "it closed the connection".into(),
            Ok(Some(frame)) => (conversation.answer(&frame, &lines), None),
            Err(FrameError::Garbage) => {
                let text = "JSON parse error, an object was expected";
                (protocol::error(None, "GenericError", text), None)
            }
            Err(error @ FrameError::TooLong) => {
                let text = error.to_string();
                (protocol::error(None, "GenericError", &text), Some(text))
            }
            Err(FrameError::Io(error)) => return error.to_string(),
        };
        if lines.send(answer).is_err() {
            return "it does not read".into();
        }
        if let Some(why) = over {
            return why;
        }
        if conversation.quits() {
            (target.quit)();
        }
    }
}

fn write(mut stream: UnixStream, lines: &Receiver<String>) {
    for line in lines {
        if let Err(error) = stream.write_all(format!("{line}\r\n").as_bytes()) {
            debug!("an operator does not read: {error}");
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}
