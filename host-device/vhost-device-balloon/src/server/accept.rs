// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which connection becomes the front end, and which is refused. A balloon serves one guest at a time.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;
use tracing::{debug, info, warn};

use super::pending_connection::{PendingConnection, FIRST_BYTE_TIMEOUT};
use super::{Server, SESSION_ENDED};
use crate::private_connection::PrivateConnection;
use crate::session::{Session, SessionError};
use crate::socket::SocketListener;

/// The most connections that wait to become the front end.
const MAX_PENDING_CONNECTIONS: usize = 8;

/// The most connections that are accepted before other work gets a turn.
const MAX_ACCEPTS: usize = 64;

/// How long the server accepts nothing after an error of the host, such as no free descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Whether a connection can become the front end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Free,
    /// The last session or its migration is about to end.
    FreeSoon,
    /// A front end is connected.
    Taken,
    /// The program ends after the migration of a guest that has disconnected.
    Ending,
}

impl Server {
    fn place(&self) -> Place {
        match &self.session {
            Some(session) if session.is_ending() => Place::FreeSoon,
            Some(_) => Place::Taken,
            None if self.session_end.is_some() => Place::Ending,
            None if self.migration_manager.is_in_progress() => Place::FreeSoon,
            None => Place::Free,
        }
    }

    /// Accepts the connections in the backlogs of both sockets. After an error of the host, the next attempt is
    /// [`ACCEPT_PAUSE`] later: the connections stay in the backlogs.
    pub(super) fn accept_connections(&mut self, front_end: bool, qmp: bool) {
        let result = self
            .accept_front_ends(front_end)
            .and_then(|()| self.accept_qmp_clients(qmp));
        if let Err(error) = result {
            warn!(
                "connections cannot be accepted: {error}; next attempt in {} s",
                ACCEPT_PAUSE.as_secs()
            );
            self.accept_pause = Some(Instant::now() + ACCEPT_PAUSE);
        }
    }

    fn accept_front_ends(&mut self, is_ready: bool) -> io::Result<()> {
        for _ in 0..MAX_ACCEPTS {
            if !is_ready {
                break;
            }
            let Some(stream) = self.front_end_listener.accept()? else {
                break;
            };
            self.add_pending_connection(stream);
        }
        Ok(())
    }

    fn accept_qmp_clients(&mut self, is_ready: bool) -> io::Result<()> {
        for _ in 0..MAX_ACCEPTS {
            let listener = self.qmp_listener.as_ref().filter(|_| is_ready);
            let Some(stream) = listener.map(SocketListener::accept).transpose()?.flatten() else {
                break;
            };
            self.qmp_clients.serve(stream);
        }
        Ok(())
    }

    /// Handles a new connection. It becomes the front end once it sends something and no other front end is connected.
    /// A connection that sends nothing only checks whether the server runs.
    fn add_pending_connection(&mut self, stream: UnixStream) {
        match self.place() {
            Place::Free | Place::FreeSoon => {}
            place => return self.refuse(place),
        }
        if self.pending_connections.len() >= MAX_PENDING_CONNECTIONS {
            // Those that have sent something, or have closed, leave.
            self.check_pending_connections();
        }
        if self.pending_connections.len() >= MAX_PENDING_CONNECTIONS {
            // The oldest comes first.
            let silent = self.pending_connections.iter().position(|it| !it.has_sent);
            let Some(oldest) = silent else {
                return self.refuse(Place::FreeSoon);
            };
            self.pending_connections.remove(oldest);
            warn!(
                "connection to {} dropped: it sent nothing, and {MAX_PENDING_CONNECTIONS} newer connections wait",
                self.options.socket_path.display()
            );
        }
        self.pending_connections.push(PendingConnection {
            stream,
            since: Instant::now(),
            has_sent: false,
        });
    }

    fn refuse(&self, place: Place) {
        let path = self.options.socket_path.display();
        match place {
            Place::Taken => warn!(
                "second front end refused at {path}: one is already connected; start another vhost-device-balloon \
                 with its own socket"
            ),
            Place::Ending => warn!(
                "front end refused at {path}: the daemon ends after the migration of the previous guest; start \
                 another vhost-device-balloon"
            ),
            Place::Free | Place::FreeSoon => warn!(
                "front end refused at {path}: {MAX_PENDING_CONNECTIONS} others wait already for the end of the last \
                 session; try again later"
            ),
        }
    }

    /// Makes the first pending connection that has sent something the front end. Drops those that have closed, or
    /// have sent nothing for too long.
    pub(super) fn check_pending_connections(&mut self) {
        let now = Instant::now();
        for mut pending in std::mem::take(&mut self.pending_connections) {
            let mut byte = [0u8];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            match rustix::net::recv(&pending.stream, &mut byte, flags) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    if pending.deadline().is_some_and(|deadline| deadline <= now) {
                        warn!(
                            "connection to {} dropped: it sent nothing for {} s",
                            self.options.socket_path.display(),
                            FIRST_BYTE_TIMEOUT.as_secs()
                        );
                        continue;
                    }
                    self.pending_connections.push(pending);
                }
                Ok((_, 1..)) => match self.place() {
                    Place::Free => self.serve_front_end(pending.stream),
                    Place::FreeSoon => {
                        pending.has_sent = true;
                        self.pending_connections.push(pending);
                    }
                    place => self.refuse(place),
                },
                Ok(_) | Err(_) => debug!("vhost-user: a connection closed without sending data"),
            }
        }
    }

    /// Starts a session. A front end that the host has no resources for is refused.
    fn serve_front_end(&mut self, stream: UnixStream) {
        match self.start_session(stream) {
            Ok(session) => {
                info!("front end connected");
                self.session = Some(session);
            }
            Err(error) => warn!(
                "front end refused at {}: {error}",
                self.options.socket_path.display()
            ),
        }
    }

    fn start_session(&self, stream: UnixStream) -> Result<Session, SessionError> {
        stream.set_nonblocking(false)?;
        let wake = self.wake.1.try_clone()?;
        let private_connection = match &self.broker {
            Some(broker) => broker.private_connection()?,
            None => PrivateConnection::new()?,
        };
        let device = self.device.clone();
        Session::start_with(stream, private_connection, device, move || {
            let _ = (&wake).write(&[SESSION_ENDED]);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::server;
    use super::*;

    #[test]
    fn r13_a_connection_that_stays_silent_is_dropped_at_last() {
        let (mut server, directory) = server();
        for age in [FIRST_BYTE_TIMEOUT, Duration::ZERO] {
            let (stream, other) = UnixStream::pair().unwrap();
            server.pending_connections.push(PendingConnection {
                stream,
                since: Instant::now().checked_sub(age).unwrap(),
                has_sent: false,
            });
            server.check_pending_connections();
            let left = usize::from(age.is_zero());
            assert_eq!(server.pending_connections.len(), left, "{age:?}");
            drop(other);
        }
        // The next deadline ends the sleep of the server.
        assert!(server.timeout().is_some_and(|limit| limit.tv_sec <= 600));
        drop(directory);
    }

    #[test]
    fn r13_the_oldest_silent_connection_makes_room() {
        let (mut server, directory) = server();
        let (stream, mut first) = UnixStream::pair().unwrap();
        server.add_pending_connection(stream);
        let mut others = Vec::new();
        for _ in 0..MAX_PENDING_CONNECTIONS {
            let (stream, other) = UnixStream::pair().unwrap();
            server.add_pending_connection(stream);
            others.push(other);
        }
        assert_eq!(server.pending_connections.len(), MAX_PENDING_CONNECTIONS);
        assert_eq!(std::io::Read::read(&mut first, &mut [0]).unwrap(), 0);
        drop(directory);
    }
}
