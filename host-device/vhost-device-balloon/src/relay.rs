// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A hop between the front end and the crate `vhost-user-backend`, for one message's sake.
//!
//! The crate (0.24, on `vhost` 0.18) cannot send `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, without which a
//! balloon is useless: it takes the channel for such messages from the front end and hides it. The relay
//! stands in between, passes every message on with its descriptors, and takes that channel out of
//! `VHOST_USER_SET_BACKEND_REQ_FD`; the crate gets one of the relay's own in its place. (It would refuse the
//! one of user-mode Linux anyway, which is a pipe.) Only the control path takes the extra hop.
//!
//! When the crate learns the message, this file and its use in [`crate::session`] can go.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tracing::{debug, warn};

use crate::lock;

/// Bytes of a message's header: request, flags, size of what follows, 32 bits each.
const HEADER: usize = 12;
/// The most bytes that follow a header; the crate takes no more either.
const MAX_PAYLOAD: usize = 4096;
/// The most descriptors that come with a message.
const MAX_FDS: usize = 32;
/// The front end's message that carries the channel for the device's own messages.
const SET_BACKEND_REQ_FD: u32 = 21;
/// The device's message "read the configuration again".
const CONFIG_CHANGE: u32 = 2;
/// Version 1 of the protocol, no reply wanted.
const FLAGS: u32 = 1;

/// Tells the front end that the configuration has changed.
#[derive(Debug, Default)]
pub struct ConfigNotifier {
    channel: Mutex<Option<OwnedFd>>,
}

impl ConfigNotifier {
    /// Takes the channel to the front end.
    ///
    /// # Errors
    ///
    /// If it cannot be made to not block.
    pub fn connect(&self, channel: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&channel, true)?;
        *lock(&self.channel) = Some(channel);
        Ok(())
    }

    /// Tells the front end, if there is a channel to it. Never blocks.
    pub fn notify(&self) {
        let channel = lock(&self.channel);
        let Some(channel) = channel.as_ref() else {
            debug!("the configuration has changed, and the front end has no channel to hear of it");
            return;
        };
        let mut message = [0; HEADER];
        let words = [CONFIG_CHANGE, FLAGS, 0];
        for (bytes, word) in message.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        match rustix::io::write(channel, &message) {
            Ok(HEADER) => {}
            // It has not read the last ones: it will read the configuration once it does.
            Err(rustix::io::Errno::AGAIN) => {}
            Ok(_) => warn!("the front end was not told of a configuration change: short write"),
            Err(error) => warn!("the front end was not told of a configuration change: {error}"),
        }
    }
}

/// Who ended a connection.
#[derive(Debug)]
pub enum CloseReason {
    /// The front end closed its side.
    ByFrontEnd,
    /// This program did.
    ByBackend,
    /// A message could not be passed on.
    Failed(io::Error),
}

/// The two threads that pass messages on, one each way.
#[derive(Debug)]
pub struct Relay {
    to_device: JoinHandle<CloseReason>,
    to_front_end: JoinHandle<()>,
}

impl Relay {
    /// Starts to pass messages between `front_end` and `device`. Ends when either side closes, and closes the
    /// other then.
    ///
    /// # Errors
    ///
    /// If a thread or a copy of a descriptor cannot be made.
    pub fn start(
        front_end: UnixStream,
        device: UnixStream,
        notifier: Arc<ConfigNotifier>,
    ) -> io::Result<Self> {
        let (mut from_device, mut to_front_end) = (device.try_clone()?, front_end.try_clone()?);
        let to_device = thread::Builder::new()
            .name("relay-in".into())
            .spawn(move || {
                let closed = match pass_requests(&front_end, &device, &notifier) {
                    Ok(closed) => closed,
                    Err(error) => CloseReason::Failed(error),
                };
                // The ends may be closed already; that is what was wanted.
                let _ = device.shutdown(Shutdown::Both);
                let _ = front_end.shutdown(Shutdown::Both);
                closed
            })?;
        let to_front_end = thread::Builder::new()
            .name("relay-out".into())
            .spawn(move || {
                if let Err(error) = pass_replies(&mut from_device, &mut to_front_end) {
                    debug!("replies to the front end end: {error}");
                }
                let _ = from_device.shutdown(Shutdown::Both);
                let _ = to_front_end.shutdown(Shutdown::Both);
            })?;
        Ok(Self {
            to_device,
            to_front_end,
        })
    }

    /// Waits for both threads, and says who ended the connection.
    pub fn join(self) -> CloseReason {
        let _ = self.to_front_end.join();
        self.to_device
            .join()
            .unwrap_or_else(|_| CloseReason::Failed(io::Error::other("the relay panicked")))
    }
}

/// Passes the device's replies on. None of those that this device gives carries a descriptor.
fn pass_replies(device: &mut UnixStream, front_end: &mut UnixStream) -> io::Result<()> {
    let mut buffer = [0; HEADER + MAX_PAYLOAD];
    loop {
        let length = match device.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        front_end.write_all(buffer.get(..length).unwrap_or_default())?;
    }
}

/// Passes the front end's requests on, message by message, until a side closes.
fn pass_requests(
    front_end: &UnixStream,
    device: &UnixStream,
    notifier: &ConfigNotifier,
) -> io::Result<CloseReason> {
    let mut message = [0; HEADER + MAX_PAYLOAD];
    loop {
        let mut fds = Vec::new();
        let (header, payload) = message.split_at_mut(HEADER);
        if !receive(front_end, header, &mut fds)? {
            return Ok(CloseReason::ByFrontEnd);
        }
        let mut words = header
            .chunks_exact(4)
            .filter_map(|bytes| bytes.try_into().ok())
            .map(u32::from_ne_bytes);
        let (request, size) = (words.next(), words.nth(1));
        let size = size
            .and_then(|size| usize::try_from(size).ok())
            .unwrap_or(usize::MAX);
        let payload = payload.get_mut(..size).ok_or_else(|| {
            io::Error::new(
                ErrorKind::InvalidData,
                format!(
                    "the front end sent a message of {size} bytes; {MAX_PAYLOAD} are the limit"
                ),
            )
        })?;
        if !payload.is_empty() && !receive(front_end, payload, &mut fds)? {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if request == Some(SET_BACKEND_REQ_FD) {
            if let Some(channel) = fds.pop() {
                notifier.connect(channel)?;
                // Nobody reads the other end, and nothing is ever written to this one.
                fds = vec![UnixStream::pair()?.0.into()];
            }
        }
        let length = HEADER + size;
        match send(device, message.get(..length).unwrap_or_default(), &fds) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                return Ok(CloseReason::ByBackend)
            }
            other => other?,
        }
    }
}

/// Fills `buffer`, and appends the descriptors that come with it. False if the stream has ended before it.
fn receive(stream: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = match recvmsg(
            stream,
            &mut [IoSliceMut::new(rest)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::CONNRESET) => 0,
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if fds.len() > MAX_FDS {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "too many descriptors with a message",
            ));
        }
        match (received, filled) {
            (0, 0) => return Ok(false),
            (0, _) => return Err(ErrorKind::UnexpectedEof.into()),
            (received, _) => filled += received,
        }
    }
    Ok(true)
}

/// Sends all of `bytes`, and `fds` with the first of them.
fn send(stream: &UnixStream, mut bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let mut borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "too many descriptors with a message",
            ));
        }
        match sendmsg(
            stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => {
                bytes = bytes.get(sent..).unwrap_or_default();
                borrowed.clear();
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
