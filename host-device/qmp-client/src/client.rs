// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client: one QMP connection.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{json, Value};

use crate::connect::connect;
use crate::deadline::Deadline;
use crate::error::Error;
use crate::json_lines::{JsonLines, MAX_LINE};
use crate::message::{shown, Event, Message};

/// Default timeout of the greeting and of each command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum number of events that are kept. The oldest ones are dropped.
const MAX_EVENTS: usize = 1 << 14;
/// Maximum length of the lines of these events, in bytes.
const MAX_EVENT_BYTES: usize = MAX_LINE;

/// A QMP connection on which commands are executed.
///
/// It may be dropped at any time. The peer continues with the commands that it has received.
#[derive(Debug)]
pub struct Client {
    lines: JsonLines,
    /// Events that were kept, each with the length of its line.
    events: VecDeque<(Event, usize)>,
    /// Sum of these lengths.
    event_bytes: usize,
    last: u64,
    timeout: Duration,
}

impl Client {
    /// Connects to a socket and negotiates capabilities. The timeout is [`COMMAND_TIMEOUT`], for this and for each
    /// command.
    ///
    /// # Errors
    ///
    /// If the connection fails, or the peer does not speak QMP.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        Self::connect_timeout(path, COMMAND_TIMEOUT)
    }

    /// Connects as [`Client::connect`] does, with another timeout. [`Duration::MAX`] means no timeout.
    ///
    /// # Errors
    ///
    /// As [`Client::connect`].
    pub fn connect_timeout(path: &Path, timeout: Duration) -> Result<Self, Error> {
        let stream = connect(path, timeout).map_err(|source| Error::Connect {
            path: path.to_owned(),
            source,
        })?;
        let peer = format!("QMP server at {}", path.display());
        Self::from_stream(stream, &peer, timeout)
    }

    /// Negotiates capabilities on a connected stream. `peer` names the peer in errors.
    ///
    /// # Errors
    ///
    /// If the peer does not speak QMP.
    pub fn from_stream(stream: UnixStream, peer: &str, timeout: Duration) -> Result<Self, Error> {
        let mut client = Self {
            lines: JsonLines::new(stream, peer),
            events: VecDeque::new(),
            event_bytes: 0,
            last: 0,
            timeout,
        };
        match client.lines.receive(timeout)? {
            Some(Message::Greeting) => {}
            // The daemon sends an error instead of a greeting if too many clients are connected.
            Some(Message::Error { error, .. }) => {
                return Err(Error::Refused {
                    peer: peer.to_owned(),
                    command: "the connection".to_owned(),
                    qmp_error: error,
                })
            }
            Some(_) => {
                return Err(Error::NotQmp {
                    peer: peer.to_owned(),
                })
            }
            None => {
                return Err(Error::NoGreeting {
                    peer: peer.to_owned(),
                    timeout,
                })
            }
        }
        client.command("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Returns the name of the peer in errors.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.lines.peer()
    }

    /// Executes a command and returns its answer. Keeps the events that arrive meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the peer refuses the command. Otherwise an error of the connection, or [`Error::Timeout`].
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value, Error> {
        self.last = self.last.wrapping_add(1);
        let number = Value::from(self.last);
        self.lines
            .send(&json!({ "execute": name, "arguments": arguments, "id": number }))?;
        let deadline = Deadline::after(self.timeout);
        loop {
            let received = self.lines.receive_with_length(deadline.left())?;
            let Some((message, length)) = received else {
                return Err(Error::Timeout {
                    peer: self.peer().to_owned(),
                    command: name.to_owned(),
                    timeout: self.timeout,
                });
            };
            match message {
                Message::Event(event) => self.keep(event, length),
                Message::Return { value, id } if id.as_ref() == Some(&number) => return Ok(value),
                // An error without an id concerns a line that the peer could not parse. Only the line of this command
                // is in flight.
                Message::Error { error, id } if id.is_none() || id.as_ref() == Some(&number) => {
                    return Err(Error::Refused {
                        peer: self.peer().to_owned(),
                        command: name.to_owned(),
                        qmp_error: error,
                    });
                }
                // The answer to an earlier command that has timed out.
                Message::Return { .. } | Message::Error { .. } | Message::Greeting => {}
            }
        }
    }

    /// Executes a command without arguments and deserializes its answer.
    ///
    /// # Errors
    ///
    /// As [`Client::command`], or if the answer does not have the expected type.
    pub fn query<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, Error> {
        let value = self.command(name, json!({}))?;
        T::deserialize(&value).map_err(|source| Error::UnexpectedResponse {
            peer: self.peer().to_owned(),
            command: name.to_owned(),
            response: shown(&value.to_string()),
            source,
        })
    }

    /// Returns the first event that satisfies `wanted`, among the events that were kept and those that arrive. Drops
    /// the events before it. Returns `None` at the timeout.
    ///
    /// # Errors
    ///
    /// If the connection fails.
    pub fn wait_event(
        &mut self,
        wanted: impl Fn(&Event) -> bool,
        timeout: Duration,
    ) -> Result<Option<Event>, Error> {
        let deadline = Deadline::after(timeout);
        loop {
            while let Some(event) = self.drop_oldest() {
                if wanted(&event) {
                    return Ok(Some(event));
                }
            }
            match self.lines.receive_with_length(deadline.left())? {
                Some((Message::Event(event), length)) => self.keep(event, length),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// Drops the events that were kept.
    pub fn clear_events(&mut self) {
        self.events.clear();
        self.event_bytes = 0;
    }

    fn keep(&mut self, event: Event, length: usize) {
        self.event_bytes += length;
        self.events.push_back((event, length));
        while self.events.len() > MAX_EVENTS
            || self.event_bytes > MAX_EVENT_BYTES && self.events.len() > 1
        {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) -> Option<Event> {
        let (event, length) = self.events.pop_front()?;
        self.event_bytes -= length;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::thread;

    use super::*;

    /// A limit that only a hanging test exceeds.
    const LONG: Duration = Duration::from_secs(600);
    const SHORT: Duration = Duration::from_millis(20);

    /// Only the command that gets no answer has a short timeout.
    #[test]
    fn a_late_answer_is_not_taken_for_the_next_one() {
        let (near, far) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut output = far.try_clone().unwrap();
            let _ = writeln!(output, r#"{{"QMP": {{}}}}"#);
            for line in BufReader::new(far).lines() {
                let Ok(line) = line else { break };
                let command: Value = serde_json::from_str(&line).unwrap();
                let id = &command["id"];
                let _ = match command["execute"].as_str() {
                    Some("slow") => continue,
                    Some("quick") => {
                        let late = json!({ "return": "late", "id": 2 });
                        writeln!(output, "{late}").and_then(|()| {
                            writeln!(output, "{}", json!({ "return": "in time", "id": id }))
                        })
                    }
                    _ => writeln!(output, "{}", json!({ "return": {}, "id": id })),
                };
            }
        });
        let mut client = Client::from_stream(near, "the peer", LONG).unwrap();
        client.timeout = SHORT;
        let error = client.command("slow", json!({})).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the peer did not answer slow within 20ms"
        );
        client.timeout = LONG;
        let value: String = client.query("quick").unwrap();
        assert_eq!(value, "in time");
    }
}
