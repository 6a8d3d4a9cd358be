// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! JSON values over a stream socket, one per line. Each wait has a timeout, and each line has a maximum length.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::Serialize;
use thiserror::Error;

/// Maximum length of a line in bytes, unless [`JsonLines::with_max_line`] sets another. The longest answer of the
/// daemon, with 65536 ranges, is less than half as long.
pub const MAX_LINE: usize = 8 << 20;

/// Timeout of a write if the peer does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum number of bytes of an invalid line in an error.
const SHOWN: usize = 200;

/// Why the connection is unusable.
#[derive(Debug, Error)]
pub enum LineError {
    /// The peer has closed the connection.
    #[error("{peer} closed the connection")]
    Closed {
        /// Name of the peer.
        peer: String,
    },
    /// A system call failed.
    #[error("cannot {what} {peer}")]
    Io {
        /// `read from` or `write to`.
        what: &'static str,
        /// Name of the peer.
        peer: String,
        /// The system error.
        source: io::Error,
    },
    /// A line exceeds the maximum length.
    #[error("{peer} sent a line of more than {limit} bytes")]
    TooLong {
        /// Name of the peer.
        peer: String,
        /// The maximum length in bytes.
        limit: usize,
    },
    /// A line is not JSON, or does not have the expected type.
    #[error("{peer} sent an invalid message: {line:?}")]
    Json {
        /// Name of the peer.
        peer: String,
        /// The beginning of the line.
        line: String,
        /// The reason why it cannot be deserialized.
        source: serde_json::Error,
    },
    /// A value cannot be written as JSON.
    #[error("message for {peer} cannot be encoded")]
    Encode {
        /// Name of the peer.
        peer: String,
        /// The reason.
        source: serde_json::Error,
    },
}

/// A connection that carries JSON values.
#[derive(Debug)]
pub struct JsonLines {
    stream: UnixStream,
    received: Vec<u8>,
    max_line: usize,
    peer: String,
}

impl JsonLines {
    /// Returns a connection over `stream`. `peer` names the peer in errors.
    #[must_use]
    pub fn new(stream: UnixStream, peer: impl Into<String>) -> Self {
        Self {
            stream,
            received: Vec::new(),
            max_line: MAX_LINE,
            peer: peer.into(),
        }
    }

    /// Sets the maximum length of a received line, in bytes.
    #[must_use]
    pub fn with_max_line(mut self, bytes: usize) -> Self {
        self.max_line = bytes;
        self
    }

    /// Returns the name of the peer.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Sends one value.
    ///
    /// # Errors
    ///
    /// If the value cannot be encoded, the connection is closed, or the peer does not read for 30 seconds.
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

    /// Returns the next value, or `None` at the timeout. Keeps an unfinished line for the next call.
    ///
    /// # Errors
    ///
    /// If the connection is closed or fails, or if the line is too long or does not contain the expected type.
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

    /// Reads once, and waits for at most `timeout`.
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
                // The peer has exited without reading all of our data.
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
        assert_eq!(error.to_string(), "the test closed the connection");
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
        assert!(error.starts_with("the test sent an invalid message: \"xxx") && error.len() < 300);
    }
}
