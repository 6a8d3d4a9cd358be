// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Listens for the channels of a stream, or opens the only one.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{accept_with, sockopt, SocketFlags};

use super::control::Control;
use super::socket_file::SocketFile;
use super::socket_options::{duplicate_fd, set_socket_options};
use super::{Address, StreamError};

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
