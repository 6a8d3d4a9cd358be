// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of the QEMU Monitor Protocol, which QEMU and our daemon both speak.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};
use thiserror::Error;

use crate::json_lines::JsonLines;

/// How long a command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// The peer's refusal of a command.
#[derive(Clone, Debug, PartialEq, Eq, Error, Deserialize)]
#[error("{desc} ({class})")]
pub struct Refusal {
    /// The class of the error: `GenericError`, `CommandNotFound`, ...
    pub class: String,
    /// A sentence for people.
    pub desc: String,
}

/// Something that the peer told unasked.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// Its name: `BALLOON_CHANGE`, ...
    #[serde(rename = "event")]
    pub name: String,
    /// Its data, `null` if it has none.
    #[serde(default)]
    pub data: Value,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Event(Event),
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: Option<Value>,
    },
    Error {
        error: Refusal,
        id: Option<Value>,
    },
    Greeting {
        #[serde(rename = "QMP")]
        _greeting: Value,
    },
}

/// A connection on which commands may be given.
#[derive(Debug)]
pub struct Qmp {
    lines: JsonLines,
    events: VecDeque<Event>,
    last: u64,
}

impl Qmp {
    /// Connects to a socket and negotiates.
    ///
    /// # Errors
    ///
    /// If nobody listens there, or it is no QMP.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        Self::new(stream)
    }

    /// Negotiates on a connected stream.
    ///
    /// # Errors
    ///
    /// If it is no QMP.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self {
            lines: JsonLines::new(stream, "the QMP server"),
            events: VecDeque::new(),
            last: 0,
        };
        match qmp.lines.receive(COMMAND_LIMIT)? {
            Some(Message::Greeting { .. }) => {}
            Some(_) => bail!("the QMP server did not greet"),
            None => bail!("the QMP server did not greet within {COMMAND_LIMIT:?}"),
        }
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives a command and returns its answer.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] if the peer refuses it (to be found with `downcast_ref`), else what went wrong on the way.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        self.last += 1;
        let number = Value::from(self.last);
        self.lines
            .send(&json!({ "execute": name, "arguments": arguments, "id": number }))?;
        let deadline = Instant::now() + COMMAND_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self
                .lines
                .receive(left)
                .with_context(|| format!("the command {name}"))?;
            match message
                .with_context(|| format!("{name} was not answered within {COMMAND_LIMIT:?}"))?
            {
                Message::Event(event) => self.events.push_back(event),
                Message::Return { value, id } if id.as_ref() == Some(&number) => return Ok(value),
                Message::Error { error, id } if id.as_ref() == Some(&number) => {
                    return Err(error).with_context(|| format!("{name} was refused"));
                }
                Message::Return { .. } | Message::Error { .. } | Message::Greeting { .. } => {}
            }
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
        limit: Duration,
    ) -> Result<Option<Event>> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(Some(event));
                }
            }
            match self
                .lines
                .receive(deadline.saturating_duration_since(Instant::now()))?
            {
                Some(Message::Event(event)) => self.events.push_back(event),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// Forgets the events that have come.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Sets the memory that the guest should have, as QEMU's `balloon` does.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn balloon(&mut self, guest_bytes: u64) -> Result<()> {
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

    /// Waits until the guest has as much memory as `balloon` asked for.
    ///
    /// # Errors
    ///
    /// If it has not by the limit.
    pub fn wait_balloon(&mut self, guest_bytes: u64, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let actual = self.balloon_actual()?;
            if actual == guest_bytes {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the guest has {actual} bytes of memory, not {guest_bytes}, after {limit:?}");
            }
            // QEMU tells of a change once a second at most; so look again sooner.
            self.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                Duration::from_millis(100),
            )?;
        }
    }
}
