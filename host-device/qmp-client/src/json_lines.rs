// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! JSON values over a stream socket, one per line. Each wait has a timeout, and each line has a maximum length.

use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::Serialize;
use thiserror::Error;

use crate::deadline::Deadline;

/// Maximum length of a line in bytes, unless [`JsonLines::with_max_line`] sets another. The longest answer of the
/// daemon, with 65536 ranges, is less than half as long.
pub const MAX_LINE: usize = 8 << 20;

/// Timeout of a write, for all of its bytes together.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Capacity that the receive buffer keeps between two lines.
const KEPT_CAPACITY: usize = 256 << 10;

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
    /// Start of the first line in `received` that was not returned yet.
    start: usize,
    /// Bytes of `received` before this index contain no end of that line.
    scanned: usize,
    max_line: usize,
    write_timeout: Duration,
    peer: String,
}

impl JsonLines {
    /// Returns a connection over `stream`. `peer` names the peer in errors.
    #[must_use]
    pub fn new(stream: UnixStream, peer: impl Into<String>) -> Self {
        Self {
            stream,
            received: Vec::new(),
            start: 0,
            scanned: 0,
            max_line: MAX_LINE,
            write_timeout: WRITE_TIMEOUT,
            peer: peer.into(),
        }
    }

    /// Sets the maximum length of a received line, in bytes.
    #[must_use]
    pub fn with_max_line(mut self, bytes: usize) -> Self {
        self.max_line = bytes;
        self
    }

    /// Sets the timeout of a write, instead of 30 seconds.
    #[must_use]
    pub fn with_write_timeout(mut self, timeout: Duration) -> Self {
        self.write_timeout = timeout;
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
    /// If the value cannot be encoded, the connection is closed, or the peer does not read all of it within the timeout.
    /// The connection is unusable then.
    pub fn send(&mut self, value: &impl Serialize) -> Result<(), LineError> {
        let mut line = serde_json::to_vec(value).map_err(|source| LineError::Encode {
            peer: self.peer.clone(),
            source,
        })?;
        line.push(b'\n');
        self.write(&line)
            .map_err(|source| self.failed("write to", source))
    }

    /// Writes all bytes. A peer that reads slowly does not extend the timeout.
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let deadline = Deadline::after(self.write_timeout);
        while !bytes.is_empty() {
            let left = deadline.left();
            if left.is_zero() {
                let text = format!("peer did not read within {:?}", self.write_timeout);
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            self.stream.set_write_timeout(Some(left))?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if is_retried(error.kind()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns the next value, or `None` at the timeout. Keeps an unfinished line for the next call.
    /// [`Duration::MAX`] means no timeout.
    ///
    /// # Errors
    ///
    /// If the connection is closed or fails, or if the line is too long or does not contain the expected type.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<T>, LineError> {
        let received = self.receive_with_length(timeout)?;
        Ok(received.map(|(value, _)| value))
    }

    /// Does the same as [`JsonLines::receive`], and returns the length of the line in bytes as well.
    pub(crate) fn receive_with_length<T: DeserializeOwned>(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<(T, usize)>, LineError> {
        let deadline = Deadline::after(timeout);
        loop {
            if let Some(line) = self.next_line()? {
                let length = line.len();
                let line = self.received.get(line).unwrap_or_default();
                return self.parse(line).map(|value| Some((value, length)));
            }
            let left = deadline.left();
            if left.is_zero() {
                return Ok(None);
            }
            self.read(left)?;
        }
    }

    /// Returns the next complete line in the buffer, without its end.
    fn next_line(&mut self) -> Result<Option<Range<usize>>, LineError> {
        let fresh = self.received.get(self.scanned..).unwrap_or_default();
        let end = fresh.iter().position(|&byte| byte == b'\n');
        let end = end.map(|at| self.scanned + at);
        let length = end.unwrap_or(self.received.len()) - self.start;
        if length > self.max_line {
            return Err(LineError::TooLong {
                peer: self.peer.clone(),
                limit: self.max_line,
            });
        }
        let Some(end) = end else {
            self.scanned = self.received.len();
            return Ok(None);
        };
        let line = self.start..end;
        self.start = end + 1;
        self.scanned = self.start;
        Ok(Some(line))
    }

    /// Reads once, and waits for at most `timeout`.
    fn read(&mut self, timeout: Duration) -> Result<(), LineError> {
        // The buffer contains no complete line now, so this moves at most one unfinished line.
        self.received.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        if self.received.is_empty() {
            self.received.shrink_to(KEPT_CAPACITY);
        }
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
                kind if is_retried(kind) => Ok(()),
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

/// Returns whether a read or a write that failed is repeated until its deadline.
fn is_retried(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use std::thread;

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
    fn a_long_line_that_comes_in_one_read_is_given_up() {
        for (length, is_valid) in [(998, true), (999, false)] {
            let (lines, mut far) = ends();
            let mut lines = lines.with_max_line(1000);
            let line = format!("\"{}\"\n7\n", "x".repeat(length));
            far.write_all(line.as_bytes()).unwrap();
            match lines.receive::<String>(LIMIT) {
                Ok(text) => assert!(is_valid && text.unwrap().len() == length),
                Err(error) => assert!(!is_valid, "{length}: {error}"),
            }
        }
    }

    #[test]
    fn a_timeout_may_have_no_end() {
        let (mut lines, mut far) = ends();
        let writing = thread::spawn(move || {
            far.write_all(b"[1]\n").unwrap();
            far
        });
        let value = lines.receive::<Vec<u8>>(Duration::MAX).unwrap();
        assert_eq!(value, Some(vec![1]));
        drop(writing.join().unwrap());
        assert!(lines.receive::<Vec<u8>>(Duration::MAX).is_err());
    }

    /// The peer reads all the time, so no single write waits for long.
    #[test]
    fn a_peer_that_reads_slowly_does_not_extend_the_timeout() {
        let (mut lines, mut far) = ends();
        lines.write_timeout = Duration::from_millis(50);
        thread::spawn(move || {
            while far.read(&mut [0; 8]).is_ok_and(|length| length > 0) {
                thread::sleep(Duration::from_millis(1));
            }
        });
        let error = lines.send(&"x".repeat(8 << 20)).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "peer did not read within 50ms");
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
