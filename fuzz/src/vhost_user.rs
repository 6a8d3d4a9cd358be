// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Target `vhost_user`: a front end that sends any messages, with file descriptors of many kinds, to a real session.
//!
//! The front end keeps its ends of all descriptors until the session has ended. The target checks that the session ends
//! when the front end closes the connection, that the device answers QMP clients meanwhile, and that it afterwards serves
//! an honest front end.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags};
use rustix::fs::ftruncate;
use rustix::io::retry_on_intr;
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::pipe::{fcntl_setpipe_size, pipe_with, PipeFlags};
use shared_abi::features::Features;
use vhost_device_balloon::device_lock::DeviceLock;
use vhost_device_balloon::session::Session;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::guest::{
    device, ignore, memory_file, rest_of, write, DriverQueue, FeatureByte, ALL, LENGTH, PAGE,
    SCRATCH, START,
};

/// The most messages of one input.
const MESSAGES: usize = 40;
/// The most descriptors of one message. The protocol allows 8 for most messages, and the relay 32.
const DESCRIPTORS: usize = 34;
/// A wait that takes longer is regarded as hung.
const HANG_TIMEOUT: Duration = Duration::from_secs(600);
/// How often, and at which interval, the front end polls for a kick that is not read.
const KICK_POLLS: u32 = 20;
const KICK_POLL_INTERVAL: Duration = Duration::from_micros(200);

const HEADER: usize = 12;
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// The largest payload that the daemon reads.
const MAX_PAYLOAD: usize = 4096;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
/// The last request of the protocol that the crate knows, and some more.
const REQUESTS: u32 = 46;

/// `VIRTIO_F_VERSION_1` and `VHOST_USER_F_PROTOCOL_FEATURES`.
const TRANSPORT: u64 = 1 << 32 | 1 << 30;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE and CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15;

/// What a descriptor refers to.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    /// Guest memory.
    Memory,
    /// A memory file of one page.
    SmallMemory,
    Eventfd,
    /// An event descriptor whose counter is one below its limit: a blocking write to it blocks.
    FullEventfd,
    /// The read end of a pipe with some bytes.
    PipeReader(u8),
    /// The write end of an empty pipe.
    PipeWriter,
    /// The write end of a pipe that is full.
    FullPipe,
    /// A stream socket with some bytes.
    Socket(u8),
    /// A stream socket whose other end is closed.
    ClosedSocket,
    Null,
    Directory,
}

/// The descriptors that the front end keeps open.
#[derive(Default)]
struct Kept {
    fds: Vec<OwnedFd>,
    memory: Option<File>,
}

impl Kept {
    fn memory(&mut self) -> &File {
        self.memory.get_or_insert_with(|| memory_file(LENGTH))
    }

    fn keep(&mut self, fd: impl Into<OwnedFd>) {
        self.fds.push(fd.into());
    }

    /// Makes a descriptor to send.
    fn make(&mut self, kind: Kind) -> OwnedFd {
        let both = |kept: &mut Self, (ours, theirs): (OwnedFd, OwnedFd)| {
            kept.keep(ours);
            theirs
        };
        let pair = || UnixStream::pair().expect("a socket pair");
        let pipe = || pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let some = |count: u8| vec![0; usize::from(count)];
        match kind {
            Kind::Memory => self.memory().try_clone().expect("a descriptor").into(),
            Kind::SmallMemory => memory_file(PAGE).into(),
            Kind::Eventfd => event(0),
            Kind::FullEventfd => event(u64::MAX - 1),
            Kind::PipeReader(count) => {
                let (reader, writer) = pipe();
                File::from(writer.try_clone().expect("a descriptor"))
                    .write_all(&some(count))
                    .expect("an empty pipe has room");
                both(self, (writer, reader))
            }
            Kind::PipeWriter => both(self, pipe()),
            Kind::FullPipe => {
                let (reader, writer) = pipe();
                let size = fcntl_setpipe_size(&writer, PAGE as usize).expect("a small pipe");
                File::from(writer.try_clone().expect("a descriptor"))
                    .write_all(&vec![0; size])
                    .expect("an empty pipe has room");
                both(self, (reader, writer))
            }
            Kind::Socket(count) => {
                let (mut ours, theirs) = pair();
                ours.write_all(&some(count))
                    .expect("an empty socket has room");
                both(self, (ours.into(), theirs.into()))
            }
            Kind::ClosedSocket => pair().0.into(),
            Kind::Null => File::open("/dev/null").expect("/dev/null").into(),
            Kind::Directory => File::open("/").expect("/").into(),
        }
    }
}

fn event(count: u64) -> OwnedFd {
    let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("an event descriptor");
    if count > 0 {
        let mut file = File::from(fd.try_clone().expect("a descriptor"));
        file.write_all(&count.to_ne_bytes()).expect("a count");
    }
    fd
}

/// A number that is often a valid index, size or offset.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Number {
    Small(u8),
    Any(u64),
}

impl Number {
    fn resolve(self) -> u64 {
        match self {
            Self::Small(number) => u64::from(number % 8),
            Self::Any(number) => number,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Memory(u32),
    Any(u64),
}

impl Address {
    fn resolve(self) -> u64 {
        match self {
            Self::Memory(offset) => START + u64::from(offset) % (LENGTH + PAGE),
            Self::Any(address) => address,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Region {
    start: Address,
    length: Address,
    user: Address,
    offset: Number,
}

impl Region {
    /// All of guest memory.
    const WHOLE: [u64; 4] = [START, LENGTH, START, 0];

    fn words(self) -> [u64; 4] {
        let length = match self.length {
            Address::Memory(length) => u64::from(length) % (LENGTH + PAGE),
            Address::Any(length) => length,
        };
        let pages = PAGE * (self.offset.resolve() % 64);
        let offset = match self.offset {
            Number::Small(_) => pages,
            Number::Any(offset) => offset,
        };
        [self.start.resolve(), length, self.user.resolve(), offset]
    }
}

/// One step of the front end. Most of them send one message.
#[derive(Arbitrary, Debug)]
enum Step {
    /// The messages that each connection begins with.
    Handshake(FeatureByte, bool),
    ShareMemory,
    /// Sets a queue up with good values.
    StartQueue(u8),
    /// Makes chains available in guest memory, and kicks.
    Kick(u8, Vec<(u16, u16)>),
    Features(u64),
    ProtocolFeatures(u64),
    Table(Vec<Region>, Vec<Kind>),
    AddRegion(Region, Vec<Kind>),
    RemoveRegion(Region),
    Num(Number, Number),
    Base(Number, Number),
    Addresses(Number, [Address; 3]),
    GetBase(Number),
    /// A kick, call or error descriptor.
    Fd(u8, Number, Vec<Kind>),
    Enable(Number, Number),
    Channel(Vec<Kind>),
    ReadConfig(Number, Number, u8),
    WriteConfig(Number, Number, Vec<u8>),
    /// A message with the right payload size.
    Any(u8, Vec<u8>, Vec<Kind>),
    /// A message with any header.
    Raw(u32, u32, u32, Vec<u8>, Vec<Kind>),
    /// Bytes that are no message.
    Bytes(Vec<u8>),
    Qmp(u8),
    /// Sets the length of the memory file, in pages.
    Truncate(u8),
}

/// The front end's end of a connection.
struct FrontEnd {
    stream: UnixStream,
    /// What has been sent.
    sent: Vec<u8>,
    kept: Kept,
    /// The queues; those that were started with their kick and call descriptors.
    queues: Vec<(DriverQueue, Option<(File, File)>)>,
    closed: bool,
}

impl FrontEnd {
    fn new(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(HANG_TIMEOUT))
            .expect("a timeout");
        stream
            .set_write_timeout(Some(HANG_TIMEOUT))
            .expect("a timeout");
        let queues = (0..8).map(|index| (DriverQueue::new(index % 5, 16), None));
        Self {
            stream,
            sent: Vec::new(),
            kept: Kept::default(),
            queues: queues.collect(),
            closed: false,
        }
    }

    fn send_bytes(&mut self, bytes: &[u8], fds: &[OwnedFd]) {
        if self.closed || bytes.is_empty() {
            return;
        }
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space =
            [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&borrowed));
        }
        let slices = [IoSlice::new(bytes)];
        let result =
            retry_on_intr(|| sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL));
        match result {
            Ok(count) => {
                assert_eq!(count, bytes.len());
                self.sent.extend(bytes);
            }
            Err(_) => self.closed = true,
        }
    }

    fn raw(&mut self, [request, flags, size]: [u32; 3], payload: &[u8], kinds: &[Kind]) {
        let mut bytes = Vec::new();
        for word in [request, flags, size] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(payload);
        let kinds = kinds.iter().take(DESCRIPTORS);
        let fds: Vec<OwnedFd> = kinds.map(|kind| self.kept.make(*kind)).collect();
        self.send_bytes(&bytes, &fds);
    }

    fn send(&mut self, request: u32, payload: &[u8], kinds: &[Kind]) {
        let payload = payload.get(..MAX_PAYLOAD).unwrap_or(payload);
        self.raw([request, VERSION, payload.len() as u32], payload, kinds);
    }

    /// Sends a descriptor for the queue `index`.
    fn send_fd(&mut self, request: u32, index: u64, fd: OwnedFd) {
        let mut bytes = Vec::new();
        for word in [request, VERSION, 8] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(index.to_ne_bytes());
        self.send_bytes(&bytes, &[fd]);
    }

    fn words(&mut self, request: u32, words: &[u64], kinds: &[Kind]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.send(request, &bytes, kinds);
    }

    /// Sends a message about a queue: index and value, 32 bits each.
    fn vring(&mut self, request: u32, index: u64, value: u64) {
        self.words(request, &[index & 0xffff_ffff | value << 32], &[]);
    }

    fn table(&mut self, regions: &[[u64; 4]], kinds: &[Kind]) {
        let words: Vec<u64> = std::iter::once(regions.len() as u64)
            .chain(regions.iter().flatten().copied())
            .collect();
        self.words(SET_MEM_TABLE, &words, kinds);
    }

    fn addresses(&mut self, index: u64, [table, used, available]: [u64; 3]) {
        let words = [index & 0xffff_ffff, table, used, available, 0];
        self.words(SET_VRING_ADDR, &words, &[]);
    }

    fn start_queue(&mut self, index: usize) {
        let queue = self.queues[index].0;
        let number = index as u64;
        self.vring(SET_VRING_NUM, number, queue.size.into());
        self.vring(SET_VRING_BASE, number, 0);
        self.addresses(number, [queue.base, queue.used(), queue.available()]);
        let (kick, call) = (event(0), event(0));
        let copy = |fd: &OwnedFd| File::from(fd.try_clone().expect("a descriptor"));
        self.queues[index].1 = Some((copy(&kick), copy(&call)));
        self.send_fd(SET_VRING_CALL, number, call);
        self.send_fd(SET_VRING_KICK, number, kick);
        self.vring(SET_VRING_ENABLE, number, 1);
    }

    /// Maps guest memory, as far as its file has it.
    fn guest_memory(&mut self) -> GuestMemoryMmap {
        let file = self.kept.memory().try_clone().expect("a descriptor");
        let length = file.metadata().expect("a memory file").len().min(LENGTH);
        if length == 0 {
            return GuestMemoryMmap::new();
        }
        let range = (
            GuestAddress(START),
            length as usize,
            Some(FileOffset::new(file, 0)),
        );
        GuestMemoryMmap::from_ranges_with_files([range]).expect("guest memory")
    }

    fn kick(&mut self, index: usize, segments: &[(u16, u16)]) {
        let memory = self.guest_memory();
        let (queue, notifiers) = &mut self.queues[index];
        for (at, (offset, length)) in (0..queue.size).zip(segments) {
            let address = START + u64::from(*offset) * 16 % LENGTH;
            let more = usize::from(at) + 1 < segments.len();
            let flags = u16::from(more) | ((length % 2) << 1);
            queue.describe(&memory, at, (address, u32::from(*length), flags, at + 1));
        }
        queue.offer(&memory, 0);
        if let Some((kick, _)) = notifiers {
            // A connection that has ended reads no kicks, but few fit into one input.
            kick.write_all(&1u64.to_ne_bytes()).expect("a kick");
        }
    }

    /// Returns how many requests for features have been sent, and how many bytes the last message lacks.
    fn requests(&self) -> (usize, usize) {
        let mut requests = 0;
        let mut rest = self.sent.as_slice();
        while let Some((header, after)) = rest.split_at_checked(HEADER) {
            let size = word(header, 8) as usize;
            requests += usize::from(word(header, 0) == GET_FEATURES);
            match after.split_at_checked(size) {
                // The daemon closes the connection.
                _ if size > MAX_PAYLOAD => return (requests, 0),
                Some((_, after)) => rest = after,
                None => return (requests, size - after.len()),
            }
        }
        (requests, (HEADER - rest.len()) % HEADER)
    }

    /// Completes the last message, and waits until the daemon has handled all of them. Returns false if it has closed the
    /// connection.
    fn synchronise(&mut self) -> bool {
        loop {
            let (_, missing) = self.requests();
            if missing == 0 || self.closed {
                break;
            }
            self.send_bytes(&vec![0; missing], &[]);
        }
        self.send(GET_FEATURES, &[], &[]);
        let (requests, _) = self.requests();
        let mut replies = 0;
        while replies < requests {
            let mut header = [0; HEADER];
            if !self.receive(&mut header) {
                return false;
            }
            let size = word(&header, 8) as usize;
            assert!(size <= MAX_PAYLOAD, "a reply of {size} bytes");
            assert_ne!(word(&header, 4) & REPLY, 0, "a reply without its flag");
            if !self.receive(&mut vec![0; size]) {
                return false;
            }
            replies += usize::from(word(&header, 0) == GET_FEATURES);
        }
        true
    }

    /// Waits for a moment until the daemon has read all kicks. It never reads those of a queue that is not enabled. What
    /// the target checks does not depend on this, but an input reaches more.
    fn wait_for_kicks(&self) {
        let kicks = self.queues.iter().filter_map(|(_, files)| files.as_ref());
        for (kick, _) in kicks {
            for _ in 0..KICK_POLLS {
                let mut fds = [PollFd::new(kick, PollFlags::IN)];
                let now = Default::default();
                if !matches!(poll(&mut fds, Some(&now)), Ok(1)) {
                    break;
                }
                std::thread::sleep(KICK_POLL_INTERVAL);
            }
        }
    }

    /// Fills `bytes`. Returns false if the daemon has closed the connection.
    fn receive(&mut self, bytes: &mut [u8]) -> bool {
        let result = self.stream.read_exact(bytes);
        if let Err(error) = &result {
            let hung = error.kind() == ErrorKind::WouldBlock;
            assert!(
                !hung,
                "the daemon neither replies nor closes the connection"
            );
        }
        result.is_ok()
    }
}

/// Returns the 32 bits at `offset`.
fn word(bytes: &[u8], offset: usize) -> u32 {
    let bytes = bytes[offset..offset + 4].try_into();
    u32::from_ne_bytes(bytes.expect("4 bytes"))
}

impl Step {
    fn play(self, to: &mut FrontEnd, device: &DeviceLock) {
        match self {
            Self::Handshake(features, event_idx) => {
                to.send(SET_OWNER, &[], &[]);
                to.send(GET_FEATURES, &[], &[]);
                to.words(SET_PROTOCOL_FEATURES, &[PROTOCOL], &[]);
                let ring = TRANSPORT | u64::from(event_idx) << 29;
                to.words(SET_FEATURES, &[features.features().bits() | ring], &[]);
            }
            Self::ShareMemory => to.table(&[Region::WHOLE], &[Kind::Memory]),
            Self::StartQueue(index) => to.start_queue(usize::from(index % 6)),
            Self::Kick(index, segments) => to.kick(usize::from(index % 6), &segments),
            Self::Features(bits) => to.words(SET_FEATURES, &[bits], &[]),
            Self::ProtocolFeatures(bits) => to.words(SET_PROTOCOL_FEATURES, &[bits], &[]),
            Self::Table(regions, kinds) => {
                let regions: Vec<_> = regions.iter().take(9).map(|it| it.words()).collect();
                to.table(&regions, &kinds);
            }
            Self::AddRegion(region, kinds) => {
                let words = region.words();
                to.words(ADD_MEM_REG, &[&[0], &words[..]].concat(), &kinds);
            }
            Self::RemoveRegion(region) => {
                let words = region.words();
                to.words(REM_MEM_REG, &[&[0], &words[..]].concat(), &[]);
            }
            Self::Num(index, size) => {
                let size = match size {
                    Number::Small(shift) => 1 << (shift % 12),
                    Number::Any(size) => size,
                };
                to.vring(SET_VRING_NUM, index.resolve(), size);
            }
            Self::Base(index, base) => to.vring(SET_VRING_BASE, index.resolve(), base.resolve()),
            Self::Addresses(index, addresses) => {
                to.addresses(index.resolve(), addresses.map(Address::resolve));
            }
            Self::GetBase(index) => to.vring(GET_VRING_BASE, index.resolve(), 0),
            Self::Fd(request, index, kinds) => {
                let requests = [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR];
                to.words(
                    requests[usize::from(request % 3)],
                    &[index.resolve()],
                    &kinds,
                );
            }
            Self::Enable(index, enabled) => {
                to.vring(SET_VRING_ENABLE, index.resolve(), enabled.resolve());
            }
            Self::Channel(kinds) => to.send(SET_BACKEND_REQ_FD, &[], &kinds),
            Self::ReadConfig(offset, size, bytes) => {
                to.config(GET_CONFIG, offset, size, &vec![0; bytes.into()]);
            }
            Self::WriteConfig(offset, size, bytes) => {
                to.config(SET_CONFIG, offset, size, &bytes);
            }
            Self::Any(request, payload, kinds) => {
                to.send(u32::from(request) % REQUESTS, &payload, &kinds);
            }
            Self::Raw(request, flags, size, payload, kinds) => {
                let flags = VERSION | flags & NEED_REPLY | if flags % 8 == 7 { flags } else { 0 };
                to.raw([request % REQUESTS, flags, size % 5000], &payload, &kinds);
            }
            Self::Bytes(bytes) => to.send_bytes(&bytes, &[]),
            Self::Qmp(command) => {
                let mut device = device.lock();
                match command % 6 {
                    0 => ignore(device.start_hinting()),
                    1 => device.finish_hinting(),
                    2 => ignore(device.request_stats()),
                    3 => ignore(device.set_target(PAGE)),
                    4 => ignore(device.ram().allocated()),
                    _ => ignore(device.virtio_status()),
                }
            }
            Self::Truncate(pages) => {
                let length = PAGE * (u64::from(pages) % (LENGTH / PAGE + 1));
                ftruncate(to.kept.memory(), length).expect("a memory file of this length");
            }
        }
    }
}

impl FrontEnd {
    /// Sends an access to config space: offset, size and flags, 32 bits each, and the bytes.
    fn config(&mut self, request: u32, offset: Number, size: Number, bytes: &[u8]) {
        let size = match size {
            Number::Small(_) => bytes.len() as u64,
            Number::Any(size) => size,
        };
        let mut payload = (offset.resolve() as u32).to_ne_bytes().to_vec();
        payload.extend((size as u32).to_ne_bytes());
        payload.extend(1u32.to_ne_bytes());
        payload.extend(bytes);
        self.send(request, &payload, &[]);
    }
}

pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let offered = FeatureByte::arbitrary(&mut input).map_or(ALL, FeatureByte::features);
    let device = Arc::new(DeviceLock::new(device(offered, Arc::default())));
    let (session, mut front_end) = connect(&device);
    for step in rest_of::<Step>(&mut input, MESSAGES) {
        step.play(&mut front_end, &device);
    }
    if front_end.synchronise() {
        front_end.wait_for_kicks();
    }
    // The device has a lock, which no front end can hold.
    let _ = device.lock().virtio_status();
    let _ = front_end.stream.shutdown(Shutdown::Both);
    let end = session.join();
    assert!(end.reason.len() < 1 << 10, "{end:?}");
    drop(front_end);
    check_honest_front_end(&device);
}

fn connect(device: &Arc<DeviceLock>) -> (Session, FrontEnd) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let session = Session::start(theirs, device.clone(), || {}).expect("a session");
    (session, FrontEnd::new(ours))
}

/// Connects as an honest front end with an honest driver, which inflates the balloon by one page.
fn check_honest_front_end(device: &Arc<DeviceLock>) {
    let before = device.lock().virtio_status().pages_inflated;
    let (session, mut front_end) = connect(device);
    front_end.send(SET_OWNER, &[], &[]);
    front_end.words(SET_PROTOCOL_FEATURES, &[PROTOCOL], &[]);
    front_end.words(SET_FEATURES, &[Features::NONE.bits() | TRANSPORT], &[]);
    front_end.table(&[Region::WHOLE], &[Kind::Memory]);
    let memory = front_end.guest_memory();
    front_end.start_queue(0);
    assert!(front_end.synchronise(), "the connection is closed");
    write(
        &memory,
        SCRATCH,
        &((START / PAGE) as u32 + 20).to_le_bytes(),
    );
    let (queue, notifiers) = &mut front_end.queues[0];
    queue.describe(&memory, 0, (SCRATCH, 4, 0, 0));
    queue.offer(&memory, 0);
    let (kick, call) = notifiers.as_mut().expect("the queue is started");
    kick.write_all(&1u64.to_ne_bytes()).expect("a kick");
    wait_readable(call);
    assert!(call.read_exact(&mut [0; 8]).is_ok());
    assert_eq!(queue.used_index(&memory), 1);
    assert_eq!(device.lock().virtio_status().pages_inflated - before, 1);
    let _ = front_end.stream.shutdown(Shutdown::Both);
    let end = session.join();
    assert!(!end.is_error, "{end:?}");
}

/// Waits until `file` can be read.
fn wait_readable(file: &File) {
    let limit = HANG_TIMEOUT.try_into().ok();
    let mut fds = [PollFd::new(file, PollFlags::IN)];
    let ready = retry_on_intr(|| poll(&mut fds, limit.as_ref()));
    let ready = ready.expect("the interrupt can be waited for");
    assert_eq!(ready, 1, "the driver is not interrupted");
}
