// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Our device: the daemon as a child process, its QMP socket, and its log.

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

/// A daemon that listens on its sockets.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    qmp: Qmp,
    socket: PathBuf,
    qmp_socket: PathBuf,
}

/// A part of the answer to `query-virtio-status`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VirtioStatus {
    /// `no-front-end`, `no-driver` or `running`.
    pub status: String,
    /// Whether a front end is connected.
    pub connected: bool,
    /// The names of the negotiated features.
    pub negotiated_features: Vec<String>,
    /// The guest's page poison value, if the guest has set one.
    #[serde(rename = "poison-val")]
    pub poison: Option<u32>,
    /// The queues of the device.
    pub queues: Vec<QueueStatus>,
    /// The number of reads of the config space.
    pub config_reads: u64,
    /// The number of writes to the config space.
    pub config_writes: u64,
    /// The number of config change notifications to the front end.
    pub config_changes: u64,
    /// The size of the memory that the guest has reported as free, in bytes.
    pub bytes_reported: u64,
}

impl VirtioStatus {
    /// Returns whether `feature` is negotiated.
    #[must_use]
    pub fn has_feature(&self, feature: &str) -> bool {
        self.negotiated_features.iter().any(|name| name == feature)
    }
}

/// The counters of a queue.
#[derive(Clone, Debug, Deserialize)]
pub struct QueueStatus {
    /// The name of the queue: `inflate`, `deflate`, `stats`, `free-page`, `reporting`.
    pub name: String,
    /// The virtqueue index.
    pub index: u16,
    /// The number of notifications by the driver. Each one is an exit of the guest.
    pub notifications: u64,
    /// The number of interrupts to the driver.
    pub interrupts: u64,
    /// The number of requests that the device has taken.
    pub requests: u64,
}

/// The answer to `query-guest-memory`.
#[derive(Clone, Debug, Deserialize)]
pub struct GuestMemory {
    /// The regions of guest memory.
    pub regions: Vec<Region>,
    /// The size of the memory files on the host, in allocated bytes.
    pub allocated: u64,
}

/// A region of guest memory.
#[derive(Clone, Debug, Deserialize)]
pub struct Region {
    /// The guest physical address of the region.
    pub start: u64,
    /// The size of the region, in bytes.
    pub length: u64,
    /// The part of the region that is allocated on the host, in bytes.
    pub allocated: u64,
}

impl Daemon {
    /// Starts `program` with its sockets in `scratch`, with `features` to offer and further `options`. Waits until the
    /// daemon listens.
    ///
    /// # Errors
    ///
    /// Fails if the daemon ends, or does not listen within [`HANG_TIMEOUT`]. The error contains the daemon's log.
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

    /// Returns the path of the vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the path of the QMP socket.
    #[must_use]
    pub fn qmp_socket(&self) -> &Path {
        &self.qmp_socket
    }

    /// Returns the QMP connection of this handle.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Opens another QMP connection.
    ///
    /// # Errors
    ///
    /// Fails if the daemon has ended.
    pub fn connect(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp_socket)
    }

    /// Returns the process of the daemon.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Returns the virtio state of the device.
    ///
    /// # Errors
    ///
    /// Same as [`Qmp::query`].
    pub fn virtio_status(&mut self) -> Result<VirtioStatus> {
        self.qmp.query("query-virtio-status")
    }

    /// Waits until a driver is ready and its queues are usable.
    ///
    /// # Errors
    ///
    /// Fails if no driver is ready within [`HANG_TIMEOUT`].
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

    /// Returns the number of the driver's notifications so far, over all queues.
    ///
    /// # Errors
    ///
    /// Same as [`Qmp::query`].
    pub fn notifications(&mut self) -> Result<u64> {
        Ok(self
            .virtio_status()?
            .queues
            .iter()
            .map(|queue| queue.notifications)
            .sum())
    }

    /// Returns the regions of guest memory, and how much of them is allocated on the host.
    ///
    /// # Errors
    ///
    /// Same as [`Qmp::query`].
    pub fn guest_memory(&mut self) -> Result<GuestMemory> {
        self.qmp.query("query-guest-memory")
    }

    /// Ends the daemon with SIGTERM, as an administrator does, and waits until it has ended.
    ///
    /// # Errors
    ///
    /// Fails if the daemon does not end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(HANG_TIMEOUT)
    }

    /// Waits until the daemon ends without a signal.
    ///
    /// # Errors
    ///
    /// Fails if the daemon does not end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.process.wait(HANG_TIMEOUT)
    }

    /// Returns the sockets of the daemon that still exist.
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
