// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The server: owns the sockets for the front end and for QMP clients, and decides when the program ends.
//!
//! One thread polls the two listeners, the connections that have sent nothing yet, and a socket pair that
//! other threads write to.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use shared_abi::features::Features;
use thiserror::Error;
use tracing::{debug, info, warn};

use crate::device::saved_state::{SavedState, SavedStateError};
use crate::device::Device;
use crate::events::Events;
use crate::migrate::MigrationManager;
use crate::qmp::{CommandContext, QmpClients};
use crate::session::{Session, SessionEnd, SessionError};
use crate::socket::{SocketError, SocketListener};
use crate::vring::NotificationSuppression;

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
    /// A front end cannot be served.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The host reported an error.
    #[error("the sockets cannot be watched: {0}")]
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

    /// Returns a stream that ends the server when a byte other than 0 or 1 is written to it.
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
const SHUTDOWN_REQUESTED: u8 = 2;

/// How long the program stays after the migration of a guest that has disconnected, so that QMP clients can query
/// how the migration ended.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the program checks during that time whether all QMP clients have disconnected.
const LINGER_POLL_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// The most connections that have sent nothing yet.
const MAX_PENDING_CONNECTIONS: usize = 8;

/// A running server. Its sockets exist as long as it does.
pub struct Server {
    options: ServerOptions,
    front_end_listener: SocketListener,
    qmp_listener: Option<SocketListener>,
    qmp_clients: QmpClients,
    device: Arc<Mutex<Device>>,
    migration_manager: Arc<MigrationManager>,
    /// How the session ended, if the front end disconnected during a migration that continues.
    session_end: Option<SessionEnd>,
    /// The latest end of the program after that migration.
    exit_deadline: Option<Instant>,
    /// Socket pair that wakes the server: other threads write to the second socket.
    wake: (UnixStream, UnixStream),
    session: Option<Session>,
    /// Connections that have sent nothing yet.
    pending_connections: Vec<UnixStream>,
}

impl Server {
    /// Binds the sockets.
    ///
    /// # Errors
    ///
    /// If a socket is in use, the host reports an error, or the saved state cannot be restored.
    pub fn bind(options: ServerOptions) -> Result<Self, ServerError> {
        Self::bind_with_shutdown_handle(options, |_| Ok(()))
    }

    /// As [`Server::bind`], but first passes a shutdown handle to `on_handle`. The server can therefore be told to end
    /// as soon as its sockets exist.
    ///
    /// # Errors
    ///
    /// As [`Server::bind`], and if `on_handle` fails.
    pub fn bind_with_shutdown_handle(
        options: ServerOptions,
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
        if let Some(path) = &options.device_state {
            device.restore(&SavedState::read(path)?)?;
        }
        let device = Arc::new(Mutex::new(device));
        let front_end_listener = SocketListener::bind(&options.socket_path)?;
        let qmp_listener = options
            .qmp_socket
            .as_deref()
            .map(SocketListener::bind)
            .transpose()?;
        let waker = wake.1.try_clone()?;
        let migration_manager = Arc::new(MigrationManager::new(
            device.clone(),
            events.clone(),
            move || {
                let _ = (&waker).write(&[MIGRATION_ENDED]);
            },
        ));
        let qmp_clients = QmpClients::new(CommandContext {
            device: device.clone(),
            migration_manager: migration_manager.clone(),
            events,
            quit: Box::new(move || shutdown_handle.stop()),
        });
        info!(
            "listening at {} with {}",
            front_end_listener.path().display(),
            if options.features.is_empty() {
                "no features".into()
            } else {
                options.features.to_string()
            }
        );
        if let Some(socket) = &qmp_listener {
            info!("operators are welcome at {}", socket.path().display());
        }
        Ok(Self {
            options,
            front_end_listener,
            qmp_listener,
            qmp_clients,
            device,
            migration_manager,
            session_end: None,
            exit_deadline: None,
            wake,
            session: None,
            pending_connections: Vec::new(),
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
            session.join();
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
                let known = [SESSION_ENDED, MIGRATION_ENDED];
                if words.iter().any(|word| !known.contains(word)) {
                    info!("told to end");
                    return Ok(Exit::Stopped);
                }
                if words.contains(&SESSION_ENDED) {
                    if let Some(exit) = self.session_ended()? {
                        return Ok(exit);
                    }
                }
            }
            if let Some(exit) = self.exit_after_migration()? {
                return Ok(exit);
            }
            if ready.front_end_listener {
                while let Some(stream) = self.front_end_listener.accept() {
                    self.add_pending_connection(stream);
                }
            }
            if ready.front_end_listener || ready.pending_connections {
                self.check_pending_connections()?;
            }
            if ready.qmp_listener {
                while let Some(stream) = self.qmp_listener.as_ref().and_then(SocketListener::accept)
                {
                    self.qmp_clients.serve(stream);
                }
            }
        }
    }

    /// Sleeps until a socket is ready.
    fn wait(&self) -> io::Result<Ready> {
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

    /// Handles a new connection. It becomes the front end once it sends something and no other front end is connected.
    /// A connection that sends nothing only checks whether the server runs.
    fn add_pending_connection(&mut self, stream: UnixStream) {
        if self.is_busy() || self.pending_connections.len() >= MAX_PENDING_CONNECTIONS {
            self.refuse();
        } else {
            self.pending_connections.push(stream);
        }
    }

    /// Returns whether there is a guest already: its front end is connected, or its migration has not ended. Also true
    /// while the program waits for QMP clients before it ends.
    fn is_busy(&self) -> bool {
        self.session.is_some()
            || self.exit_deadline.is_some()
            || self.migration_manager.is_in_progress()
    }

    fn refuse(&self) {
        if self.session.is_none() {
            warn!(
                "a front end was refused at {}: the memory of the guest before it is still being migrated",
                self.options.socket_path.display()
            );
            return;
        }
        warn!(
            "a second front end was refused at {}: one is connected, and a balloon serves one guest; start \
             another vhost-device-balloon with a socket of its own",
            self.options.socket_path.display()
        );
    }

    /// Makes the first pending connection that has sent something the front end.
    fn check_pending_connections(&mut self) -> Result<(), ServerError> {
        for stream in std::mem::take(&mut self.pending_connections) {
            let mut byte = [0u8];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            match rustix::net::recv(&stream, &mut byte, flags) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    self.pending_connections.push(stream)
                }
                Ok((_, 1..)) if !self.is_busy() => self.serve_front_end(stream)?,
                Ok((_, 1..)) => self.refuse(),
                Ok(_) | Err(_) => debug!("somebody connected and said nothing"),
            }
        }
        Ok(())
    }

    fn serve_front_end(&mut self, stream: UnixStream) -> Result<(), ServerError> {
        stream.set_nonblocking(false)?;
        info!("a front end has connected");
        let wake = self.wake.1.try_clone()?;
        self.session = Some(Session::start(stream, self.device.clone(), move || {
            let _ = (&wake).write(&[SESSION_ENDED]);
        })?);
        Ok(())
    }

    /// Handles the end of the session. Returns how the program ends, if it does.
    fn session_ended(&mut self) -> Result<Option<Exit>, ServerError> {
        let Some(session) = self.session.take() else {
            return Ok(None);
        };
        // Checked before the device is told, because that may end the migration. QMP clients can then still
        // query how it ended.
        let migrating = self.migration_manager.is_in_progress();
        let ended = session.join();
        if self.options.persistent {
            warn!("{}; waiting for the next front end", ended.reason);
            return Ok(None);
        }
        if migrating {
            info!("{}; stays until the migration has ended", ended.reason);
            self.session_end = Some(ended);
            return Ok(None);
        }
        if ended.is_error {
            return Err(ServerError::FrontEnd(ended.reason));
        }
        info!("ends, because {}", ended.reason);
        Ok(Some(Exit::FrontEndDisconnected(ended)))
    }
}

impl Server {
    /// Returns how the program ends, if its front end disconnected during a migration. The program ends when the
    /// migration is over and all QMP clients have disconnected, or after [`LINGER_TIMEOUT`].
    fn exit_after_migration(&mut self) -> Result<Option<Exit>, ServerError> {
        let Some(ended) = self.session_end.as_ref() else {
            return Ok(None);
        };
        if self.migration_manager.is_in_progress() {
            return Ok(None);
        }
        let deadline = *self
            .exit_deadline
            .get_or_insert_with(|| Instant::now() + LINGER_TIMEOUT);
        if self.qmp_clients.count() > 0 && Instant::now() < deadline {
            return Ok(None);
        }
        if ended.is_error {
            return Err(ServerError::FrontEnd(ended.reason.clone()));
        }
        info!("ends, because {}, and the migration is over", ended.reason);
        Ok(Some(Exit::FrontEndDisconnected(ended.clone())))
    }
}

/// The sockets that are ready.
struct Ready {
    wake: bool,
    front_end_listener: bool,
    qmp_listener: bool,
    pending_connections: bool,
}
