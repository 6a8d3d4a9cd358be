// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection that is not the front end yet.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a connection may send nothing. A VMM may connect minutes before it sets up its devices, while it
/// allocates guest memory.
pub(super) const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(600);

/// A connection that is not the front end yet.
#[derive(Debug)]
pub(super) struct PendingConnection {
    pub(super) stream: UnixStream,
    pub(super) since: Instant,
    /// Whether it has sent something, and waits for the end of the last session or migration.
    pub(super) has_sent: bool,
}

impl PendingConnection {
    /// Returns the stream to wait for, if the connection has sent nothing yet.
    pub(super) fn silent_stream(&self) -> Option<&UnixStream> {
        (!self.has_sent).then_some(&self.stream)
    }

    /// Returns the time by which it must have sent something.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.has_sent).then(|| self.since + FIRST_BYTE_TIMEOUT)
    }
}
