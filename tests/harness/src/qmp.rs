// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QMP connections to QEMU and to our daemon.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use qmp_client::{Client, Error};
pub use qmp_client::{Event, QmpError};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};

use crate::HANG_TIMEOUT;

/// A QMP connection in command mode.
#[derive(Debug)]
pub struct Qmp(Client);

impl Qmp {
    /// Connects to a socket and negotiates capabilities.
    ///
    /// # Errors
    ///
    /// Fails if no process listens on the socket, or the peer is not a QMP server.
    pub fn connect(path: &Path) -> Result<Self> {
        Ok(Self(Client::connect_timeout(path, HANG_TIMEOUT)?))
    }

    /// Negotiates capabilities on a connected stream.
    ///
    /// # Errors
    ///
    /// Fails if the peer is not a QMP server.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let client = Client::from_stream(stream, "the QMP server", HANG_TIMEOUT)?;
        Ok(Self(client))
    }

    /// Executes a command and returns the answer.
    ///
    /// # Errors
    ///
    /// Fails with a [`QmpError`] (use `downcast_ref`) if the peer refuses the command, and with another error if the
    /// connection fails.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        match self.0.command(name, arguments) {
            Err(Error::Refused { qmp_error, .. }) => {
                Err(qmp_error).with_context(|| format!("{name} was refused"))
            }
            other => other.with_context(|| format!("the command {name}")),
        }
    }

    /// Executes a command without arguments and deserializes the answer.
    ///
    /// # Errors
    ///
    /// Fails for the reasons of [`Qmp::command`], or if the answer has another format.
    pub fn query<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let value = self.command(name, json!({}))?;
        serde_json::from_value(value.clone())
            .with_context(|| format!("a strange answer to {name}: {value}"))
    }

    /// Waits for the first event that satisfies `wanted`, including pending events. Drops earlier events. Returns
    /// `None` after `timeout`.
    ///
    /// # Errors
    ///
    /// Fails if the connection is closed.
    pub fn wait_event(
        &mut self,
        wanted: impl Fn(&Event) -> bool,
        timeout: Duration,
    ) -> Result<Option<Event>> {
        Ok(self.0.wait_event(wanted, timeout)?)
    }

    /// Drops all pending events.
    pub fn clear_events(&mut self) {
        self.0.clear_events();
    }

    /// Sets the target size of the guest's memory in bytes, as QEMU's `balloon` command.
    ///
    /// # Errors
    ///
    /// Fails if the peer refuses.
    pub fn set_balloon(&mut self, guest_bytes: u64) -> Result<()> {
        self.command("balloon", json!({ "value": guest_bytes }))
            .map(drop)
    }

    /// Returns the size of the guest's memory in bytes, as QEMU's `query-balloon` command.
    ///
    /// # Errors
    ///
    /// Fails if the peer refuses: there is no device, or no driver is loaded.
    pub fn balloon_actual(&mut self) -> Result<u64> {
        #[derive(Deserialize)]
        struct Balloon {
            actual: u64,
        }
        Ok(self.query::<Balloon>("query-balloon")?.actual)
    }

    /// Waits until the guest has at least `guest_bytes` of memory, and returns its size.
    ///
    /// # Errors
    ///
    /// Fails if the guest still has less after [`HANG_TIMEOUT`].
    pub fn wait_balloon_at_least(&mut self, guest_bytes: u64) -> Result<u64> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let actual = self.balloon_actual()?;
            if actual >= guest_bytes {
                return Ok(actual);
            }
            if Instant::now() > deadline {
                bail!("the guest has only {actual} bytes of memory, and not {guest_bytes}");
            }
            self.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                Duration::from_millis(100),
            )?;
        }
    }

    /// Waits until the guest has less memory than `guest_bytes`.
    ///
    /// # Errors
    ///
    /// Fails if the guest still has more after `timeout`.
    pub fn wait_balloon_below(&mut self, guest_bytes: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while self.balloon_actual()? >= guest_bytes {
            if Instant::now() > deadline {
                bail!("the guest still has {guest_bytes} bytes of memory after {timeout:?}");
            }
            self.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                Duration::from_millis(20),
            )?;
        }
        Ok(())
    }

    /// Does the same as [`Qmp::wait_balloon`], but `timeout` starts again whenever the size changes.
    ///
    /// # Errors
    ///
    /// Fails if the size has not changed for `timeout`.
    pub fn wait_balloon_with_progress(
        &mut self,
        guest_bytes: u64,
        timeout: Duration,
    ) -> Result<()> {
        let (mut since, mut last) = (Instant::now(), None);
        loop {
            let actual = self.balloon_actual()?;
            if actual == guest_bytes {
                return Ok(());
            }
            if last != Some(actual) {
                (since, last) = (Instant::now(), Some(actual));
            } else if since.elapsed() > timeout {
                bail!(
                    "the guest has had {actual} bytes of memory for {timeout:?}, and not {guest_bytes}"
                );
            }
            self.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                Duration::from_millis(100),
            )?;
        }
    }

    /// Waits until the guest has exactly `guest_bytes` of memory.
    ///
    /// # Errors
    ///
    /// Fails if the guest does not reach the size within `timeout`.
    pub fn wait_balloon(&mut self, guest_bytes: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let actual = self.balloon_actual()?;
            if actual == guest_bytes {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "the guest has {actual} bytes of memory, not {guest_bytes}, after {timeout:?}"
                );
            }
            // QEMU limits BALLOON_CHANGE events to one per second. Poll more often.
            self.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                Duration::from_millis(100),
            )?;
        }
    }
}
