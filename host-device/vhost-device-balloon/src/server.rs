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

use crate::device::saved::{SavedState, SavedStateError};
use crate::device::Device;
use crate::events::Events;
use crate::migrate::Migrations;
use crate::qmp::{Operators, Target};
use crate::session::{Ended, Session, SessionError};
use crate::socket::{Listening, SocketError};
use crate::vring::Suppression;

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the front end connects.
    pub socket_path: PathBuf,
    /// Where operators connect.
    pub qmp_socket: Option<PathBuf>,
    /// What the device offers.
    pub features: Features,
    /// How drivers are asked to leave out notifications.
    pub suppression: Suppression,
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
    FrontEndGone(Ended),
}

/// Ends a server, also from another thread.
#[derive(Debug)]
pub struct Stopper(UnixStream);

impl Stopper {
    /// Ends the server.
    pub fn stop(&self) {
        // Fails if the server has ended, or if it was told so many times that it knows.
        let _ = (&self.0).write(&[STOP]);
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

/// Not [`STOP`]: the session has ended.
const SESSION_ENDED: u8 = 0;
/// Not [`STOP`]: a migration has ended.
const MIGRATION_ENDED: u8 = 1;
const STOP: u8 = 2;

/// How long the program stays for its operators, so that they can ask how the migration of a guest ended that is gone.
const LINGER: Duration = Duration::from_secs(30);
/// How often it looks then whether they have gone.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// The most connections that may be there without a word.
const MAX_SILENT: usize = 8;

/// The program between its start and its end. Its sockets exist as long as it does.
pub struct Server {
    options: Options,
    front_ends: Listening,
    operators_socket: Option<Listening>,
    operators: Operators,
    device: Arc<Mutex<Device>>,
    migrations: Arc<Migrations>,
    /// The front end has gone during a migration, which goes on.
    gone: Option<Ended>,
    /// When the program ends at the latest, after that.
    leaving: Option<Instant>,
    /// What other threads write to, and this one reads.
    wake: (UnixStream, UnixStream),
    session: Option<Session>,
    /// Connections that have not said anything yet.
    silent: Vec<UnixStream>,
}

impl Server {
    /// Listens at the sockets.
    ///
    /// # Errors
    ///
    /// If one is in use, the host refuses, or there is no going on from the saved state.
    pub fn bind(options: Options) -> Result<Self, ServerError> {
        Self::bind_stoppable(options, |_| Ok(()))
    }

    /// As [`Server::bind`], but before it listens hands the means to end it to `stoppable`: it can be told to end as soon as it is seen
    /// to listen.
    ///
    /// # Errors
    ///
    /// As [`Server::bind`], and if `stoppable` fails.
    pub fn bind_stoppable(
        options: Options,
        stoppable: impl FnOnce(&Stopper) -> io::Result<()>,
    ) -> Result<Self, ServerError> {
        let wake = UnixStream::pair()?;
        wake.0.set_nonblocking(true)?;
        wake.1.set_nonblocking(true)?;
        let stopper = Stopper(wake.1.try_clone()?);
        stoppable(&stopper)?;
        let events = Arc::new(Events::default());
        let mut device =
            Device::new(options.features, events.clone()).with_suppression(options.suppression);
        if let Some(path) = &options.device_state {
            device.resume(&SavedState::read(path)?)?;
        }
        let device = Arc::new(Mutex::new(device));
        let front_ends = Listening::bind(&options.socket_path)?;
        let operators_socket = options
            .qmp_socket
            .as_deref()
            .map(Listening::bind)
            .transpose()?;
        let waker = wake.1.try_clone()?;
        let migrations = Arc::new(Migrations::new(device.clone(), events.clone(), move || {
            let _ = (&waker).write(&[MIGRATION_ENDED]);
        }));
        let operators = Operators::new(Target {
            device: device.clone(),
            migrations: migrations.clone(),
            events,
            quit: Box::new(move || stopper.stop()),
        });
        info!(
            "listening at {} with {}",
            front_ends.path().display(),
            if options.features.is_empty() {
                "no features".into()
            } else {
                options.features.to_string()
            }
        );
        if let Some(socket) = &operators_socket {
            info!("operators are welcome at {}", socket.path().display());
        }
        Ok(Self {
            options,
            front_ends,
            operators_socket,
            operators,
            device,
            migrations,
            gone: None,
            leaving: None,
            wake,
            session: None,
            silent: Vec::new(),
        })
    }

    /// The means to end the server.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub fn stopper(&self) -> io::Result<Stopper> {
        Ok(Stopper(self.wake.1.try_clone()?))
    }

    /// Serves until it is told to end, or the front end has gone. Both sockets are removed then.
    ///
    /// # Errors
    ///
    /// If the front end broke the protocol, or the host refuses something.
    pub fn run(mut self) -> Result<Exit, ServerError> {
        let result = self.serve();
        // While there is a driver that can take its pages back.
        self.migrations.shut_down();
        if let Some(session) = self.session.take() {
            session.close();
            session.join();
        }
        self.operators.close();
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
            if let Some(exit) = self.leave()? {
                return Ok(exit);
            }
            if ready.front_ends {
                while let Some(stream) = self.front_ends.accept() {
                    self.front_end_came(stream);
                }
            }
            if ready.front_ends || ready.silent {
                self.listen_to_the_silent()?;
            }
            if ready.operators {
                while let Some(stream) = self.operators_socket.as_ref().and_then(Listening::accept)
                {
                    self.operators.serve(stream);
                }
            }
        }
    }

    /// Sleeps until something happens.
    fn wait(&self) -> io::Result<Ready> {
        let mut fds = vec![
            PollFd::new(&self.wake.0, PollFlags::IN),
            PollFd::new(&self.front_ends, PollFlags::IN),
        ];
        let operators = self.operators_socket.as_ref();
        fds.extend(operators.map(|socket| PollFd::new(socket, PollFlags::IN)));
        let others = fds.len();
        fds.extend(
            self.silent
                .iter()
                .map(|stream| PollFd::new(stream, PollFlags::IN)),
        );
        match poll(&mut fds, self.leaving.map(|_| &LOOK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut happened = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(Ready {
            wake: happened.next().unwrap_or(false),
            front_ends: happened.next().unwrap_or(false),
            operators: others > 2 && happened.next().unwrap_or(false),
            silent: happened.any(|happened| happened),
        })
    }

    /// Somebody connected. It is the front end if nobody else is, and once it has said something: whoever only
    /// looks whether the socket is alive is none.
    fn front_end_came(&mut self, stream: UnixStream) {
        if self.is_taken() || self.silent.len() >= MAX_SILENT {
            self.refuse();
        } else {
            self.silent.push(stream);
        }
    }

    /// Whether there is a guest already: one that is served, or one that has gone from here and is still being moved.
    fn is_taken(&self) -> bool {
        self.session.is_some() || self.leaving.is_some() || self.migrations.under_way()
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
    fn listen_to_the_silent(&mut self) -> Result<(), ServerError> {
        for stream in std::mem::take(&mut self.silent) {
            let mut byte = [0u8];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            match rustix::net::recv(&stream, &mut byte, flags) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => self.silent.push(stream),
                Ok((_, 1..)) if !self.is_taken() => self.serve_front_end(stream)?,
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
        let migrating = self.migrations.under_way();
        let ended = session.join();
        if self.options.persistent {
            warn!("{}; waiting for the next front end", ended.reason);
            return Ok(None);
        }
        if migrating {
            info!("{}; stays until the migration has ended", ended.reason);
            self.gone = Some(ended);
            return Ok(None);
        }
        if ended.broken {
            return Err(ServerError::FrontEnd(ended.reason));
        }
        info!("ends, because {}", ended.reason);
        Ok(Some(Exit::FrontEndGone(ended)))
    }
}

impl Server {
    /// Whether the program ends, after its front end has gone during a migration: once that is over, and the operators
    /// have heard of it.
    fn leave(&mut self) -> Result<Option<Exit>, ServerError> {
        let Some(ended) = self.gone.as_ref() else {
            return Ok(None);
        };
        if self.migrations.under_way() {
            return Ok(None);
        }
        let limit = *self.leaving.get_or_insert_with(|| Instant::now() + LINGER);
        if self.operators.count() > 0 && Instant::now() < limit {
            return Ok(None);
        }
        if ended.broken {
            return Err(ServerError::FrontEnd(ended.reason.clone()));
        }
        info!("ends, because {}, and the migration is over", ended.reason);
        Ok(Some(Exit::FrontEndGone(ended.clone())))
    }
}

/// What has happened.
struct Ready {
    wake: bool,
    front_ends: bool,
    operators: bool,
    silent: bool,
}
