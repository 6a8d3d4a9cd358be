// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The transport of one channel: reads and writes bytes on a socket, pipe or file.
//!
//! Sockets and pipes are non-blocking. Every wait for them ends when the stream is stopped (see [`Control`]). A sender
//! that waits for buffer space on a socket also polls for an answer, so it notices a receiver that fails.

mod answers;

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{fcntl_getfl, fcntl_setfl, fstat, sendfile, FileType, OFlags};
use rustix::io::{readv, writev, Errno};
use rustix::net::{sockopt, SocketType};

use super::control::Control;
use super::StreamError;

/// The kind of a transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TransportKind {
    /// A stream socket. Two-way.
    Socket,
    /// A pipe. One-way.
    Pipe,
    /// A regular file or a character device. One-way; never waits.
    File,
}

/// The transport of one channel.
#[derive(Debug)]
pub(super) struct Transport {
    fd: Arc<OwnedFd>,
    kind: TransportKind,
    control: Arc<Control>,
    channel: u16,
    /// How long a write waits for the peer to take more bytes.
    timeout: Duration,
    /// Bytes of the stream that are read or written.
    offset: u64,
    /// Whether this end sends answers. Bytes from the peer are not answers then.
    answers: bool,
    /// Whether the kernel cannot send the memory file on this transport without a copy.
    must_copy: bool,
}

impl Transport {
    /// Creates a transport for `fd`. Makes a socket or pipe non-blocking.
    pub fn new(
        fd: OwnedFd,
        control: &Arc<Control>,
        channel: u16,
        timeout: Duration,
    ) -> Result<Self, StreamError> {
        let kind = Self::kind_of(&fd).map_err(|error| StreamError::System {
            doing: "cannot use the file descriptor as a transport",
            source: Arc::new(error),
        })?;
        let fd = Arc::new(fd);
        if kind == TransportKind::Socket {
            control.register_socket(&fd);
        }
        Ok(Self {
            fd,
            kind,
            control: Arc::clone(control),
            channel,
            timeout,
            offset: 0,
            answers: false,
            must_copy: false,
        })
    }

    fn kind_of(fd: &OwnedFd) -> io::Result<TransportKind> {
        let kind = match FileType::from_raw_mode(fstat(fd)?.st_mode) {
            FileType::Socket if sockopt::socket_type(fd)? == SocketType::STREAM => {
                TransportKind::Socket
            }
            FileType::Fifo => TransportKind::Pipe,
            FileType::RegularFile | FileType::CharacterDevice => return Ok(TransportKind::File),
            _ => return Err(io::Error::other("not a stream socket, pipe or file")),
        };
        fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        Ok(kind)
    }

    /// Returns whether the receiver can answer on this transport.
    pub fn is_two_way(&self) -> bool {
        self.kind == TransportKind::Socket
    }

    /// Returns the index of the channel.
    pub fn channel(&self) -> u16 {
        self.channel
    }

    /// Sets the index of the channel, which the receiver reads from the header.
    pub fn set_channel(&mut self, channel: u16) {
        self.channel = channel;
    }

    /// Returns the number of bytes of the stream that are read or written.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Writes all bytes of `slices`. Waits while the transport is full.
    pub fn write(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<(), StreamError> {
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            self.control.check()?;
            match writev(&self.fd, slices) {
                Ok(0) => return Err(self.closed()),
                Ok(count) => {
                    self.offset += count as u64;
                    IoSlice::advance_slices(&mut slices, count);
                }
                Err(error) => self.not_written("writing", error)?,
            }
        }
        Ok(())
    }

    /// Writes `length` bytes of `file`, starting at offset `from`. Avoids a copy if the kernel supports that.
    ///
    /// # Errors
    ///
    /// The inner error is a failure to read the file. The outer error is a failure of the transport, or the reason of a
    /// stopped stream.
    pub fn write_file(
        &mut self,
        file: &File,
        from: u64,
        length: u64,
    ) -> Result<io::Result<()>, StreamError> {
        let end = from.saturating_add(length);
        let mut at = from;
        while at < end && !self.must_copy {
            self.control.check()?;
            let count = usize::try_from(end - at).unwrap_or(usize::MAX);
            match sendfile(&self.fd, file, Some(&mut at), count) {
                Ok(0) => return Ok(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.offset += count as u64,
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.must_copy = true,
                Err(Errno::IO) => return Ok(Err(Errno::IO.into())),
                Err(error) => self.not_written("sending from a file", error)?,
            }
        }
        if at < end {
            let mut bytes = vec![0; usize::try_from(end - at).unwrap_or(0)];
            if let Err(error) = std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, at) {
                return Ok(Err(error));
            }
            self.write(&mut [IoSlice::new(&bytes)])?;
        }
        Ok(Ok(()))
    }

    /// Reads at least one byte, and returns how many. Returns 0 at the end of the stream. Waits for at most `timeout`,
    /// if it is given.
    pub fn read(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
        timeout: Option<Duration>,
    ) -> Result<usize, StreamError> {
        loop {
            self.control.check()?;
            match readv(&self.fd, slices) {
                Ok(count) => {
                    self.offset += count as u64;
                    return Ok(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let ready = self.control.wait(self.fd.as_fd(), PollFlags::IN, timeout)?;
                    if ready.is_none() {
                        return Err(self.stalled("reading", timeout.unwrap_or_default()));
                    }
                }
                Err(Errno::CONNRESET) => return Err(self.stop_reason_or(self.closed())),
                Err(error) => return Err(self.stop_reason_or(self.failed("reading", error))),
            }
        }
    }

    /// Reads and discards bytes until the peer closes the connection, at most until `end`.
    ///
    /// Closing a TCP connection with unread bytes resets it, and the peer may lose the last answer.
    pub fn drain(&self, end: std::time::Instant) {
        let mut buffer = [0; 16384];
        while self.kind == TransportKind::Socket && std::time::Instant::now() < end {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(0) => return,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let rest = end.saturating_duration_since(std::time::Instant::now());
                    let mut fds = [rustix::event::PollFd::new(&self.fd, PollFlags::IN)];
                    let timeout = rest.try_into().ok();
                    let _ = rustix::event::poll(&mut fds, timeout.as_ref());
                }
                Err(_) => return,
            }
        }
    }

    /// Handles the error of a write. Waits while the transport is full. Returns `Ok` if the write can be retried.
    fn not_written(&mut self, doing: &'static str, error: Errno) -> Result<(), StreamError> {
        match error {
            Errno::INTR => Ok(()),
            Errno::AGAIN => {
                let events = match self.kind {
                    // The receiver sends nothing at this point unless it fails.
                    TransportKind::Socket if !self.answers => PollFlags::OUT | PollFlags::IN,
                    _ => PollFlags::OUT,
                };
                match self
                    .control
                    .wait(self.fd.as_fd(), events, Some(self.timeout))?
                {
                    None => Err(self.stalled(doing, self.timeout)),
                    Some(ready) if ready.contains(PollFlags::IN) => {
                        Err(self.receiver_error_or(self.closed()))
                    }
                    Some(_) => Ok(()),
                }
            }
            Errno::PIPE | Errno::CONNRESET => {
                let closed = self.closed();
                Err(self.receiver_error_or(closed))
            }
            error => {
                let failed = self.failed(doing, error);
                Err(self.receiver_error_or(failed))
            }
        }
    }

    /// Returns the reason of a stopped stream, or else `error`. A socket that was shut down on cancellation fails in
    /// many ways.
    fn stop_reason_or(&self, error: StreamError) -> StreamError {
        self.control.check().err().unwrap_or(error)
    }

    /// Returns the error for a connection that the peer closed.
    pub fn closed(&self) -> StreamError {
        StreamError::Closed {
            channel: self.channel,
            offset: self.offset,
        }
    }

    fn stalled(&self, doing: &'static str, timeout: Duration) -> StreamError {
        StreamError::Stalled {
            channel: self.channel,
            offset: self.offset,
            doing,
            timeout,
        }
    }

    fn failed(&self, doing: &'static str, error: Errno) -> StreamError {
        StreamError::Transport {
            channel: self.channel,
            offset: self.offset,
            doing,
            source: Arc::new(error.into()),
        }
    }
}
