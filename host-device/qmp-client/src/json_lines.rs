// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! JSON values, one a line, over a stream socket, with a limit on each wait and on each line.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::Serialize;
use thiserror::Error;

/// The longest line that is taken, in bytes, unless [`JsonLines::with_max_line`] says otherwise. The daemon's longest answer,
/// 65536 ranges, has less than half of that.
pub const MAX_LINE: usize = 8 << 20;

/// How long a peer may take to make room for what is written to it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of a line that is no proper JSON is shown.
const SHOWN: usize = 200;

/// Why the conversation cannot go on.
#[derive(Debug, Error)]
pub enum LineError {
    /// It ended.
    #[error("{peer} has closed the connection")]
    Closed {
        /// Who.
        peer: String,
    },
    /// The system reports an error.
    #[error("cannot {what} {peer}")]
    Io {
        /// `read from` or `write to`.
        what: &'static str,
        /// Who.
        peer: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A line does not end.
    #[error("{peer} sent a line of more than {limit} bytes")]
    TooLong {
        /// Who.
        peer: String,
        /// The limit.
        limit: usize,
    },
    /// A line is not what it should be.
    #[error("{peer} sent {line:?}")]
    Json {
        /// Who.
        peer: String,
        /// The beginning of the line.
        line: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A value cannot be written as JSON.
    #[error("cannot encode a message for {peer}")]
    Encode {
        /// Who would have got it.
        peer: String,
        /// The reason.
        source: serde_json::Error,
    },
}

/// One end of such a conversation.
#[derive(Debug)]
pub struct JsonLines {
    stream: UnixStream,
    received: Vec<u8>,
    max_line: usize,
    peer: String,
}

impl JsonLines {
    /// Talks over `stream`; `peer` names the other end in messages.
    #[must_use]
    pub fn new(stream: UnixStream, peer: impl Into<String>) -> Self {
        Self {
            stream,
            received: Vec::new(),
            max_line: MAX_LINE,
            peer: peer.into(),
        }
    }

    /// Takes lines of up to so many bytes.
    #[must_use]
    pub fn with_max_line(mut self, bytes: usize) -> Self {
        self.max_line = bytes;
        self
    }

    /// The name of the other end.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Sends one value.
    ///
    /// # Errors
    ///
    /// If the other end is gone, or does not read for half a minute.
    pub fn send(&mut self, value: &impl Serialize) -> Result<(), LineError> {
        let mut line = serde_json::to_vec(value).map_err(|source| LineError::Encode {
            peer: self.peer.clone(),
            source,
        })?;
        line.push(b'\n');
        let written = self
            .stream
            .set_write_timeout(Some(WRITE_TIMEOUT))
            .and_then(|()| self.stream.write_all(&line));
        written.map_err(|source| self.failed("write to", source))
    }

    /// The next value, or `None` when the limit is over. What had come by then of an unfinished line is kept.
    ///
    /// # Errors
    ///
    /// If the other end is gone or sent something else.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<T>, LineError> {
        let deadline = Instant::now() + timeout;
        let mut scanned = 0;
        loop {
            let fresh = self.received.get(scanned..).unwrap_or_default();
            if let Some(end) = fresh.iter().position(|&byte| byte == b'\n') {
                let rest = self.received.split_off(scanned + end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                return self.parse(&line).map(Some);
            }
            scanned = self.received.len();
            if scanned > self.max_line {
                return Err(LineError::TooLong {
                    peer: self.peer.clone(),
                    limit: self.max_line,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.read(left)?;
        }
    }

    /// Reads once, for `timeout` at most.
    fn read(&mut self, timeout: Duration) -> Result<(), LineError> {
        let mut bytes = [0; 64 * 1024];
        let read = self
            .stream
            .set_read_timeout(Some(timeout))
            .and_then(|()| self.stream.read(&mut bytes));
        match read {
            Ok(0) => Err(LineError::Closed {
                peer: self.peer.clone(),
            }),
            Ok(length) => {
                let bytes = bytes.get(..length).unwrap_or_default();
                self.received.extend_from_slice(bytes);
                Ok(())
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(()),
                // Its process has ended with something of ours unread.
                ErrorKind::ConnectionReset => Err(LineError::Closed {
                    peer: self.peer.clone(),
                }),
                _ => Err(self.failed("read from", error)),
            },
        }
    }

    fn parse<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, LineError> {
        serde_json::from_slice(line).map_err(|source| {
            let shown = line.get(..SHOWN).unwrap_or(line);
            LineError::Json {
                peer: self.peer.clone(),
                line: String::from_utf8_lossy(shown).trim_end().to_owned(),
                source,
            }
        })
    }

    fn failed(&self, what: &'static str, source: io::Error) -> LineError {
        LineError::Io {
            what,
            peer: self.peer.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(600);

    fn ends() -> (JsonLines, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (JsonLines::new(near, "the test"), far)
    }

    #[test]
    fn a_line_may_come_in_pieces_and_lines_may_come_together() {
        let (mut lines, mut far) = ends();
        far.write_all(b"[1,").unwrap();
        assert_eq!(
            lines.receive::<Vec<u8>>(Duration::from_millis(10)).unwrap(),
            None
        );
        far.write_all(b"2]\n[3]\n").unwrap();
        assert_eq!(lines.receive::<Vec<u8>>(LIMIT).unwrap(), Some(vec![1, 2]));
        assert_eq!(lines.receive::<Vec<u8>>(LIMIT).unwrap(), Some(vec![3]));
        drop(far);
        let error = lines.receive::<Vec<u8>>(LIMIT).unwrap_err();
        assert_eq!(error.to_string(), "the test has closed the connection");
    }

    #[test]
    fn a_line_that_does_not_end_is_given_up() {
        let (lines, mut far) = ends();
        let mut lines = lines.with_max_line(1000);
        far.write_all(&[b' '; 1001]).unwrap();
        let error = lines.receive::<u8>(LIMIT).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the test sent a line of more than 1000 bytes"
        );
    }

    #[test]
    fn nonsense_is_shown_but_not_all_of_it() {
        let (mut lines, mut far) = ends();
        far.write_all("x".repeat(5000).as_bytes()).unwrap();
        far.write_all(b"\n").unwrap();
        let error = lines.receive::<u8>(LIMIT).unwrap_err().to_string();
        assert!(error.starts_with("the test sent \"xxx") && error.len() < 300);
    }
}
