// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two sockets: who may connect, and when the program ends.

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

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where the front end connects.
    pub socket_path: PathBuf,
    /// Where operators connect.
    pub qmp_socket: Option<PathBuf>,
    /// What the device offers.
    pub features: Features,
    /// How drivers are asked to leave out notifications.
    pub suppression: NotificationSuppression,
    /// Whether to wait for the next front end when one has gone.
    pub persistent: bool,
    /// The file with the saved state to go on from.
    pub device_state: Option<PathBuf>,
}

/// Why the program cannot go on.
#[derive(Debug, Error)]
pub enum ServerError {
    /// A socket cannot be listened at.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// There is no going on from the saved state.
    #[error(transparent)]
    SavedState(#[from] SavedStateError),
    /// The front end broke the protocol.
    #[error("{0}")]
    FrontEnd(String),
    /// A front end cannot be served.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The host refused something.
    #[error("the sockets cannot be watched: {0}")]
    Io(#[from] io::Error),
}

/// Why the program has ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Exit {
    /// It was told to.
    Stopped,
    /// The front end has gone.
    FrontEndDisconnected(SessionEnd),
}

/// Ends a server, also from another thread.
#[derive(Debug)]
pub struct ShutdownHandle(UnixStream);

impl ShutdownHandle {
    /// Ends the server.
    pub fn stop(&self) {
        // Fails if the server has ended, or if it was told so many times that it knows.
        let _ = (&self.0).write(&[SHUTDOWN_REQUESTED]);
    }

    /// A stream that ends the server when anything but 0 or 1 is written to it.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub fn stream(&self) -> io::Result<UnixStream> {
        self.0.try_clone()
    }
}

/// Not [`SHUTDOWN_REQUESTED`]: the session has ended.
const SESSION_ENDED: u8 = 0;
/// Not [`SHUTDOWN_REQUESTED`]: a migration has ended.
const MIGRATION_ENDED: u8 = 1;
const SHUTDOWN_REQUESTED: u8 = 2;

/// How long the program stays for its operators, so that they can ask how the migration of a guest ended that is gone.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it looks then whether they have gone.
const LINGER_POLL_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// The most connections that may be there without a word.
const MAX_PENDING_CONNECTIONS: usize = 8;

/// The program between its start and its end. Its sockets exist as long as it does.
pub struct Server {
    options: ServerOptions,
    front_end_listener: SocketListener,
    qmp_listener: Option<SocketListener>,
    qmp_clients: QmpClients,
    device: Arc<Mutex<Device>>,
    migration_manager: Arc<MigrationManager>,
    /// The front end has gone during a migration, which goes on.
    session_end: Option<SessionEnd>,
    /// When the program ends at the latest, after that.
    exit_deadline: Option<Instant>,
    /// What other threads write to, and this one reads.
    wake: (UnixStream, UnixStream),
    session: Option<Session>,
    /// Connections that have not said anything yet.
    pending_connections: Vec<UnixStream>,
}

impl Server {
    /// Listens at the sockets.
    ///
    /// # Errors
    ///
    /// If one is in use, the host refuses, or there is no going on from the saved state.
    pub fn bind(options: ServerOptions) -> Result<Self, ServerError> {
        Self::bind_with_shutdown_handle(options, |_| Ok(()))
    }

    /// As [`Server::bind`], but before it listens hands the means to end it to `on_handle`: it can be told to end as soon as it is seen
    /// to listen.
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

    /// The means to end the server.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub fn shutdown_handle(&self) -> io::Result<ShutdownHandle> {
        Ok(ShutdownHandle(self.wake.1.try_clone()?))
    }

    /// Serves until it is told to end, or the front end has gone. Both sockets are removed then.
    ///
    /// # Errors
    ///
    /// If the front end broke the protocol, or the host refuses something.
    pub fn run(mut self) -> Result<Exit, ServerError> {
        let result = self.serve();
        // While there is a driver that can take its pages back.
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

    /// Sleeps until something happens.
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

    /// Somebody connected. It is the front end if nobody else is, and once it has said something: whoever only
    /// looks whether the socket is alive is none.
    fn add_pending_connection(&mut self, stream: UnixStream) {
        if self.is_busy() || self.pending_connections.len() >= MAX_PENDING_CONNECTIONS {
            self.refuse();
        } else {
            self.pending_connections.push(stream);
        }
    }

    /// Whether there is a guest already: one that is served, or one that has gone from here and is still being moved.
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

    /// The first of the silent connections that says something becomes the front end.
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

    /// The front end has gone. Says whether the program ends.
    fn session_ended(&mut self) -> Result<Option<Exit>, ServerError> {
        let Some(session) = self.session.take() else {
            return Ok(None);
        };
        // Before the device tells it, and it may end: there are operators who want to know how.
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
    /// Whether the program ends, after its front end has gone during a migration: once that is over, and the operators
    /// have heard of it.
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

/// What has happened.
struct Ready {
    wake: bool,
    front_end_listener: bool,
    qmp_listener: bool,
    pending_connections: bool,
}
