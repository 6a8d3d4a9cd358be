// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The end of the device process.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use guest_migration::{FileId, Pinning};
use tracing::level_filters::LevelFilter;

use super::messages::{Answer, Request};
use super::service::ARGUMENT;
use crate::device::saved_state::SavedState;
use crate::packets::PacketSocket;
use crate::private_connection::PrivateConnection;
use crate::socket::SocketFiles;
use crate::sync::lock;

/// The broker process of this process. It ends when this value is dropped, or this process ends.
#[derive(Debug)]
pub struct Broker {
    /// Held from a request to its answer.
    socket: Mutex<PacketSocket>,
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
        let (near, far) = PacketSocket::pair()?;
        // The link leads to the running program, also after its file was replaced.
        let process = Command::new("/proc/self/exe")
            .arg0(env::args_os().next().unwrap_or_default())
            .args([ARGUMENT, &log_level.to_string(), &migration.to_string()])
            .stdin(OwnedFd::from(far))
            .stdout(Stdio::null())
            .spawn()?;
        // It sends one answer before the first request.
        done(receive(&near)?.0)?;
        Ok(Self {
            socket: Mutex::new(near),
            process,
        })
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
        done(self.request(&Request::KeepSocket(files.clone()), &[])?)
    }

    /// Tells the broker process that this process gives up its rights: from now on it can name no file to remove.
    ///
    /// # Errors
    ///
    /// If the broker process has ended.
    pub fn confine(&self) -> io::Result<()> {
        done(self.request(&Request::Confined, &[])?)
    }

    /// Removes the files of the socket with the number `index`.
    ///
    /// # Errors
    ///
    /// If they cannot be removed, or the broker process has ended.
    pub fn remove_socket(&self, index: usize) -> io::Result<()> {
        done(self.request(&Request::RemoveSocket(index), &[])?)
    }

    /// Searches for devices that pin memory files. Takes time for each process of the host.
    ///
    /// # Errors
    ///
    /// If the search fails, or the broker process has ended.
    pub fn find_pinning(&self, ids: Vec<FileId>) -> io::Result<Pinning> {
        match self.request(&Request::FindPinning(ids), &[])? {
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
        let (answer, fds) = self.exchange(&Request::PrivateConnection, &[])?;
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
        done(self.request(&Request::StartHelper, &[input.as_fd(), output.as_fd()])?)
    }

    /// Writes a saved state to a file.
    ///
    /// # Errors
    ///
    /// If it cannot be written, or the broker process has ended.
    pub fn save_state(&self, state: &SavedState, filename: &Path) -> io::Result<()> {
        let request = Request::SaveState {
            filename: filename.into(),
            state: Box::new(state.clone()),
        };
        done(self.request(&request, &[])?)
    }

    fn request(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        self.exchange(request, fds).map(|(answer, _)| answer)
    }

    fn exchange(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<(Answer, Vec<OwnedFd>)> {
        let socket = lock(&self.socket);
        socket.send(request, fds)?;
        receive(&socket)
    }
}

fn receive(socket: &PacketSocket) -> io::Result<(Answer, Vec<OwnedFd>)> {
    socket
        .receive()?
        .ok_or_else(|| io::Error::other("broker process has ended"))
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
