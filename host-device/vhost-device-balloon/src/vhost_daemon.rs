// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads of the crate `vhost-user-backend` (0.24) for one connection, and the way round what the crate lacks.
//! `contrib/upstream/vhost.md` has the same points as reports for its maintainers.
//!
//! - It serves only a connection that it accepts itself: see [`private_connection`].
//! - Each exit event costs a descriptor that is never closed. The daemon has no exit event. Instead the thread of the
//!   queues ends when the [`Backend`] fails with [`ORDERED_END`](crate::backend::ORDERED_END).
//! - It reports neither the request that failed, nor whether the front end or the crate closed the connection first:
//!   see [`Served`].

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error as ThisError;
use vhost::vhost_user::{Error as MessageError, Listener};
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::backend::{Backend, RESCHEDULE_EVENT};

/// Why a front end cannot be served.
#[derive(Debug, ThisError)]
pub enum SessionError {
    /// The host reported an error.
    #[error("front end session cannot be started: {0}")]
    Io(#[from] io::Error),
    /// The vhost-user crate reported an error.
    #[error("front end session cannot be started: {0}")]
    VhostUser(Error),
}

/// How the crate stopped to serve the connection.
#[derive(Debug)]
pub(crate) enum Served {
    /// The connection was closed.
    Closed,
    /// A request is against the protocol, or cannot be executed.
    RequestFailed(MessageError),
    /// The thread of the messages panicked.
    Panicked,
}

/// The threads of the crate for one connection. Dropping it ends them.
pub(crate) struct VhostDaemon {
    /// `None` only after a failure that left the thread of the queues without a way to end it.
    daemon: Option<VhostUserDaemon<Arc<Backend>>>,
    backend: Arc<Backend>,
}

impl VhostDaemon {
    /// Starts the threads. Returns the connection to the one that handles messages.
    ///
    /// # Errors
    ///
    /// If the host has no threads, descriptors or memory left.
    pub(crate) fn start(backend: Arc<Backend>) -> Result<(Self, UnixStream), SessionError> {
        let (listener, stream) = private_connection()?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new("vhost-user".into(), backend.clone(), memory)
            .map_err(SessionError::VhostUser)?;
        let handlers = daemon.get_epoll_handlers();
        let mut started = Self {
            daemon: Some(daemon),
            backend,
        };
        for handler in handlers {
            let fd = started.backend.reschedule_fd();
            let event = u64::from(RESCHEDULE_EVENT);
            if let Err(error) = handler.register_listener(fd, EventSet::IN, event) {
                // The thread cannot be told to end. It is left behind, asleep.
                std::mem::forget(started.daemon.take());
                return Err(error.into());
            }
        }
        if let Some(daemon) = &mut started.daemon {
            daemon
                .start(&mut Listener::from(listener))
                .map_err(SessionError::VhostUser)?;
        }
        Ok((started, stream))
    }

    /// Waits for the end of the connection.
    pub(crate) fn wait(&mut self) -> Served {
        match self.daemon.as_mut().map(VhostUserDaemon::wait) {
            Some(Err(Error::HandleRequest(error))) => match error {
                MessageError::Disconnected
                | MessageError::SocketBroken(_)
                | MessageError::PartialMessage => Served::Closed,
                error => Served::RequestFailed(error),
            },
            Some(Err(_)) => Served::Panicked,
            Some(Ok(())) | None => Served::Closed,
        }
    }
}

impl Drop for VhostDaemon {
    fn drop(&mut self) {
        self.backend.end_queue_thread();
        // Dropping the daemon joins the thread.
    }
}

/// Returns a listener with one connection in its backlog, and the other end of that connection.
///
/// The kernel chooses an address in the abstract namespace, so nothing is created in the file system. Others can see
/// such an address and connect to it. The backlog has room for one connection only, so if ours is in it, it is the one
/// that will be accepted.
fn private_connection() -> io::Result<(UnixListener, UnixStream)> {
    /// Each further attempt means that another process connected within microseconds.
    const ATTEMPTS: usize = 16;
    let socket = || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (domain, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        Ok(rustix::net::socket_with(domain, kind, flags, None)?)
    };
    for _ in 0..ATTEMPTS {
        let (listener, stream) = (socket()?, socket()?);
        rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
        rustix::net::listen(&listener, 0)?;
        match rustix::net::connect(&stream, &rustix::net::getsockname(&listener)?) {
            Ok(()) => {
                let (listener, stream) = (UnixListener::from(listener), UnixStream::from(stream));
                stream.set_nonblocking(false)?;
                return Ok((listener, stream));
            }
            // The backlog is full.
            Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::other(
        "another process connects to each private socket of the daemon",
    ))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn nobody_else_is_in_the_backlog_of_a_private_connection() {
        let (listener, mut stream) = private_connection().unwrap();
        let address = listener.local_addr().unwrap();
        assert!(address.as_pathname().is_none());
        // There is no room for another connection.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let intruder =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let address = rustix::net::getsockname(&listener).unwrap();
        let refused = rustix::net::connect(&intruder, &address).unwrap_err();
        assert_eq!(refused, rustix::io::Errno::AGAIN);
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"mine").unwrap();
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"mine");
    }
}
