// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Relays messages between the front end and the crate `vhost-user-backend`, in order to send one more message.
//!
//! The crate (0.24, on `vhost` 0.18) cannot send `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, which a balloon needs. It
//! takes the channel for such messages from the front end and does not expose it. The relay passes on every message
//! with its descriptors, but keeps the channel in `VHOST_USER_SET_BACKEND_REQ_FD` for itself. The crate gets one end
//! of a socket pair instead. (The crate would reject the channel of user-mode Linux anyway, which is a pipe.) Only the
//! control path takes the extra hop.
//!
//! Once the crate can send the message, this module and its use in [`crate::session`] can be removed.

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

use crate::device::NotifyConfigChange;
use crate::sync::lock;

/// Bytes of a message header: request, flags and payload size, 32 bits each.
const HEADER: usize = 12;
/// The largest payload in bytes. The crate has the same limit.
const MAX_PAYLOAD: usize = 4096;
/// The most descriptors in one message.
const MAX_FDS: usize = 32;
/// The front end's message with the channel for messages of the device.
const SET_BACKEND_REQ_FD: u32 = 21;
/// The device's message that the configuration has changed.
const CONFIG_CHANGE: u32 = 2;
/// Version 1 of the protocol, without a reply.
const FLAGS: u32 = 1;

/// Notifies the front end of configuration changes.
#[derive(Debug, Default)]
pub struct ConfigNotifier {
    channel: Mutex<Option<OwnedFd>>,
}

impl ConfigNotifier {
    /// Sets the channel to the front end, and makes it non-blocking.
    ///
    /// # Errors
    ///
    /// If the channel cannot be made non-blocking.
    pub fn connect(&self, channel: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&channel, true)?;
        *lock(&self.channel) = Some(channel);
        Ok(())
    }
}

impl NotifyConfigChange for ConfigNotifier {
    /// Notifies the front end, if there is a channel. Never blocks.
    fn notify(&self) {
        let channel = lock(&self.channel);
        let Some(channel) = channel.as_ref() else {
            debug!("config change not sent: the front end has set no back-end channel");
            return;
        };
        let mut message = [0; HEADER];
        let words = [CONFIG_CHANGE, FLAGS, 0];
        for (bytes, word) in message.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        match rustix::io::write(channel, &message) {
            Ok(HEADER) => {}
            // Earlier messages are unread. The front end reads the current configuration once it reads them.
            Err(rustix::io::Errno::AGAIN) => {}
            Ok(_) => warn!("config change not sent to the front end: short write"),
            Err(error) => warn!("config change not sent to the front end: {error}"),
        }
    }
}

/// How a connection ended.
#[derive(Debug)]
pub enum CloseReason {
    /// The front end closed the connection.
    ByFrontEnd,
    /// This program closed the connection.
    ByBackend,
    /// A message could not be relayed.
    Failed(io::Error),
}

/// The two threads that relay messages, one for each direction.
#[derive(Debug)]
pub struct Relay {
    to_device: JoinHandle<CloseReason>,
    to_front_end: JoinHandle<()>,
}

impl Relay {
    /// Starts to relay messages between `front_end` and `device`. When one side closes, the relay closes the other.
    ///
    /// # Errors
    ///
    /// If a thread cannot be started, or a descriptor cannot be duplicated.
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
                // Fails if a side is already closed.
                let _ = device.shutdown(Shutdown::Both);
                let _ = front_end.shutdown(Shutdown::Both);
                closed
            })?;
        let to_front_end = thread::Builder::new()
            .name("relay-out".into())
            .spawn(move || {
                if let Err(error) = pass_replies(&mut from_device, &mut to_front_end) {
                    debug!("relay of replies to the front end ended: {error}");
                }
                let _ = from_device.shutdown(Shutdown::Both);
                let _ = to_front_end.shutdown(Shutdown::Both);
            })?;
        Ok(Self {
            to_device,
            to_front_end,
        })
    }

    /// Waits for both threads, and returns how the connection ended.
    pub fn join(self) -> CloseReason {
        let _ = self.to_front_end.join();
        self.to_device
            .join()
            .unwrap_or_else(|_| CloseReason::Failed(io::Error::other("relay thread panicked")))
    }
}

/// Relays the device's replies. No reply of this device has descriptors.
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

/// Relays the front end's requests, one message at a time, until a side closes.
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
                    "front end sent a message with a payload of {size} bytes; the limit is {MAX_PAYLOAD}"
                ),
            )
        })?;
        if !payload.is_empty() && !receive(front_end, payload, &mut fds)? {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if request == Some(SET_BACKEND_REQ_FD) {
            if let Some(channel) = fds.pop() {
                notifier.connect(channel)?;
                // The other end of the pair is closed at once. The crate writes nothing to its end.
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

/// Fills `buffer`, and appends the received descriptors to `fds`. Returns false if the stream ended
/// before the first byte.
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
                "message has too many file descriptors",
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
                "message has too many file descriptors",
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
