// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A socket for packets between processes of this program: each holds one JSON value, and may carry file descriptors.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    recvmsg, sendmsg, socketpair, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage,
    RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType,
};
use serde::de::DeserializeOwned;
use serde::Serialize;

/// The most bytes of a packet.
const MAX_BYTES: usize = 64 << 10;

/// How long sending is tried again if the user of this process has more descriptors in flight, in all its processes, than
/// one process may have open. The kernel refuses further ones then (ETOOMANYREFS).
pub const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval between two attempts.
pub const IN_FLIGHT_INTERVAL: Duration = Duration::from_millis(2);

/// The most file descriptors of a packet.
pub const MAX_FDS: usize = 64;

/// One end of a pair of sockets. A packet arrives whole or not at all.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Returns both ends.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (near, far) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(near), Self(far)))
    }

    /// Sends a packet, and waits while the socket is full.
    ///
    /// # Errors
    ///
    /// If the packet is too long, or the other end is closed.
    pub fn send(&self, value: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with_flags(value, fds, SendFlags::NOSIGNAL)
    }

    /// As [`PacketSocket::send`] without file descriptors, but never waits.
    ///
    /// # Errors
    ///
    /// As there, and if the socket is full.
    pub fn try_send(&self, value: &impl Serialize) -> io::Result<()> {
        self.send_with_flags(value, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with_flags(
        &self,
        value: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> io::Result<()> {
        let bytes = serde_json::to_vec(value)?;
        if bytes.len() > MAX_BYTES {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "packet is too long",
            ));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fits = fds.is_empty()
            || (fds.len() <= MAX_FDS && control.push(SendAncillaryMessage::ScmRights(fds)));
        if !fits {
            let text = "packet has too many descriptors";
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        }
        let begun = Instant::now();
        loop {
            match sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::TOOMANYREFS) if begun.elapsed() < IN_FLIGHT_TIMEOUT => {
                    thread::sleep(IN_FLIGHT_INTERVAL);
                }
                other => return Ok(other.map(drop)?),
            }
        }
    }

    /// Waits for the next packet. Returns `None` if the other end is closed.
    ///
    /// # Errors
    ///
    /// If the packet is too long or is not a value of this type, or if the host has no descriptors left.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                // The other end was closed with packets in it.
                Err(Errno::CONNRESET) => return Ok(None),
                other => break other?,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            let text = "packet does not fit, or the host has no descriptors left";
            return Err(io::Error::new(ErrorKind::InvalidData, text));
        }
        let bytes = bytes.get(..received.bytes).unwrap_or_default();
        Ok(Some((serde_json::from_slice(bytes)?, fds)))
    }
}

impl From<OwnedFd> for PacketSocket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<PacketSocket> for OwnedFd {
    fn from(socket: PacketSocket) -> Self {
        socket.0
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn values_and_descriptors_arrive_together_and_the_end_is_seen() {
        let (near, far) = PacketSocket::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        near.send(&"one", &[file.as_fd(), file.as_fd()]).unwrap();
        near.try_send(&2u8).unwrap();
        let (text, fds): (String, _) = far.receive().unwrap().unwrap();
        assert_eq!((text.as_str(), fds.len()), ("one", 2));
        assert!(File::from(fds.into_iter().next().unwrap())
            .metadata()
            .is_ok());
        assert_eq!(far.receive::<u8>().unwrap().unwrap().0, 2);
        near.send(&"no number", &[]).unwrap();
        assert!(far.receive::<u8>().is_err());
        drop(near);
        assert!(far.receive::<u8>().unwrap().is_none());
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let (near, far) = PacketSocket::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); MAX_FDS + 1];
        assert!(near.send(&1u8, &fds).is_err());
        assert!(near.send(&"x".repeat(MAX_BYTES), &[]).is_err());
        // A peer that is not this program.
        rustix::net::send(&near, &vec![b' '; MAX_BYTES + 1], SendFlags::empty()).unwrap();
        assert!(far.receive::<u8>().is_err());
    }
}
