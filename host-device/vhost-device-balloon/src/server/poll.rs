// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waits for the sockets of the server.

use std::io;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use super::exit::LINGER_POLL_INTERVAL;
use super::Server;

/// The sockets that are ready.
#[derive(Debug, Default)]
pub(super) struct Ready {
    pub(super) wake: bool,
    pub(super) front_end_listener: bool,
    pub(super) qmp_listener: bool,
    /// The broker process has ended.
    pub(super) broker_end: bool,
}

impl Server {
    /// Sleeps until a socket is ready, or a time limit has passed.
    pub(super) fn wait(&mut self) -> io::Result<Ready> {
        let now = Instant::now();
        self.accept_pause = self.accept_pause.filter(|until| *until > now);
        let mut fds = vec![PollFd::new(&self.wake.0, PollFlags::IN)];
        // While it is paused, connections wait in the backlogs.
        let is_accepting = self.accept_pause.is_none();
        let mut listeners = 0;
        if is_accepting {
            fds.push(PollFd::new(&self.front_end_listener, PollFlags::IN));
            let qmp_listener = self.qmp_listener.as_ref();
            fds.extend(qmp_listener.map(|socket| PollFd::new(socket, PollFlags::IN)));
            listeners = fds.len() - 1;
        }
        let broker = self.broker.as_ref().filter(|_| !self.has_broker_ended);
        let broker_index = fds.len();
        // The host reports a closed connection whatever is asked for.
        let broker_end = broker.map(|it| PollFd::from_borrowed_fd(it.end(), PollFlags::RDHUP));
        let is_watching_broker = broker_end.is_some();
        fds.extend(broker_end);
        let silent = self.pending_connections.iter();
        fds.extend(
            silent
                .filter_map(|it| it.silent_stream())
                .map(|stream| PollFd::new(stream, PollFlags::IN)),
        );
        match poll(&mut fds, self.timeout().as_ref()) {
            Ok(_) => {}
            // Nothing is known to be ready.
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(error.into()),
        }
        let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            wake: is_ready(0),
            front_end_listener: listeners > 0 && is_ready(1),
            qmp_listener: listeners > 1 && is_ready(2),
            broker_end: is_watching_broker && is_ready(broker_index),
        })
    }

    /// Returns how long the server may sleep, if there is a limit.
    pub(super) fn timeout(&self) -> Option<Timespec> {
        let now = Instant::now();
        let silent = self.pending_connections.iter();
        silent
            .filter_map(|it| it.deadline())
            .chain(self.accept_pause)
            .map(|limit| limit.saturating_duration_since(now))
            .chain(self.exit_deadline.map(|_| LINGER_POLL_INTERVAL))
            .min()
            // Rounded up, so that the limit has passed when the sleep ends.
            .map(|rest| rest + Duration::from_millis(1))
            .and_then(|rest| Timespec::try_from(rest).ok())
    }
}
