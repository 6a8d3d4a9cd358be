// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! JSON values, one a line, over a stream socket, with a limit on each wait.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde::de::DeserializeOwned;
use serde::Serialize;

/// One end of such a conversation.
#[derive(Debug)]
pub struct JsonLines {
    stream: UnixStream,
    received: Vec<u8>,
    peer: &'static str,
}

impl JsonLines {
    /// Talks over `stream`; `peer` names the other end in messages.
    #[must_use]
    pub fn new(stream: UnixStream, peer: &'static str) -> Self {
        Self {
            stream,
            received: Vec::new(),
            peer,
        }
    }

    /// Sends one value.
    ///
    /// # Errors
    ///
    /// If the other end is gone.
    pub fn send(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value).context("cannot encode a message")?;
        line.push(b'\n');
        self.stream
            .write_all(&line)
            .with_context(|| format!("cannot write to {}", self.peer))
    }

    /// The next value, or `None` when the limit is over. What had come by then of an unfinished line is kept.
    ///
    /// # Errors
    ///
    /// If the other end is gone or sent something else.
    pub fn receive<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut scanned = 0;
        loop {
            let fresh = self.received.get(scanned..).unwrap_or_default();
            if let Some(end) = fresh.iter().position(|&byte| byte == b'\n') {
                let rest = self.received.split_off(scanned + end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                let value = serde_json::from_slice(&line);
                let shown = || format!("{} sent {:?}", self.peer, String::from_utf8_lossy(&line));
                return value.map(Some).with_context(shown);
            }
            scanned = self.received.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream
                .set_read_timeout(Some(left))
                .context("cannot set a time limit")?;
            let mut bytes = [0; 64 * 1024];
            match self.stream.read(&mut bytes) {
                Ok(0) => bail!("{} has closed the connection", self.peer),
                Ok(length) => self
                    .received
                    .extend_from_slice(bytes.get(..length).unwrap_or_default()),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => {
                        return Err(error)
                            .with_context(|| format!("cannot read from {}", self.peer))
                    }
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_may_come_in_pieces_and_lines_may_come_together() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut lines = JsonLines::new(near, "the test");
        far.write_all(b"[1,").unwrap();
        assert_eq!(
            lines.receive::<Vec<u8>>(Duration::from_millis(10)).unwrap(),
            None
        );
        far.write_all(b"2]\n[3]\n").unwrap();
        let limit = Duration::from_secs(5);
        assert_eq!(lines.receive::<Vec<u8>>(limit).unwrap(), Some(vec![1, 2]));
        assert_eq!(lines.receive::<Vec<u8>>(limit).unwrap(), Some(vec![3]));
        drop(far);
        let error = lines.receive::<Vec<u8>>(limit).unwrap_err();
        assert_eq!(error.to_string(), "the test has closed the connection");
    }
}
