// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opens the channels of a stream: connects, listens and opens files and file descriptors.

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

/// TCP keep-alive: silence before the first probe. With the two constants below, a dead host is noticed after 25 s.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// TCP keep-alive: interval between probes.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
/// TCP keep-alive: number of unanswered probes after which the connection fails.
const KEEP_ALIVE_PROBES: u32 = 3;
/// The buffer size that is requested for a socket or a pipe, in bytes. The kernel may grant less.
const BUFFER: usize = 1 << 20;
/// Delay before another attempt to connect to a Unix socket whose queue is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Connects `channels` channels to `address`, or opens the address for writing.
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

/// Connects or opens one channel.
///
/// The inner error is a failure to connect or open. The outer error is the reason of a stopped stream, or a failure to
/// wait.
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
            // Only the owner may read guest memory.
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
            // The queue of the Unix socket is full.
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

/// Sets socket options for throughput, and for noticing a dead peer. Ignores failures.
fn set_socket_options(fd: &OwnedFd) {
    let _ = sockopt::set_socket_send_buffer_size(fd, BUFFER);
    let family = sockopt::socket_domain(fd);
    if family == Ok(AddressFamily::INET) || family == Ok(AddressFamily::INET6) {
        // The encoder batches records, so the kernel does not need to.
        let _ = sockopt::set_tcp_nodelay(fd, true);
        let _ = sockopt::set_socket_keepalive(fd, true);
        let _ = sockopt::set_tcp_keepidle(fd, KEEP_ALIVE);
        let _ = sockopt::set_tcp_keepintvl(fd, KEEP_ALIVE_EVERY);
        let _ = sockopt::set_tcp_keepcnt(fd, KEEP_ALIVE_PROBES);
    }
}

/// Returns a duplicate of the file descriptor `number` of this process.
fn duplicate_fd(number: i32) -> io::Result<OwnedFd> {
    // The owner of the descriptor is unknown, so it cannot be borrowed. `pidfd_getfd` takes a bare number.
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    let fd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
    set_socket_options(&fd);
    let _ = rustix::pipe::fcntl_setpipe_size(&fd, BUFFER);
    Ok(fd)
}

/// The source of a receiver's channels: a listening socket, or a file descriptor that is open already.
#[derive(Debug)]
pub struct Listener {
    address: Address,
    state: ListenerState,
}

#[derive(Debug)]
enum ListenerState {
    /// A socket that accepts connections.
    Listening {
        fd: OwnedFd,
        /// Removes the file of a Unix socket on drop.
        _file: Option<SocketFile>,
    },
    /// The only channel.
    Open(OwnedFd),
}

impl Listener {
    /// Listens at `address`, or opens it for reading. Port 0 selects a free port.
    ///
    /// A Unix socket that a dead process left at the path is replaced. Dropping the listener removes its socket file.
    ///
    /// # Errors
    ///
    /// [`StreamError::Listen`] if the address cannot be listened at or opened.
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

    /// Creates a listener for one channel that is connected already.
    pub fn from_fd(fd: OwnedFd) -> Self {
        use std::os::fd::AsRawFd;
        Self {
            address: Address::Fd(fd.as_raw_fd()),
            state: ListenerState::Open(fd),
        }
    }

    /// Returns the address, with the actual port.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns the next channel, or `None` if none connects within `timeout`.
    ///
    /// If the channel was open already, each call returns a duplicate of its file descriptor.
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
                // The call was interrupted, or the peer has already closed its connection. Keep listening.
                Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => {}
                Err(other) => return Err(error(other)),
            }
        }
    }

    /// Returns whether more than one channel can connect.
    pub(super) fn accepts_many(&self) -> bool {
        matches!(self.state, ListenerState::Listening { .. })
    }
}

/// The file of a listening Unix socket. Drop removes it, unless another socket has replaced it.
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
            // Ignored: the next listener replaces a stale socket.
            let _ = fs::remove_file(&self.path);
        }
    }
}
