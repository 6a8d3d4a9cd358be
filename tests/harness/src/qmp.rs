// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections on which QEMU and our daemon are commanded.

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

/// A connection on which commands may be given.
#[derive(Debug)]
pub struct Qmp(Client);

impl Qmp {
    /// Connects to a socket and negotiates.
    ///
    /// # Errors
    ///
    /// If nobody listens there, or it is no QMP.
    pub fn connect(path: &Path) -> Result<Self> {
        Ok(Self(Client::connect_timeout(path, HANG_TIMEOUT)?))
    }

    /// Negotiates on a connected stream.
    ///
    /// # Errors
    ///
    /// If it is no QMP.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let client = Client::from_stream(stream, "the QMP server", HANG_TIMEOUT)?;
        Ok(Self(client))
    }

    /// Gives a command and returns its answer.
    ///
    /// # Errors
    ///
    /// A [`QmpError`] if the peer refuses it (to be found with `downcast_ref`), else what went wrong on the way.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        match self.0.command(name, arguments) {
            Err(Error::Refused { qmp_error, .. }) => {
                Err(qmp_error).with_context(|| format!("{name} was refused"))
            }
            other => other.with_context(|| format!("the command {name}")),
        }
    }

    /// Gives a command without arguments and reads its answer into a type.
    ///
    /// # Errors
    ///
    /// As [`Qmp::command`], or if the answer is of another shape.
    pub fn query<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let value = self.command(name, json!({}))?;
        serde_json::from_value(value.clone())
            .with_context(|| format!("a strange answer to {name}: {value}"))
    }

    /// The first event, of those that came and were not taken and of those to come, that satisfies `wanted`; earlier
    /// ones are dropped. `None` when the limit is over.
    ///
    /// # Errors
    ///
    /// If the connection is gone.
    pub fn wait_event(
        &mut self,
        wanted: impl Fn(&Event) -> bool,
        timeout: Duration,
    ) -> Result<Option<Event>> {
        Ok(self.0.wait_event(wanted, timeout)?)
    }

    /// Forgets the events that have come.
    pub fn clear_events(&mut self) {
        self.0.clear_events();
    }

    /// Sets the memory that the guest should have, as QEMU's `balloon` does.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn set_balloon(&mut self, guest_bytes: u64) -> Result<()> {
        self.command("balloon", json!({ "value": guest_bytes }))
            .map(drop)
    }

    /// The memory that the guest has, as QEMU's `query-balloon` says.
    ///
    /// # Errors
    ///
    /// If it is refused: there is no device, or its driver is not loaded.
    pub fn balloon_actual(&mut self) -> Result<u64> {
        #[derive(Deserialize)]
        struct Balloon {
            actual: u64,
        }
        Ok(self.query::<Balloon>("query-balloon")?.actual)
    }

    /// Waits until the guest has at least so much memory, and returns how much it has.
    ///
    /// # Errors
    ///
    /// If it has less for longer than [`HANG_TIMEOUT`].
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
    /// If it has not by the limit.
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

    /// As [`Qmp::wait_balloon`], for as long as the balloon gets on.
    ///
    /// # Errors
    ///
    /// If it has not changed for all of `timeout`.
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

    /// Waits until the guest has as much memory as `set_balloon` asked for.
    ///
    /// # Errors
    ///
    /// If it has not by the limit.
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
            // QEMU tells of a change once a second at most; so look again sooner.
            self.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                Duration::from_millis(100),
            )?;
        }
    }
}
