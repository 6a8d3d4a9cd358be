// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waits for the sockets of the server.

use std::io;

use rustix::event::{poll, PollFd, PollFlags};

use super::exit::LINGER_POLL_INTERVAL;
use super::Server;

/// The sockets that are ready.
pub(super) struct Ready {
    pub(super) wake: bool,
    pub(super) front_end_listener: bool,
    pub(super) qmp_listener: bool,
    pub(super) pending_connections: bool,
}

impl Server {
    /// Sleeps until a socket is ready.
    pub(super) fn wait(&self) -> io::Result<Ready> {
        let mut fds = vec![
            PollFd::new(&self.wake.0, PollFlags::IN),
            PollFd::new(&self.front_end_listener, PollFlags::IN),
        ];
        let qmp_listener = self.qmp_listener.as_ref();
        fds.extend(qmp_listener.map(|socket| PollFd::new(socket, PollFlags::IN)));
        let others = fds.len();
        fds.extend(
            self.pending_connections
                .iter()
                .map(|stream| PollFd::new(stream, PollFlags::IN)),
        );
        match poll(&mut fds, self.exit_deadline.map(|_| &LINGER_POLL_INTERVAL)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut happened = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(Ready {
            wake: happened.next().unwrap_or(false),
            front_end_listener: happened.next().unwrap_or(false),
            qmp_listener: others > 2 && happened.next().unwrap_or(false),
            pending_connections: happened.any(|happened| happened),
        })
    }
}
