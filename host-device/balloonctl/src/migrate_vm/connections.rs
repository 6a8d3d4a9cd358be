// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QMP connections to the three peers of a migration.

use std::time::{Duration, Instant};

use qmp_client::Client;
use serde::Deserialize;
use serde_json::{json, Value};

use super::peer::Peer;
use crate::error::CommandError;
use crate::interrupt::Interrupts;

/// Interval between two polls of a state that no event reports.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// QMP connections to all peers.
#[derive(Debug)]
pub struct Connections {
    /// The QEMU that runs the guest.
    pub source: Client,
    /// The QEMU that waits for the guest.
    pub destination: Client,
    /// The daemon at the source.
    pub daemon: Client,
}

/// The answer to `query-status`.
#[derive(Debug, Deserialize)]
pub(super) struct RunState {
    pub running: bool,
    pub status: String,
}

/// Parts of QEMU's answer to `query-migrate`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct QemuMigrationInfo {
    pub status: String,
    pub error_desc: Option<String>,
}

impl QemuMigrationInfo {
    pub fn is_over(&self) -> bool {
        ["", "none", "completed", "failed", "cancelled"].contains(&self.status.as_str())
    }
}

impl Connections {
    /// Returns the connection to a peer, or `None` for this program.
    pub(super) fn client_mut(&mut self, peer: Peer) -> Option<&mut Client> {
        match peer {
            Peer::Source => Some(&mut self.source),
            Peer::Destination => Some(&mut self.destination),
            Peer::Daemon => Some(&mut self.daemon),
            Peer::Here => None,
        }
    }
}

/// Returns a property of an object in QEMU, or `None` if the object or the property does not exist.
pub(super) fn property(
    qemu: &mut Client,
    path: &str,
    name: &str,
) -> Result<Option<Value>, CommandError> {
    match qemu.command("qom-get", json!({ "path": path, "property": name })) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_fatal() => Err(error.into()),
        Err(_) => Ok(None),
    }
}

/// Returns the QOM path of a device with an id.
pub(super) fn peripheral(id: &str) -> String {
    format!("/machine/peripheral/{id}")
}

/// Polls until `poll` returns a value.
///
/// # Errors
///
/// The error of `poll`; [`CommandError::TimedOut`], whose message starts with `what`; or [`CommandError::Cancelled`] at
/// an interrupt.
pub(super) fn wait<T>(
    what: &str,
    timeout: Duration,
    interrupts: Option<&Interrupts>,
    mut poll: impl FnMut() -> Result<Option<T>, CommandError>,
) -> Result<T, CommandError> {
    let begun = Instant::now();
    loop {
        if let Some(seen) = poll()? {
            return Ok(seen);
        }
        if interrupts.is_some_and(|interrupts| interrupts.count() > 0) {
            return Err(CommandError::Cancelled("interrupted".into()));
        }
        if begun.elapsed() > timeout {
            return Err(CommandError::TimedOut(format!("{what} within {timeout:?}")));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
