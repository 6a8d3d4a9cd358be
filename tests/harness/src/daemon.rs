// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Our device: the daemon as a child, its control socket, and its log.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::process::{Process, Streams};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::HANG_TIMEOUT;

/// A daemon that listens.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    qmp: Qmp,
    socket: PathBuf,
    qmp_socket: PathBuf,
}

/// Some of what `query-virtio-status` says.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VirtioStatus {
    /// `no-front-end`, `no-driver` or `running`.
    pub status: String,
    /// Whether a front end is there.
    pub connected: bool,
    /// The names of the features that both sides have.
    pub negotiated_features: Vec<String>,
    /// What the guest fills its free pages with, if it says so.
    #[serde(rename = "poison-val")]
    pub poison: Option<u32>,
    /// The queues that there are.
    pub queues: Vec<QueueStatus>,
    /// How often configuration space was read.
    pub config_reads: u64,
    /// How often it was written.
    pub config_writes: u64,
    /// How often the front end was told that it has changed.
    pub config_changes: u64,
    /// Bytes that the guest gave back by reporting them.
    pub bytes_reported: u64,
}

impl VirtioStatus {
    /// Whether both sides have this feature.
    #[must_use]
    pub fn has_feature(&self, feature: &str) -> bool {
        self.negotiated_features.iter().any(|name| name == feature)
    }
}

/// One queue's counters.
#[derive(Clone, Debug, Deserialize)]
pub struct QueueStatus {
    /// Its name: `inflate`, `deflate`, `stats`, `free-page`, `reporting`.
    pub name: String,
    /// Its number on the wire.
    pub index: u16,
    /// How often the driver has notified: each time an exit of the guest.
    pub notifications: u64,
    /// How often the driver was interrupted.
    pub interrupts: u64,
    /// How many requests were taken.
    pub requests: u64,
}

/// What `query-guest-memory` says.
#[derive(Clone, Debug, Deserialize)]
pub struct GuestMemory {
    /// The guest's memory, piece by piece.
    pub regions: Vec<Region>,
    /// Bytes that the memory files occupy on the host.
    pub allocated: u64,
}

/// A piece of the guest's memory.
#[derive(Clone, Debug, Deserialize)]
pub struct Region {
    /// Its guest physical address.
    pub start: u64,
    /// Its bytes.
    pub length: u64,
    /// How many of them occupy memory on the host.
    pub allocated: u64,
}

impl Daemon {
    /// Starts `program` with its sockets in `scratch`, offering `features`, with further `options`, and waits until it
    /// listens.
    ///
    /// # Errors
    ///
    /// If it ends or does not listen in time; the error holds its log.
    pub fn start(
        program: &Path,
        scratch: &Scratch,
        features: &[&str],
        options: &[&str],
    ) -> Result<Self> {
        let (socket, qmp_socket) = (
            scratch.path("balloon.sock"),
            scratch.path("balloon-qmp.sock"),
        );
        let mut command = Command::new(program);
        command
            .arg("--socket-path")
            .arg(&socket)
            .arg("--qmp-socket")
            .arg(&qmp_socket)
            .arg("--features")
            .arg(features.join(","))
            .args(options);
        let mut process = Process::start("vhost-device-balloon", command, Streams::Collected)?;
        let qmp = wait_listening(&mut process, &socket, &qmp_socket);
        let qmp = qmp.with_context(|| process.diagnostics())?;
        Ok(Self {
            process,
            qmp,
            socket,
            qmp_socket,
        })
    }

    /// The socket for the VMM.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The socket for operators.
    #[must_use]
    pub fn qmp_socket(&self) -> &Path {
        &self.qmp_socket
    }

    /// The operator's connection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Another operator's connection.
    ///
    /// # Errors
    ///
    /// If the daemon is no more.
    pub fn connect(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp_socket)
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The state of the device's virtio side.
    ///
    /// # Errors
    ///
    /// As [`Qmp::query`].
    pub fn virtio_status(&mut self) -> Result<VirtioStatus> {
        self.qmp.query("query-virtio-status")
    }

    /// Waits until a driver is there and its queues can be used.
    ///
    /// # Errors
    ///
    /// If there is none in time.
    pub fn wait_driver(&mut self) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        while self.virtio_status()?.status != "running" {
            if Instant::now() > deadline {
                bail!("the device had no driver within {HANG_TIMEOUT:?}");
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Notifications of the driver so far, over all queues.
    ///
    /// # Errors
    ///
    /// As [`Qmp::query`].
    pub fn notifications(&mut self) -> Result<u64> {
        Ok(self
            .virtio_status()?
            .queues
            .iter()
            .map(|queue| queue.notifications)
            .sum())
    }

    /// Where the guest's memory is, and how much of it the host has given.
    ///
    /// # Errors
    ///
    /// As [`Qmp::query`].
    pub fn guest_memory(&mut self) -> Result<GuestMemory> {
        self.qmp.query("query-guest-memory")
    }

    /// Ends the daemon as an administrator would, and waits.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(HANG_TIMEOUT)
    }

    /// Waits until the daemon has ended by itself.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.process.wait(HANG_TIMEOUT)
    }

    /// The names of sockets that the daemon has left.
    #[must_use]
    pub fn leftover_sockets(&self) -> Vec<&Path> {
        [self.socket.as_path(), self.qmp_socket.as_path()]
            .into_iter()
            .filter(|path| path.exists())
            .collect()
    }
}

fn wait_listening(process: &mut Process, socket: &Path, qmp_socket: &Path) -> Result<Qmp> {
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        if let Some(status) = process.status()? {
            bail!("the daemon ended ({status}) before it listened");
        }
        if socket.exists() {
            if let Ok(qmp) = Qmp::connect(qmp_socket) {
                return Ok(qmp);
            }
        }
        if Instant::now() > deadline {
            bail!("the daemon did not listen within {HANG_TIMEOUT:?}");
        }
        sleep(Duration::from_millis(5));
    }
}
