// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the channels of a stream come to be: connecting, listening, opening.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    accept_with, connect, socket_with, sockopt, AddressFamily, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::process::{getpid, pidfd_getfd, pidfd_open, PidfdFlags, PidfdGetfdFlags};

use super::control::Control;
use super::{Address, StreamError};

/// How long it takes to notice that a TCP peer's host is gone: a probe after this much silence, ...
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// ... then this often, ...
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
/// ... and so many that may go unanswered.
const KEEP_ALIVE_PROBES: u32 = 3;
/// What is asked of the system for the buffer of a socket or a pipe. It may give less.
const BUFFER: usize = 1 << 20;
/// How long a full queue of a listening socket is left alone.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Connects `channels` channels to `address`, or opens it for writing.
pub(super) fn connect_to(
    address: &Address,
    channels: u16,
    control: &Control,
    timeout: Duration,
) -> Result<Vec<OwnedFd>, StreamError> {
    if channels > 1 && matches!(address, Address::File(_) | Address::Fd(_)) {
        return Err(StreamError::Options(format!(
            "several channels need an address that can be connected to more than once; {address} cannot"
        )));
    }
    (0..channels)
        .map(|_| match connect_once(address, control, timeout) {
            Ok(Ok(fd)) => Ok(fd),
            Ok(Err(error)) => Err(StreamError::Connect {
                address: address.clone(),
                source: Arc::new(error),
            }),
            Err(stopped) => Err(stopped),
        })
        .collect()
}

/// The outer error is a stop of the stream.
fn connect_once(
    address: &Address,
    control: &Control,
    timeout: Duration,
) -> Result<io::Result<OwnedFd>, StreamError> {
    Ok(match address {
        Address::Unix(path) => {
            let target = match SocketAddrUnix::new(path) {
                Ok(target) => target,
                Err(error) => return Ok(Err(error.into())),
            };
            connect_socket(AddressFamily::UNIX, &target, control, timeout)?
        }
        Address::Tcp(host, port) => {
            let found = match (host.as_str(), *port).to_socket_addrs() {
                Ok(found) => found,
                Err(error) => return Ok(Err(error)),
            };
            let mut last = Err(io::Error::other("the name has no address"));
            for target in found {
                let family = match target {
                    SocketAddr::V4(_) => AddressFamily::INET,
                    SocketAddr::V6(_) => AddressFamily::INET6,
                };
                last = connect_socket(family, &target, control, timeout)?;
                if last.is_ok() {
                    break;
                }
            }
            last
        }
        Address::File(path) => OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            // It holds all that the guest has in memory.
            .mode(0o600)
            .open(path)
            .map(OwnedFd::from),
        Address::Fd(number) => duplicate_fd(*number),
    })
}

fn connect_socket(
    family: AddressFamily,
    target: &impl rustix::net::addr::SocketAddrArg,
    control: &Control,
    timeout: Duration,
) -> Result<io::Result<OwnedFd>, StreamError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = match socket_with(family, SocketType::STREAM, flags, None) {
        Ok(fd) => fd,
        Err(error) => return Ok(Err(error.into())),
    };
    let end = Instant::now().checked_add(timeout);
    loop {
        match connect(&fd, target) {
            Ok(()) => break,
            // A Unix socket whose queue is full.
            Err(Errno::AGAIN) if end.is_some_and(|end| Instant::now() < end) => {
                control.sleep(RETRY_INTERVAL)?;
            }
            Err(Errno::AGAIN) => return Ok(Err(io::ErrorKind::TimedOut.into())),
            Err(Errno::INPROGRESS | Errno::INTR) => {
                let ready = control.wait(fd.as_fd(), PollFlags::OUT, Some(timeout))?;
                if ready.is_none() {
                    return Ok(Err(io::ErrorKind::TimedOut.into()));
                }
                match sockopt::socket_error(&fd) {
                    Ok(Ok(())) => break,
                    Ok(Err(error)) | Err(error) => return Ok(Err(error.into())),
                }
            }
            Err(error) => return Ok(Err(error.into())),
        }
    }
    set_socket_options(&fd);
    Ok(Ok(fd))
}

/// What makes a transport quicker and its end noticed. All of it may be refused.
fn set_socket_options(fd: &OwnedFd) {
    let _ = sockopt::set_socket_send_buffer_size(fd, BUFFER);
    let family = sockopt::socket_domain(fd);
    if family == Ok(AddressFamily::INET) || family == Ok(AddressFamily::INET6) {
        // Records are gathered here, not in the kernel.
        let _ = sockopt::set_tcp_nodelay(fd, true);
        let _ = sockopt::set_socket_keepalive(fd, true);
        let _ = sockopt::set_tcp_keepidle(fd, KEEP_ALIVE);
        let _ = sockopt::set_tcp_keepintvl(fd, KEEP_ALIVE_EVERY);
        let _ = sockopt::set_tcp_keepcnt(fd, KEEP_ALIVE_PROBES);
    }
}

/// Another file descriptor for what is open under `number` in this process.
fn duplicate_fd(number: i32) -> io::Result<OwnedFd> {
    // The descriptor's owner is not known here, so it is asked for by number, as of another process.
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    let fd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
    set_socket_options(&fd);
    let _ = rustix::pipe::fcntl_setpipe_size(&fd, BUFFER);
    Ok(fd)
}

/// What receives: a socket that listens, or something that is open already.
#[derive(Debug)]
pub struct Listener {
    address: Address,
    state: ListenerState,
}

#[derive(Debug)]
enum ListenerState {
    /// Connections come out of this.
    Listening {
        fd: OwnedFd,
        /// Kept, because it removes itself.
        _file: Option<SocketFile>,
    },
    /// This is the one channel.
    Open(OwnedFd),
}

impl Listener {
    /// Listens at `address`, or opens it for reading. A port of 0 takes one that is free.
    ///
    /// A Unix socket that a dead process left at the path is replaced; the path is removed when this is dropped.
    ///
    /// # Errors
    ///
    /// [`StreamError::Listen`].
    pub fn bind(address: &Address) -> Result<Self, StreamError> {
        Self::open(address).map_err(|error| StreamError::Listen {
            address: address.clone(),
            source: Arc::new(error),
        })
    }

    fn open(address: &Address) -> io::Result<Self> {
        let mut bound = address.clone();
        let state = match address {
            Address::Unix(path) => {
                let (fd, file) = SocketFile::bind(path)?;
                ListenerState::Listening {
                    fd,
                    _file: Some(file),
                }
            }
            Address::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port))?;
                bound = Address::Tcp(host.clone(), listener.local_addr()?.port());
                ListenerState::Listening {
                    fd: listener.into(),
                    _file: None,
                }
            }
            Address::File(path) => ListenerState::Open(File::open(path)?.into()),
            Address::Fd(number) => {
                let fd = duplicate_fd(*number)?;
                if sockopt::socket_acceptconn(&fd) == Ok(true) {
                    ListenerState::Listening { fd, _file: None }
                } else {
                    ListenerState::Open(fd)
                }
            }
        };
        if let ListenerState::Listening { fd, .. } = &state {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        Ok(Self {
            address: bound,
            state,
        })
    }

    /// A channel that is connected already: its descriptor.
    pub fn from_fd(fd: OwnedFd) -> Self {
        use std::os::fd::AsRawFd;
        Self {
            address: Address::Fd(fd.as_raw_fd()),
            state: ListenerState::Open(fd),
        }
    }

    /// Where it listens: with the port that it got.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next channel: `None` if none came within `timeout`, or none can come.
    pub(super) fn accept(
        &mut self,
        control: &Control,
        timeout: Option<Duration>,
    ) -> Result<Option<OwnedFd>, StreamError> {
        let error = |error: Errno| StreamError::Listen {
            address: self.address.clone(),
            source: Arc::new(error.into()),
        };
        let fd = match &self.state {
            ListenerState::Open(fd) => {
                let fd = fd.try_clone().map_err(|source| StreamError::Listen {
                    address: self.address.clone(),
                    source: Arc::new(source),
                })?;
                return Ok(Some(fd));
            }
            ListenerState::Listening { fd, .. } => fd,
        };
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            match accept_with(fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(connection) => {
                    set_socket_options(&connection);
                    return Ok(Some(connection));
                }
                Err(Errno::AGAIN) => {
                    let rest = end.map(|end| end.saturating_duration_since(Instant::now()));
                    if control.wait(fd.as_fd(), PollFlags::IN, rest)?.is_none() {
                        return Ok(None);
                    }
                }
                // Of one who came and went: no reason to stop listening.
                Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => {}
                Err(other) => return Err(error(other)),
            }
        }
    }

    /// Whether more than one channel can come.
    pub(super) fn accepts_many(&self) -> bool {
        matches!(self.state, ListenerState::Listening { .. })
    }
}

/// The file of a listening Unix socket, removed when dropped, unless it is another's by then.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn bind(path: &Path) -> io::Result<(OwnedFd, Self)> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Self::remove_stale(path)?;
                UnixListener::bind(path)?
            }
            other => other?,
        };
        let file = Self {
            path: path.to_owned(),
            identity: Self::identity(path),
        };
        Ok((listener.into(), file))
    }

    fn remove_stale(path: &Path) -> io::Result<()> {
        if !fs::symlink_metadata(path)?.file_type().is_socket() {
            return Err(io::Error::other(
                "there is something that is not a socket: remove it, or choose another path",
            ));
        }
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            _ => Err(io::Error::other(
                "another process listens there: end it, or choose another path",
            )),
        }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        let metadata = fs::symlink_metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == Self::identity(&self.path) {
            // If it cannot be removed, the next who listens replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}
