// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One end of one channel: bytes out of it and into it, without ever waiting deafly.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{fcntl_getfl, fcntl_setfl, fstat, sendfile, FileType, OFlags};
use rustix::io::{readv, writev, Errno};
use rustix::net::{sockopt, Shutdown, SocketType};

use super::control::Control;
use super::error::Fault;
use super::format::{Answer, ANSWER_FIXED};
use super::StreamError;

/// How long words of a receiver that has given up may take to arrive.
const RECEIVER_ERROR_TIMEOUT: Duration = Duration::from_secs(1);

/// What the transport of a channel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TransportKind {
    /// Both ways.
    Socket,
    /// One way.
    Pipe,
    /// One way, never waits.
    File,
}

/// One end of one channel.
#[derive(Debug)]
pub(super) struct Transport {
    fd: Arc<OwnedFd>,
    kind: TransportKind,
    control: Arc<Control>,
    channel: u16,
    /// How long the other side may do nothing while it is waited for.
    timeout: Duration,
    /// Bytes that have gone through.
    offset: u64,
    /// This is the side that answers: what comes from the other is no answer.
    answers: bool,
    /// The file of guest memory cannot be sent from without a copy.
    must_copy: bool,
}

impl Transport {
    /// The transport behind `fd`, which becomes non-blocking.
    pub fn new(
        fd: OwnedFd,
        control: &Arc<Control>,
        channel: u16,
        timeout: Duration,
    ) -> Result<Self, StreamError> {
        let kind = Self::kind_of(&fd).map_err(|error| StreamError::System {
            doing: "cannot use a file descriptor as a transport",
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
            _ => return Err(io::Error::other("no stream socket, pipe or file")),
        };
        fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        Ok(kind)
    }

    /// Whether answers can come back.
    pub fn is_two_way(&self) -> bool {
        self.kind == TransportKind::Socket
    }

    /// The index of the channel.
    pub fn channel(&self) -> u16 {
        self.channel
    }

    /// The channel turned out to have this index.
    pub fn set_channel(&mut self, channel: u16) {
        self.channel = channel;
    }

    /// Bytes that have gone through.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Writes everything.
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

    /// Writes `length` bytes of `file` from `from` on, without a copy where the system can do it.
    ///
    /// # Errors
    ///
    /// In `Ok`, that the file could not be read.
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

    /// Reads what is there, at least a byte; 0 is the end. Waits for `timeout` at most.
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

    /// Gives the other side an answer.
    pub fn answer(&mut self, answer: &Answer) -> Result<(), StreamError> {
        // What goes back does not count as a byte of the stream.
        let offset = self.offset;
        self.answers = true;
        let done = self.write(&mut [IoSlice::new(&answer.encode())]);
        self.offset = offset;
        done
    }

    /// Tells the other side, if it can hear, why the stream ends, and hangs up. Works on a stopped stream as well.
    pub fn send_and_shut_down(&self, answer: &Answer) {
        if self.kind == TransportKind::Socket {
            // Best effort: the buffer of an idle direction has room for it, and whoever is gone hears nothing.
            let _ = rustix::io::write(&self.fd, &answer.encode());
            let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
        }
    }

    /// Reads and forgets what comes until the other side hangs up, at most until `end`. A connection that is closed
    /// with bytes unread takes with it, on TCP, what was said last.
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

    /// Waits for an answer. What a receiver says that refuses or has given up is an error.
    pub fn next_answer(&mut self, timeout: Duration) -> Result<Answer, StreamError> {
        let offset = self.offset;
        let answer = self.read_answer(timeout);
        self.offset = offset;
        match answer? {
            Answer::Refused(words) => Err(StreamError::Refused(words)),
            Answer::Failed(words) => Err(StreamError::ReceiverFailed(words)),
            answer => Ok(answer),
        }
    }

    fn read_answer(&mut self, timeout: Duration) -> Result<Answer, StreamError> {
        let channel = self.channel;
        let fault = |fault: Fault| StreamError::Answer { channel, fault };
        let mut fixed = [0; ANSWER_FIXED];
        self.read_exact(&mut fixed, timeout)?;
        let rest = Answer::rest(&fixed).map_err(fault)?;
        let mut bytes = fixed.to_vec();
        bytes.resize(ANSWER_FIXED + rest, 0);
        if let Some(rest) = bytes.get_mut(ANSWER_FIXED..) {
            self.read_exact(rest, timeout)?;
        }
        Answer::decode(&bytes).map_err(fault)
    }

    fn read_exact(&mut self, mut bytes: &mut [u8], timeout: Duration) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let count = self.read(&mut [IoSliceMut::new(bytes)], Some(timeout))?;
            if count == 0 {
                return Err(self.closed());
            }
            bytes = bytes.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Says something if a write did not go through: an error, or nothing if it is to be tried again.
    fn not_written(&mut self, doing: &'static str, error: Errno) -> Result<(), StreamError> {
        match error {
            Errno::INTR => Ok(()),
            Errno::AGAIN => {
                let events = match self.kind {
                    // The other side has nothing to say now, unless it gives up.
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

    /// What the receiver said before it went, or else `error`.
    fn receiver_error_or(&mut self, error: StreamError) -> StreamError {
        let error = self.stop_reason_or(error);
        let hears = self.kind == TransportKind::Socket && !self.answers;
        if !hears || matches!(error, StreamError::Cancelled) {
            return error;
        }
        match self.next_answer(RECEIVER_ERROR_TIMEOUT) {
            Err(words @ (StreamError::ReceiverFailed(_) | StreamError::Refused(_))) => words,
            Err(cancelled @ StreamError::Cancelled) => cancelled,
            Err(_) => error,
            Ok(answer) => StreamError::Answer {
                channel: self.channel,
                fault: Fault::AnswerKind(answer.number()),
            },
        }
    }

    /// Why the stream was stopped, or else `error`: a socket that was shut down on purpose fails in many ways.
    fn stop_reason_or(&self, error: StreamError) -> StreamError {
        self.control.check().err().unwrap_or(error)
    }

    /// That the other side is gone.
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
