// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The server: owns the sockets for the front end and for QMP clients, and decides when the program ends.
//!
//! One thread polls the two listeners, the connections that have sent nothing yet, and a socket pair that
//! other threads write to. A front end that cannot be served, and an error of `accept`, do not end it.
//!
//! This file contains the server and its loop. `poll` waits for the sockets, `accept` decides which `pending_connection` becomes
//! the front end, and `exit` decides when the program ends.

mod accept;
mod exit;
mod pending_connection;
mod poll;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared_abi::features::Features;
use thiserror::Error;
use tracing::{error, info, warn};

use pending_connection::PendingConnection;

use crate::broker::Broker;
use crate::device::saved_state::{SavedState, SavedStateError};
use crate::device::Device;
use crate::device_lock::DeviceLock;
use crate::events::Events;
use crate::memory::pin_scan::PinFinder;
use crate::migrate::MigrationManager;
use crate::qmp::{CommandContext, QmpClients};
use crate::session::{Session, SessionEnd};
use crate::socket::{SocketError, SocketListener};
use crate::vring::NotificationSuppression;

/// How long the end of the program waits for the end of a session.
const SESSION_END_TIMEOUT: Duration = Duration::from_secs(3);

/// The options of a server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Path of the socket for the front end.
    pub socket_path: PathBuf,
    /// Path of the socket for QMP clients.
    pub qmp_socket: Option<PathBuf>,
    /// The features that the device offers.
    pub features: Features,
    /// How drivers are asked to leave out notifications.
    pub suppression: NotificationSuppression,
    /// Whether memory stays allocated until a QMP client allows to discard it.
    pub inhibit_discard: bool,
    /// Whether to wait for another front end when one disconnects.
    pub persistent: bool,
    /// The file with the saved state to restore.
    pub device_state: Option<PathBuf>,
}

/// Why the server failed.
#[derive(Debug, Error)]
pub enum ServerError {
    /// A socket cannot be bound.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The saved state cannot be restored.
    #[error(transparent)]
    SavedState(#[from] SavedStateError),
    /// The connection to the front end failed, or the front end violated the protocol.
    #[error("{0}")]
    FrontEnd(String),
    /// The broker process has ended, and no front end is connected.
    #[error("daemon ends because its broker process has ended; its sockets stay, and the next daemon replaces them")]
    BrokerEnded,
    /// A thread panicked. The log has its message.
    #[error("daemon ended because one of its threads panicked")]
    ThreadPanicked,
    /// The host reported an error.
    #[error("sockets cannot be polled: {0}")]
    Io(#[from] io::Error),
}

/// Why the server ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Exit {
    /// The server was told to end.
    Stopped,
    /// The front end disconnected.
    FrontEndDisconnected(SessionEnd),
}

/// Ends a server, from any thread.
#[derive(Debug)]
pub struct ShutdownHandle(UnixStream);

impl ShutdownHandle {
    /// Ends the server.
    pub fn stop(&self) {
        // Fails if the server has ended, or if the socket is full of earlier requests.
        let _ = (&self.0).write(&[SHUTDOWN_REQUESTED]);
    }

    /// Ends the server with [`ServerError::ThreadPanicked`].
    pub fn fail(&self) {
        // Fails as in `stop`.
        let _ = (&self.0).write(&[THREAD_PANICKED]);
    }

    /// Returns a stream that ends the server when a byte of 4 or more is written to it.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub fn stream(&self) -> io::Result<UnixStream> {
        self.0.try_clone()
    }
}

/// Reports the end of the session, unlike [`SHUTDOWN_REQUESTED`].
const SESSION_ENDED: u8 = 0;

/// Reports the end of a migration, unlike [`SHUTDOWN_REQUESTED`].
const MIGRATION_ENDED: u8 = 1;

/// Reports that a thread panicked, unlike [`SHUTDOWN_REQUESTED`].
const THREAD_PANICKED: u8 = 2;

const SHUTDOWN_REQUESTED: u8 = 4;

/// A running server. Its sockets exist as long as it does.
pub struct Server {
    options: ServerOptions,
    front_end_listener: SocketListener,
    qmp_listener: Option<SocketListener>,
    qmp_clients: QmpClients,
    device: Arc<DeviceLock>,
    /// Does what this process has no rights for. Without it, this process does all itself.
    broker: Option<Arc<Broker>>,
    has_broker_ended: bool,
    migration_manager: Arc<MigrationManager>,
    /// How the session ended, if the front end disconnected during a migration that continues.
    session_end: Option<SessionEnd>,
    /// The latest end of the program after that migration.
    exit_deadline: Option<Instant>,
    /// Socket pair that wakes the server: other threads write to the second socket.
    wake: (UnixStream, UnixStream),
    session: Option<Session>,
    /// Connections that wait to become the front end, the oldest first.
    pending_connections: Vec<PendingConnection>,
    /// Until when no connections are accepted, after an error of the host.
    accept_pause: Option<Instant>,
}

impl Server {
    /// Binds the sockets.
    ///
    /// # Errors
    ///
    /// If a socket is in use, the host reports an error, or the saved state cannot be restored.
    pub fn bind(options: ServerOptions) -> Result<Self, ServerError> {
        Self::bind_with_broker(options, None, |_| Ok(()))
    }

    /// As [`Server::bind`], but first passes a shutdown handle to `on_handle`. The server can therefore be told to end
    /// as soon as its sockets exist. `broker` then does all that needs rights, so that this process can give them up when
    /// this function returns: it has started no thread.
    ///
    /// # Errors
    ///
    /// As [`Server::bind`], and if `on_handle` fails or the broker process has ended.
    pub fn bind_with_broker(
        options: ServerOptions,
        broker: Option<Arc<Broker>>,
        on_handle: impl FnOnce(&ShutdownHandle) -> io::Result<()>,
    ) -> Result<Self, ServerError> {
        let wake = UnixStream::pair()?;
        wake.0.set_nonblocking(true)?;
        wake.1.set_nonblocking(true)?;
        let shutdown_handle = ShutdownHandle(wake.1.try_clone()?);
        on_handle(&shutdown_handle)?;
        let events = Arc::new(Events::default());
        let mut device =
            Device::new(options.features, events.clone()).with_suppression(options.suppression);
        device.inhibit_discard(options.inhibit_discard);
        if let Some(broker) = broker.clone() {
            device = device.with_pin_finder(PinFinder::new(move |ids| broker.find_pinning(ids)));
        }
        if let Some(path) = &options.device_state {
            device.restore(&SavedState::read(path)?)?;
        }
        let device = Arc::new(DeviceLock::new(device));
        let front_end_listener = bind_socket(&options.socket_path, 0, broker.as_ref())?;
        let qmp_listener = options
            .qmp_socket
            .as_deref()
            .map(|path| bind_socket(path, 1, broker.as_ref()))
            .transpose()?;
        if let Some(broker) = &broker {
            broker.confine()?;
        }
        let waker = wake.1.try_clone()?;
        let migration_manager = MigrationManager::new(device.clone(), events.clone(), move || {
            let _ = (&waker).write(&[MIGRATION_ENDED]);
        });
        let migration_manager = Arc::new(migration_manager.with_broker(broker.clone()));
        let saver = broker.clone();
        let qmp_clients = QmpClients::new(CommandContext {
            device: device.clone(),
            migration_manager: migration_manager.clone(),
            events,
            save_state: Box::new(move |state, path| save_state(saver.as_deref(), state, path)),
            quit: Box::new(move || shutdown_handle.stop()),
        });
        info!(
            "vhost-user: listening on {}, offering {}",
            front_end_listener.path().display(),
            if options.features.is_empty() {
                "no features".into()
            } else {
                options.features.to_string()
            }
        );
        if let Some(socket) = &qmp_listener {
            info!("QMP: listening on {}", socket.path().display());
        }
        Ok(Self {
            options,
            front_end_listener,
            qmp_listener,
            qmp_clients,
            device,
            broker,
            has_broker_ended: false,
            migration_manager,
            session_end: None,
            exit_deadline: None,
            wake,
            session: None,
            pending_connections: Vec::new(),
            accept_pause: None,
        })
    }

    /// Returns a handle that ends the server.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub fn shutdown_handle(&self) -> io::Result<ShutdownHandle> {
        Ok(ShutdownHandle(self.wake.1.try_clone()?))
    }

    /// Serves until the server is told to end, or the front end disconnects. Removes both sockets at the end.
    ///
    /// # Errors
    ///
    /// If the connection to the front end fails, the front end violates the protocol, or the host reports an error.
    pub fn run(mut self) -> Result<Exit, ServerError> {
        let result = self.serve();
        // While a driver is still connected and can free its hinted blocks.
        self.migration_manager.shut_down();
        if let Some(session) = self.session.take() {
            session.close();
            if session.join_within(SESSION_END_TIMEOUT).is_none() {
                warn!(
                    "front end session does not end: one of its threads waits for a file of the front end; exiting without \
                     it"
                );
            }
        }
        self.qmp_clients.close();
        result
    }

    fn serve(&mut self) -> Result<Exit, ServerError> {
        loop {
            let ready = self.wait()?;
            if ready.wake {
                let mut words = [0; 64];
                let count = match (&self.wake.0).read(&mut words) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    other => other?,
                };
                let words = words.get(..count).unwrap_or_default();
                if words.contains(&THREAD_PANICKED) {
                    return Err(ServerError::ThreadPanicked);
                }
                let known = [SESSION_ENDED, MIGRATION_ENDED];
                if words.iter().any(|word| !known.contains(word)) {
                    info!("shutdown requested");
                    return Ok(Exit::Stopped);
                }
                if words.contains(&SESSION_ENDED) {
                    if let Some(exit) = self.session_ended()? {
                        return Ok(exit);
                    }
                }
            }
            if ready.broker_end {
                self.has_broker_ended = true;
                error!(
                    "broker process has ended: without it, the daemon serves no further front end, no migration and no \
                     saved state; restart it when the guest has ended"
                );
            }
            if let Some(exit) = self.exit_after_migration()? {
                return Ok(exit);
            }
            if self.has_broker_ended && self.session.is_none() {
                return Err(ServerError::BrokerEnded);
            }
            self.accept_connections(ready.front_end_listener, ready.qmp_listener);
            self.check_pending_connections();
        }
    }
}

/// Listens at `path`. The broker process, if there is one, removes the socket at the end; it is its socket number `index`.
fn bind_socket(
    path: &Path,
    index: usize,
    broker: Option<&Arc<Broker>>,
) -> Result<SocketListener, ServerError> {
    let listener = SocketListener::bind(path)?;
    let Some(broker) = broker.cloned() else {
        return Ok(listener);
    };
    broker.keep_socket(listener.files())?;
    Ok(listener.removed_by(move |_| broker.remove_socket(index)))
}

/// Writes a saved state to a file, in the broker process if there is one.
fn save_state(
    broker: Option<&Broker>,
    state: &SavedState,
    path: &Path,
) -> Result<(), SavedStateError> {
    match broker {
        Some(broker) => {
            let saved = broker.save_state(state, path);
            saved.map_err(|source| SavedStateError::Write {
                path: path.into(),
                source,
            })
        }
        None => state.write(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a server, and the directory of its sockets.
    pub(super) fn server() -> (Server, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(ServerOptions {
            socket_path: directory.path().join("vhost"),
            qmp_socket: None,
            features: Features::NONE,
            suppression: NotificationSuppression::default(),
            inhibit_discard: false,
            persistent: true,
            device_state: None,
        });
        (server.unwrap(), directory)
    }

    #[test]
    fn a_panic_of_any_thread_ends_the_server_with_an_error() {
        let (server, directory) = server();
        let shutdown_handle = server.shutdown_handle().unwrap();
        shutdown_handle.fail();
        assert!(matches!(server.run(), Err(ServerError::ThreadPanicked)));
        assert!(directory.path().read_dir().unwrap().next().is_none());
    }
}
