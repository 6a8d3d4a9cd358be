// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads of the crate `vhost-user-backend` (0.24) for one connection, and the way round what the crate lacks.
//! `contrib/upstream/vhost.md` has the same points as reports for its maintainers.
//!
//! - It serves only a connection that it accepts itself: see [`PrivateConnection`].
//! - Each exit event costs a descriptor that is never closed. The daemon has no exit event. Instead the thread of the
//!   queues ends when the [`Backend`] fails with [`ORDERED_END`](crate::backend::ORDERED_END).
//! - It reports neither the request that failed, nor whether the front end or the crate closed the connection first:
//!   see [`Served`].

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use thiserror::Error as ThisError;
use vhost::vhost_user::{Error as MessageError, Listener};
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::backend::{Backend, RESCHEDULE_EVENT};
use crate::private_connection::PrivateConnection;

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
    pub(crate) fn start(
        backend: Arc<Backend>,
        PrivateConnection { listener, stream }: PrivateConnection,
    ) -> Result<(Self, UnixStream), SessionError> {
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
