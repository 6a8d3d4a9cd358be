// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Relays messages between the front end and the crate `vhost-user-backend`, in order to send one more message.
//!
//! The crate (0.24, on `vhost` 0.18) cannot send `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, which a balloon needs. It
//! takes the channel for such messages from the front end and does not expose it. The relay passes on every message
//! with its descriptors, but keeps the channel in `VHOST_USER_SET_BACKEND_REQ_FD` for itself. The crate gets one end
//! of a socket pair instead. (The crate would reject the channel of user-mode Linux anyway, which is a pipe.) Only the
//! control path takes the extra hop.
//!
//! The relay also refuses the rings of a front end that shares no memory. The crate would end the connection, and QEMU
//! (11.1) aborts when that happens while it starts a device.
//!
//! Once the crate can send the message, this module and its use in [`crate::session`] can be removed.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tracing::{debug, warn};
use vhost::vhost_user::message::FrontendReq;

use crate::descriptors::{check_sockets, make_nonblocking, DescriptorError, SharedDescriptor};
use crate::device::NotifyConfigChange;
use crate::packets::{IN_FLIGHT_INTERVAL, IN_FLIGHT_TIMEOUT};
use crate::sync::lock;

/// Bytes of a message header: request, flags and payload size, 32 bits each.
const HEADER: usize = 12;
/// The largest payload in bytes. The crate has the same limit.
const MAX_PAYLOAD: usize = 4096;
/// The most descriptors in one message.
const MAX_FDS: usize = 32;
/// How long a message may take from its first byte to its last. A front end writes it with one system call.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// The front end's messages about the guest memory that it shares: all of it, one region more, one region less.
const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
/// The most memory regions. The crate answers VHOST_USER_GET_MAX_MEM_SLOTS with this number.
const MAX_REGIONS: u32 = 509;
/// The front end's message with the addresses of a ring.
const SET_VRING_ADDR: u32 = 9;
/// The front end's messages with the kick and the call descriptor of a queue.
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
/// The front end's message with the channel for messages of the device.
const SET_BACKEND_REQ_FD: u32 = 21;
/// The device's message that the configuration has changed.
const CONFIG_CHANGE: u32 = 2;
/// Version 1 of the protocol, without a reply.
const FLAGS: u32 = 1;
/// The flag of a message that is a reply.
const IS_REPLY: u32 = 1 << 2;
/// The flag of a message that wants a reply although its request has none.
const NEEDS_REPLY: u32 = 1 << 3;

/// Notifies the front end of configuration changes.
#[derive(Debug, Default)]
pub struct ConfigNotifier {
    channel: Mutex<Option<SharedDescriptor>>,
}

impl ConfigNotifier {
    /// Sets the channel to the front end, and makes it non-blocking.
    ///
    /// # Errors
    ///
    /// If the channel cannot be made non-blocking.
    pub fn connect(&self, channel: OwnedFd) -> io::Result<()> {
        make_nonblocking(&channel)
            .map_err(|error| refused("channel for messages of the device", &error))?;
        let before = lock(&self.channel).replace(SharedDescriptor::new(channel));
        drop(before);
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
        match channel.write(&message) {
            Ok(HEADER) => {}
            // Earlier messages are unread. The front end reads the current configuration once it reads them.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
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
    /// The last request that was passed on; 0 before the first.
    last_request: Arc<AtomicU32>,
}

/// Closes both connections when a thread ends, also by a panic.
struct Closing(UnixStream, UnixStream);

impl Drop for Closing {
    fn drop(&mut self) {
        // Fails if a side is already closed.
        let _ = self.0.shutdown(Shutdown::Both);
        let _ = self.1.shutdown(Shutdown::Both);
    }
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
        let outgoing = Closing(device.try_clone()?, front_end.try_clone()?);
        let incoming = Closing(front_end, device);
        let last_request = Arc::new(AtomicU32::new(0));
        let passed = last_request.clone();
        let to_device = thread::Builder::new()
            .name("relay-in".into())
            .spawn(move || {
                let Closing(front_end, device) = &incoming;
                pass_requests(front_end, device, &notifier, &passed)
                    .unwrap_or_else(CloseReason::Failed)
            })?;
        let to_front_end = thread::Builder::new()
            .name("relay-out".into())
            .spawn(move || {
                let Closing(device, front_end) = &outgoing;
                if let Err(error) = pass_replies(device, front_end) {
                    debug!("relay of replies to the front end ended: {error}");
                }
            })?;
        Ok(Self {
            to_device,
            to_front_end,
            last_request,
        })
    }

    /// Returns the name of the last request that was passed on.
    pub fn last_request(&self) -> String {
        let number = self.last_request.load(Ordering::Acquire);
        match FrontendReq::try_from(number) {
            Ok(request) => format!("{request:?}"),
            Err(_) => number.to_string(),
        }
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
fn pass_replies(mut device: &UnixStream, mut front_end: &UnixStream) -> io::Result<()> {
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
    last_request: &AtomicU32,
) -> io::Result<CloseReason> {
    let mut message = [0; HEADER + MAX_PAYLOAD];
    let (mut shared, mut rings) = (SharedMemory::default(), RefusedRings::default());
    loop {
        let mut fds = Vec::new();
        let (header, payload) = message.split_at_mut(HEADER);
        let Some(started) = receive(front_end, header, &mut fds, None)? else {
            return Ok(CloseReason::ByFrontEnd);
        };
        let mut words = header
            .chunks_exact(4)
            .filter_map(|bytes| bytes.try_into().ok())
            .map(u32::from_ne_bytes);
        let (request, flags, size) = (words.next(), words.next().unwrap_or(0), words.next());
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
        receive(front_end, payload, &mut fds, Some(started))?;
        check_sockets(&fds, front_end).map_err(|error| refused("descriptor", &error))?;
        match request {
            Some(SET_BACKEND_REQ_FD) => {
                if let Some(channel) = fds.pop() {
                    notifier.connect(channel)?;
                    // The other end of the pair is closed at once. The crate writes nothing to its end.
                    fds = vec![UnixStream::pair()?.0.into()];
                }
            }
            Some(SET_VRING_ADDR) if rings.refuse_address(payload, shared.is_empty()) => {
                shared.warn_once();
                if flags & NEEDS_REPLY != 0 {
                    reply(front_end, SET_VRING_ADDR, 1)?;
                }
                continue;
            }
            Some(SET_VRING_KICK) => {
                check_queue_descriptors("kick", payload, &fds)?;
                if rings.is_refused(payload) {
                    if flags & NEEDS_REPLY != 0 {
                        reply(front_end, SET_VRING_KICK, 0)?;
                    }
                    continue;
                }
            }
            Some(SET_VRING_CALL) => check_queue_descriptors("call", payload, &fds)?,
            Some(request) => shared.follow(request, payload)?,
            None => {}
        }
        check_spare_descriptors(&fds)?;
        last_request.store(request.unwrap_or(0), Ordering::Release);
        let length = HEADER + size;
        match send(device, message.get(..length).unwrap_or_default(), &fds) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                return Ok(CloseReason::ByBackend)
            }
            other => other?,
        }
    }
}

/// The number of memory regions that the front end shares.
#[derive(Debug, Default)]
struct SharedMemory {
    regions: u32,
    is_warned: bool,
}

impl SharedMemory {
    fn is_empty(&self) -> bool {
        self.regions == 0
    }

    /// Counts the regions that a request adds or removes.
    ///
    /// # Errors
    ///
    /// If the front end adds more regions than the crate offers. The crate does not check that.
    fn follow(&mut self, request: u32, payload: &[u8]) -> io::Result<()> {
        let number = payload
            .first_chunk()
            .map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        match request {
            SET_MEM_TABLE => self.regions = number,
            ADD_MEM_REG if self.regions >= MAX_REGIONS => {
                let text = format!("front end adds more than {MAX_REGIONS} memory regions");
                return Err(io::Error::new(ErrorKind::InvalidData, text));
            }
            ADD_MEM_REG => self.regions = self.regions.saturating_add(1),
            REM_MEM_REG => self.regions = self.regions.saturating_sub(1),
            _ => {}
        }
        Ok(())
    }

    fn warn_once(&mut self) {
        if !std::mem::replace(&mut self.is_warned, true) {
            warn!(
                "front end starts a queue and shares no guest memory, so the balloon does not work: start the VMM with \
                 shared memory, such as QEMU's memory-backend-memfd with share=on"
            );
        }
    }
}

/// The rings that have no addresses, because the device would have refused them. They are not started: the device would
/// look for them at address 0. A front end that shares memory later sends the addresses and the kick again.
#[derive(Debug, Default)]
struct RefusedRings {
    /// Queues whose last addresses were refused, one bit for each.
    queues: u32,
}

impl RefusedRings {
    /// Remembers whether the addresses in `payload` are refused, and returns it.
    fn refuse_address(&mut self, payload: &[u8], refuses: bool) -> bool {
        let queue = Self::bit(payload);
        if refuses {
            self.queues |= queue;
        } else {
            self.queues &= !queue;
        }
        refuses
    }

    /// Returns whether the ring that `payload` names has no addresses.
    fn is_refused(&self, payload: &[u8]) -> bool {
        self.queues & Self::bit(payload) != 0
    }

    /// Returns the bit of the queue whose index is the first byte of `payload`. The device has no queue above 31.
    fn bit(payload: &[u8]) -> u32 {
        let index = payload.first().copied().unwrap_or(u8::MAX);
        1u32.checked_shl(index.into()).unwrap_or(0)
    }
}

/// Answers a request in the device's place. The value 0 is success.
fn reply(mut front_end: &UnixStream, request: u32, value: u64) -> io::Result<()> {
    let mut reply = Vec::new();
    for word in [request, FLAGS | IS_REPLY, 8] {
        reply.extend_from_slice(&word.to_ne_bytes());
    }
    reply.extend_from_slice(&value.to_ne_bytes());
    front_end.write_all(&reply)
}

/// Makes the descriptors of a queue non-blocking. The first byte of the payload is the index of the queue.
fn check_queue_descriptors(name: &str, payload: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let index = payload.first().copied().unwrap_or(0);
    fds.iter().try_for_each(|fd| {
        make_nonblocking(fd)
            .map_err(|error| refused(&format!("{name} descriptor of queue {index}"), &error))
    })
}

/// Checks that the process can have as many descriptors as the crate needs for a message with `fds`: a copy of each, and
/// another one of a kick descriptor. The crate takes a message without its descriptors for an invalid one.
fn check_spare_descriptors(fds: &[OwnedFd]) -> io::Result<()> {
    let copies = fds.iter().chain(fds.first()).map(OwnedFd::try_clone);
    let copies: io::Result<Vec<OwnedFd>> = copies.collect();
    copies.map(drop).map_err(|error| {
        let text =
            format!("the daemon has no descriptors left to keep those of a message: {error}");
        io::Error::new(error.kind(), text)
    })
}

fn refused(what: &str, error: &DescriptorError) -> io::Error {
    let text = format!("front end's {what} is refused: {error}");
    io::Error::new(ErrorKind::InvalidData, text)
}

/// Fills `buffer`, and appends the received descriptors to `fds`. Returns the time of the first byte of the message,
/// which is `started` if a part of it has arrived before, or `None` if the stream ended before that byte.
///
/// Waits for the first byte as long as it takes, and for the rest for [`MESSAGE_TIMEOUT`].
fn receive(
    stream: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    mut started: Option<Instant>,
) -> io::Result<Option<Instant>> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        stream.set_read_timeout(started.map(time_left).transpose()?)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = match recvmsg(
            stream,
            &mut [IoSliceMut::new(rest)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(received) => received,
            // The time limit is checked again.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(rustix::io::Errno::CONNRESET) => match started {
                None => return Ok(None),
                Some(_) => return Err(cut_off()),
            },
            Err(error) => return Err(error.into()),
        };
        let is_truncated = received.flags.contains(ReturnFlags::CTRUNC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if is_truncated || fds.len() > MAX_FDS {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!(
                    "message has more than {MAX_FDS} descriptors, or the daemon has no descriptors left to receive them"
                ),
            ));
        }
        match (received.bytes, started) {
            (0, None) => return Ok(None),
            (0, Some(_)) => return Err(cut_off()),
            (bytes, _) => filled += bytes,
        }
        started.get_or_insert_with(Instant::now);
    }
    Ok(started)
}

fn cut_off() -> io::Error {
    let text = "front end closed the connection in the middle of a message";
    io::Error::new(ErrorKind::UnexpectedEof, text)
}

/// Returns how long the rest of a message may take that began at `started`.
fn time_left(started: Instant) -> io::Result<Duration> {
    match MESSAGE_TIMEOUT.checked_sub(started.elapsed()) {
        None | Some(Duration::ZERO) => Err(io::Error::new(
            ErrorKind::TimedOut,
            format!(
                "front end did not complete a message within {} s",
                MESSAGE_TIMEOUT.as_secs()
            ),
        )),
        Some(rest) => Ok(rest),
    }
}

/// Sends all of `bytes`, and `fds` with the first of them. Tries again for [`IN_FLIGHT_TIMEOUT`] if the user of this process
/// has too many descriptors in flight, which other processes may have sent.
fn send(stream: &UnixStream, mut bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let begun = Instant::now();
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
            Err(rustix::io::Errno::TOOMANYREFS) if begun.elapsed() < IN_FLIGHT_TIMEOUT => {
                thread::sleep(IN_FLIGHT_INTERVAL);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_never_completed_ends_the_connection() {
        let (stream, other) = UnixStream::pair().unwrap();
        // The first byte came a moment less than the limit ago.
        let started = Instant::now().checked_sub(MESSAGE_TIMEOUT - Duration::from_millis(20));
        let error = receive(&stream, &mut [0; 12], &mut Vec::new(), started).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("within 60 s"), "{error}");
        drop(other);
    }
}
