// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front end that sends whatever a test wants: the messages of vhost-user, byte by byte.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{HANG_TIMEOUT, LENGTH, START};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;

/// `VIRTIO_F_VERSION_1` and `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const FEATURES: u64 = 1 << 32 | 1 << 30;

/// `VHOST_USER_PROTOCOL_F_BACKEND_REQ`.
pub const BACKEND_REQ: u64 = 1 << 5;

/// A connected front end without any state of its own.
pub struct RawFrontEnd {
    pub stream: UnixStream,
}

/// Returns the words as bytes.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Returns the payload of a message about the ring `index`.
pub fn ring_state(index: u32, number: u32) -> Vec<u8> {
    [index.to_ne_bytes(), number.to_ne_bytes()].concat()
}

/// Returns a region of the memory table.
pub fn region(guest_address: u64, length: u64, user_address: u64, offset: u64) -> Vec<u8> {
    words(&[guest_address, length, user_address, offset])
}

/// Returns the payload of a memory table.
pub fn memory_table(regions: &[Vec<u8>]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap();
    [ring_state(count, 0), regions.concat()].concat()
}

impl RawFrontEnd {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
        Self { stream }
    }

    /// Sends one message.
    pub fn try_send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let size = u32::try_from(payload.len()).unwrap();
        let header = [request, 1, size].map(u32::to_ne_bytes).concat();
        let message = [&header[..], payload].concat();
        send_with_descriptors(&self.stream, &message, fds)
    }

    pub fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.try_send(request, payload, fds).unwrap();
    }

    /// Sends a message that is answered with a number, and returns the number.
    pub fn ask(&mut self, request: u32) -> u64 {
        self.send(request, &[], &[]);
        let mut answer = [0; 20];
        self.stream.read_exact(&mut answer).unwrap();
        u64::from_ne_bytes(answer[12..].try_into().unwrap())
    }

    /// Waits until the daemon closes the connection.
    pub fn wait_closed(&mut self) {
        let mut bytes = [0; 64];
        while matches!(self.stream.read(&mut bytes), Ok(1..)) {}
    }

    /// Sends bytes that need not be a message.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Negotiates `features`, and shares guest memory. Returns its file.
    pub fn share_memory(&mut self, features: u64) -> File {
        self.send(SET_OWNER, &[], &[]);
        self.ask(GET_FEATURES);
        self.send(SET_FEATURES, &words(&[FEATURES | features]), &[]);
        let memory = memory();
        let table = memory_table(&[region(START, LENGTH, START, START)]);
        self.send(SET_MEM_TABLE, &table, &[memory.as_fd()]);
        memory
    }

    /// Starts the ring `index`, at `START + 0x3000 * index`.
    pub fn start_ring(&self, index: u32, kick: BorrowedFd<'_>, call: BorrowedFd<'_>) {
        let base = START + 0x3000 * u64::from(index);
        self.send(SET_VRING_NUM, &ring_state(index, 16), &[]);
        self.send(SET_VRING_BASE, &ring_state(index, 0), &[]);
        let addresses = [base, base + 0x2000, base + 0x1000, 0];
        let payload = [ring_state(index, 0), words(&addresses)].concat();
        self.send(SET_VRING_ADDR, &payload, &[]);
        self.send(SET_VRING_CALL, &words(&[u64::from(index)]), &[call]);
        self.send(SET_VRING_KICK, &words(&[u64::from(index)]), &[kick]);
        self.send(SET_VRING_ENABLE, &ring_state(index, 1), &[]);
    }
}

/// Returns a file for guest memory.
pub fn memory() -> File {
    let file: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, START + LENGTH).unwrap();
    file.into()
}

/// Sends bytes and up to 64 descriptors with one system call.
pub fn send_with_descriptors(
    stream: &UnixStream,
    message: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(message)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    assert_eq!(sent, message.len());
    Ok(())
}
