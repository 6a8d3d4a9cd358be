// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The end of the device process.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::Duration;

use guest_migration::{FileId, Pinning};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{shutdown, Shutdown};
use serde::Serialize;
use tracing::level_filters::LevelFilter;

use super::messages::{Answer, Request, SlowRequest};
use super::service::ARGUMENT;
use crate::device::saved_state::SavedState;
use crate::packets::PacketSocket;
use crate::private_connection::PrivateConnection;
use crate::socket::SocketFiles;
use crate::sync::lock;

/// How long an answer may take. The broker process may get little time on a busy host.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long the answer to a [`SlowRequest`] may take.
const SLOW_TIMEOUT: Duration = Duration::from_secs(90);

/// The broker process of this process. It ends when this value is dropped, or this process ends.
#[derive(Debug)]
pub struct Broker {
    connection: Connection,
    slow_connection: Connection,
    /// The same as `connection`, to see its end.
    end: OwnedFd,
    /// Not waited for: the broker process ends after this one.
    process: Child,
}

impl Broker {
    /// Starts the broker process, with the log level of this one, and waits until it is ready. It starts helper processes
    /// and writes saved states only if `migration` is true.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn start(log_level: LevelFilter, migration: bool) -> io::Result<Self> {
        let (connection, far) = Connection::new(TIMEOUT)?;
        let (slow_connection, slow_far) = Connection::new(SLOW_TIMEOUT)?;
        // The link leads to the running program, also after its file was replaced.
        let process = Command::new("/proc/self/exe")
            .arg0(env::args_os().next().unwrap_or_default())
            .args([ARGUMENT, &log_level.to_string(), &migration.to_string()])
            .stdin(OwnedFd::from(far))
            .stdout(OwnedFd::from(slow_far))
            .spawn()?;
        // It sends one answer before the first request.
        let end = {
            let socket = lock(&connection.socket);
            done(receive(&socket)?.0)?;
            socket.as_fd().try_clone_to_owned()?
        };
        Ok(Self {
            connection,
            slow_connection,
            end,
            process,
        })
    }

    /// Returns a descriptor that is closed by the other side when the broker process ends.
    pub fn end(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Returns the pid of the broker process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Tells the broker process of the files of a listening socket. Files are numbered from 0 in the order of these calls.
    ///
    /// # Errors
    ///
    /// If the broker process has ended.
    pub fn keep_socket(&self, files: &SocketFiles) -> io::Result<()> {
        self.request(&Request::KeepSocket(files.clone()))
    }

    /// Tells the broker process that this process gives up its rights: from now on it can name no file to remove.
    ///
    /// # Errors
    ///
    /// If the broker process has ended.
    pub fn confine(&self) -> io::Result<()> {
        self.request(&Request::Confined)
    }

    /// Removes the files of the socket with the number `index`.
    ///
    /// # Errors
    ///
    /// If they cannot be removed, or the broker process has ended.
    pub fn remove_socket(&self, index: usize) -> io::Result<()> {
        self.request(&Request::RemoveSocket(index))
    }

    /// Searches for devices that pin memory files. Takes time for each process of the host.
    ///
    /// # Errors
    ///
    /// If the search fails, or the broker process has ended.
    pub fn find_pinning(&self, ids: Vec<FileId>) -> io::Result<Pinning> {
        let request = SlowRequest::FindPinning(ids);
        match self.slow_connection.exchange(&request, &[])?.0 {
            Answer::Pinning(pinning) => Ok(pinning),
            other => done(other).and_then(|()| Err(unexpected())),
        }
    }

    /// Creates a private connection.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left, or the broker process has ended.
    pub fn private_connection(&self) -> io::Result<PrivateConnection> {
        let (answer, fds) = self.connection.exchange(&Request::PrivateConnection, &[])?;
        done(answer)?;
        match <[OwnedFd; 2]>::try_from(fds) {
            Ok([listener, stream]) => Ok(PrivateConnection {
                listener: listener.into(),
                stream: stream.into(),
            }),
            Err(_) => Err(unexpected()),
        }
    }

    /// Starts the helper process of a migration, with this standard input and output.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or the broker process has ended.
    pub fn start_helper(&self, input: &OwnedFd, output: &OwnedFd) -> io::Result<()> {
        let fds = [input.as_fd(), output.as_fd()];
        done(
            self.slow_connection
                .exchange(&SlowRequest::StartHelper, &fds)?
                .0,
        )
    }

    /// Writes a saved state to a file.
    ///
    /// # Errors
    ///
    /// If it cannot be written, or the broker process has ended.
    pub fn save_state(&self, state: &SavedState, filename: &Path) -> io::Result<()> {
        let request = SlowRequest::SaveState {
            filename: filename.into(),
            state: Box::new(state.clone()),
        };
        done(self.slow_connection.exchange(&request, &[])?.0)
    }

    fn request(&self, request: &Request) -> io::Result<()> {
        done(self.connection.exchange(request, &[])?.0)
    }
}

/// A connection to the broker process.
#[derive(Debug)]
struct Connection {
    /// Held from a request to its answer.
    socket: Mutex<PacketSocket>,
    timeout: Duration,
}

impl Connection {
    /// Returns the connection and the end of the broker process.
    fn new(timeout: Duration) -> io::Result<(Self, PacketSocket)> {
        let (near, far) = PacketSocket::pair()?;
        for direction in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&near, direction, Some(timeout))?;
        }
        let socket = Mutex::new(near);
        Ok((Self { socket, timeout }, far))
    }

    /// Sends a request and waits for its answer. If the answer takes too long, the connection is closed, because a late
    /// answer would be taken for that of the next request.
    fn exchange(
        &self,
        request: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<(Answer, Vec<OwnedFd>)> {
        let socket = lock(&self.socket);
        let answer = socket.send(request, fds).and_then(|()| receive(&socket));
        answer.map_err(|error| {
            let is = |errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
            if is(Errno::PIPE) {
                return ended();
            }
            if is(Errno::AGAIN) {
                let _ = shutdown(&*socket, Shutdown::Both);
                let text = format!("broker process did not answer within {:?}", self.timeout);
                return io::Error::other(text);
            }
            error
        })
    }
}

fn receive(socket: &PacketSocket) -> io::Result<(Answer, Vec<OwnedFd>)> {
    socket.receive()?.ok_or_else(ended)
}

fn ended() -> io::Error {
    io::Error::other("broker process has ended")
}

fn done(answer: Answer) -> io::Result<()> {
    match answer {
        Answer::Done => Ok(()),
        Answer::Failed(why) => Err(io::Error::other(why)),
        Answer::Pinning(_) => Err(unexpected()),
    }
}

fn unexpected() -> io::Error {
    io::Error::other("broker process sent an unexpected answer")
}
