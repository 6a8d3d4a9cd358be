// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front end and a QMP client for tests, both over real sockets.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod program;
pub mod raw;
pub mod vmm_qmp;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::net::SendFlags;
use serde_json::{json, Value};
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_device_balloon::server::{Exit, Server, ServerError, ServerOptions, ShutdownHandle};
use vhost_device_balloon::vring::NotificationSuppression;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

/// An operation that takes longer is regarded as hung. Tests judge nothing else by time.
pub const HANG_TIMEOUT: Duration = Duration::from_secs(600);

/// A server in a thread of this process.
pub struct TestServer {
    pub directory: tempfile::TempDir,
    shutdown_handle: ShutdownHandle,
    thread: JoinHandle<Result<Exit, ServerError>>,
}

impl TestServer {
    pub fn start(features: Features, persistent: bool) -> Self {
        Self::start_with(features, NotificationSuppression::default(), persistent)
    }

    pub fn start_with(
        features: Features,
        suppression: NotificationSuppression,
        persistent: bool,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(ServerOptions {
            socket_path: directory.path().join("vhost"),
            qmp_socket: Some(directory.path().join("qmp")),
            features,
            suppression,
            inhibit_discard: false,
            persistent,
            device_state: None,
        })
        .unwrap();
        Self {
            shutdown_handle: server.shutdown_handle().unwrap(),
            thread: thread::spawn(move || server.run()),
            directory,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("vhost")
    }

    pub fn qmp(&self) -> QmpClient {
        QmpClient::connect(&self.directory.path().join("qmp"))
    }

    /// Stops the server, and checks that it leaves no files.
    pub fn stop(self) {
        self.shutdown_handle.stop();
        assert_eq!(self.join().unwrap(), Exit::Stopped);
    }

    /// Waits until the server ends, and checks that it leaves no files.
    pub fn join(self) -> Result<Exit, ServerError> {
        let limit = Instant::now() + HANG_TIMEOUT;
        while !self.thread.is_finished() {
            assert!(Instant::now() < limit, "the server does not end");
            thread::sleep(Duration::from_millis(5));
        }
        let result = self.thread.join().unwrap();
        let left: Vec<_> = self.directory.path().read_dir().unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        result
    }
}

/// A QMP client.
pub struct QmpClient {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    pub events: Vec<Value>,
}

impl QmpClient {
    /// Connects, and sends `qmp_capabilities`.
    pub fn connect(path: &Path) -> Self {
        let mut qmp = Self::connect_without_negotiation(path);
        assert!(qmp.read().get("QMP").is_some());
        qmp.run("qmp_capabilities");
        qmp
    }

    /// Connects, and sends nothing.
    pub fn connect_without_negotiation(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        Self {
            stream,
            lines,
            events: Vec::new(),
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).unwrap();
    }

    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends as many of `bytes` as the server takes at once.
    pub fn send_some(&mut self, bytes: &[u8]) -> io::Result<()> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::send(&self.stream, bytes, flags)?;
        Ok(())
    }

    /// Returns another handle of the connection, to write to it.
    pub fn writer(&self) -> UnixStream {
        self.stream.try_clone().unwrap()
    }

    /// Returns the next line, or null at the end. A reset is an end as well: the kernel resets a connection on which
    /// the server has not read all bytes.
    pub fn read(&mut self) -> Value {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => Value::Null,
            Ok(_) => serde_json::from_str(&line).unwrap(),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Value::Null,
            Err(error) => panic!("nothing to read: {error}"),
        }
    }

    /// Returns the next answer, and keeps the events before it.
    pub fn answer(&mut self) -> Value {
        loop {
            let value = self.read();
            if value.get("event").is_none() {
                return value;
            }
            self.events.push(value);
        }
    }

    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.send(request.to_string().as_bytes());
        self.answer()
    }

    /// Runs a command that must succeed.
    pub fn run(&mut self, command: &str) -> Value {
        let answer = self.execute(command, &json!({}));
        answer
            .get("return")
            .unwrap_or_else(|| panic!("{command}: {answer}"))
            .clone()
    }

    /// Runs a command that must fail, and returns the class and description of the error.
    pub fn fail(&mut self, command: &str, arguments: &Value) -> (String, String) {
        let answer = self.execute(command, arguments);
        let text = |name: &str| {
            answer["error"][name]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        assert!(answer.get("error").is_some(), "{command}: {answer}");
        (text("class"), text("desc"))
    }

    /// Waits until the driver's queues are running.
    pub fn until_running(&mut self) {
        let limit = Instant::now() + HANG_TIMEOUT;
        while self.run("query-virtio-status")["status"] != "running" {
            assert!(Instant::now() < limit, "no driver");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for an event whose data has the members of `data`.
    pub fn event(&mut self, name: &str, data: &Value) -> Value {
        let fits = |event: &Value| {
            event["event"] == name
                && data
                    .as_object()
                    .unwrap()
                    .iter()
                    .all(|(key, value)| event["data"][key] == *value)
        };
        if let Some(at) = self.events.iter().position(fits) {
            return self.events.remove(at);
        }
        loop {
            let value = self.read();
            assert!(!value.is_null(), "no event {name} {data}");
            if fits(&value) {
                return value;
            }
            self.events.push(value);
        }
    }
}

/// Start of guest memory.
pub const START: u64 = 0x3e_f000;
pub const LENGTH: u64 = 0x80_0000;
const SIZE: u16 = 16;

struct DriverQueue {
    base: u64,
    added: u16,
    kick: EventFd,
    call: EventFd,
}

/// A VMM whose guest runs only a balloon driver.
pub struct Vmm {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    file: File,
    start: u64,
    length: u64,
    queues: Vec<DriverQueue>,
    features: Features,
    /// Whether event index was offered. The driver does not accept it.
    pub event_idx: bool,
    /// The channel for messages of the device.
    pub channel: Box<dyn Read + Send>,
}

/// The memory of a guest whose balloon was unplugged.
pub struct Unplugged {
    memory: GuestMemoryMmap,
    file: File,
}

impl Unplugged {
    /// Writes to guest memory, as the guest.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    /// Returns the whole memory file, including the part that the guest does not map.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; (START + LENGTH) as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Creates the memory file of a guest. The guest does not map its start.
fn memfd() -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, START + LENGTH).unwrap();
    file
}

/// The feature bit `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

impl Vmm {
    /// Connects, and does what a VMM does before a driver starts.
    pub fn connect(socket: &Path) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
        Self::connect_with(
            socket,
            Box::new(ours),
            &OwnedFd::from(theirs),
            memfd(),
            START,
        )
    }

    /// As [`Vmm::connect`], with guest memory in `file` from `start` on, which is at most [`START`] and the same offset in
    /// the file.
    pub fn connect_with_file(socket: &Path, file: File, start: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
        Self::connect_with(socket, Box::new(ours), &OwnedFd::from(theirs), file, start)
    }

    /// As [`Vmm::connect`], but messages of the device come through a pipe, as in user-mode Linux.
    pub fn connect_with_pipe(socket: &Path) -> Self {
        let (ours, theirs) = rustix::pipe::pipe().unwrap();
        Self::connect_with(socket, Box::new(File::from(ours)), &theirs, memfd(), START)
    }

    fn connect_with(
        socket: &Path,
        channel: Box<dyn Read + Send>,
        theirs: &OwnedFd,
        file: File,
        start: u64,
    ) -> Self {
        let mut frontend = Frontend::connect(socket, Queue::MAX_COUNT as u64).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(features & (protocol | VERSION_1), protocol | VERSION_1);
        let offered = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(offered.contains(wanted));
        let slots = offered & VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        frontend.set_protocol_features(wanted | slots).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), Queue::MAX_COUNT as u64);
        frontend.set_backend_request_fd(theirs).unwrap();

        let length = file.metadata().unwrap().len() - start;
        let range = (
            GuestAddress(start),
            length as usize,
            Some(FileOffset::new(file.try_clone().unwrap(), start)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        Self {
            frontend,
            memory,
            file,
            start,
            length,
            queues: Vec::new(),
            features: Features::from_bits(features),
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            channel,
        }
    }

    /// Returns the whole memory file, including the part that the guest does not map.
    pub fn bytes(&self) -> Vec<u8> {
        self.memory().bytes()
    }

    /// Writes to guest memory, as the guest.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory().write(address, bytes);
    }

    fn memory(&self) -> Unplugged {
        Unplugged {
            memory: self.memory.clone(),
            file: self.file.try_clone().unwrap(),
        }
    }

    /// Unplugs the balloon. The guest keeps running.
    pub fn unplug(self) -> Unplugged {
        self.memory()
    }

    pub fn offered(&self) -> Features {
        self.features
    }

    /// Shares guest memory with the device.
    pub fn share_memory(&mut self) {
        self.share(self.length);
    }

    /// Address of the memory of [`Vmm::share_sparse`].
    pub const SPARSE: u64 = 1 << 36;

    /// Shares guest memory with the device, and `length` bytes more that are not allocated.
    pub fn share_sparse(&mut self, length: u64) {
        let sparse = File::from(memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&sparse, length).unwrap();
        let region = |start, length, offset, file: &File| VhostUserMemoryRegionInfo {
            guest_phys_addr: start,
            memory_size: length,
            userspace_addr: start,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        };
        let regions = [
            region(START, LENGTH, START, &self.file),
            region(Self::SPARSE, length, 0, &sparse),
        ];
        self.frontend.set_mem_table(&regions).unwrap();
        // The answer comes after the device has handled the message before.
        self.frontend.get_queue_num().unwrap();
    }

    /// Shares only half of guest memory.
    pub fn share_half_the_memory(&mut self) {
        self.share(self.length / 2);
    }

    fn share(&mut self, length: u64) {
        let region = self.region(self.start, length, self.start);
        self.frontend.set_mem_table(&[region]).unwrap();
    }

    /// Returns the region at `start` whose memory is in the memory file at `offset`.
    pub fn region(&self, start: u64, length: u64, offset: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: start,
            memory_size: length,
            userspace_addr: start,
            mmap_offset: offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The connection, for messages that no other function sends.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The memory file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Notifies the device, without a new request.
    pub fn kick(&mut self, queue: Queue) {
        let index = queue.index(self.features).unwrap();
        self.queues[index].kick.write(1).unwrap();
    }

    /// Accepts `features`, as a driver does before it starts. Shares no memory.
    pub fn accept_features(&mut self, features: Features) {
        let ring = VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(features.bits() | ring).unwrap();
        // The device has seen the features once it answers.
        self.cmd_id();
    }

    /// Starts a driver that has accepted `features`.
    pub fn start_driver(&mut self, features: Features) {
        self.features = features;
        let ring = VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(features.bits() | ring).unwrap();
        self.share_memory();
        self.queues.clear();
        for index in 0..Queue::count(features) {
            let base = START + 0x3000 * index as u64;
            self.memory
                .write_slice(&[0; 0x3000], GuestAddress(base))
                .unwrap();
            let queue = DriverQueue {
                base,
                added: 0,
                kick: EventFd::new(0).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
            };
            self.frontend.set_vring_num(index, SIZE).unwrap();
            self.frontend.set_vring_base(index, 0).unwrap();
            let addresses = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: base,
                avail_ring_addr: base + 0x1000,
                used_ring_addr: base + 0x2000,
                log_addr: None,
            };
            self.frontend.set_vring_addr(index, &addresses).unwrap();
            self.frontend.set_vring_call(index, &queue.call).unwrap();
            self.frontend.set_vring_kick(index, &queue.kick).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
            self.queues.push(queue);
        }
    }

    /// Stops the queues, as when the driver unbinds or the guest is paused.
    pub fn stop_driver(&mut self) {
        for index in 0..self.queues.len() {
            self.frontend.set_vring_enable(index, false).unwrap();
            self.frontend.get_vring_base(index).unwrap();
        }
    }

    pub fn config(&mut self, size: u32) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let answer = self
            .frontend
            .get_config(0, size, flags, &vec![0; size as usize])
            .unwrap();
        answer.1
    }

    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) {
        self.frontend
            .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
            .unwrap();
    }

    pub fn cmd_id(&mut self) -> u32 {
        let config = self.config(16);
        u32::from_le_bytes(config[8..12].try_into().unwrap())
    }

    /// As [`Vmm::cmd_id`]. Returns `None` if the device has closed the connection.
    pub fn last_cmd_id(&mut self) -> Option<u32> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let answer = self.frontend.get_config(0, 16, flags, &[0; 16]);
        let (_, config) = answer.ok()?;
        Some(u32::from_le_bytes(config[8..12].try_into().unwrap()))
    }

    /// Waits for the configuration change message.
    pub fn config_change(&mut self) {
        let mut message = [0; 12];
        self.channel.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// Address of the data that the guest sends.
    const SCRATCH: u64 = START + 0x10_0000;
    /// The first address that the driver does not use.
    pub const FREE: u64 = START + 0x20_0000;

    pub fn send(&mut self, queue: Queue, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(Self::SCRATCH))
            .unwrap();
        self.offer(queue, Self::SCRATCH, bytes.len() as u32, false);
    }

    /// Makes one buffer available, kicks, and waits until the buffer is used. Checks that the driver was interrupted.
    pub fn offer(&mut self, queue: Queue, address: u64, length: u32, writable: bool) {
        self.post(queue, address, length, writable);
        self.wait_used(queue);
        let index = queue.index(self.features).unwrap();
        let queue = &mut self.queues[index];
        // The device makes the descriptor non-blocking.
        let limit = Instant::now() + HANG_TIMEOUT;
        while queue.call.read().is_err() {
            assert!(Instant::now() < limit, "the driver was not interrupted");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until all available buffers are used.
    pub fn wait_used(&mut self, queue: Queue) {
        let index = queue.index(self.features).unwrap();
        let queue = &mut self.queues[index];
        let limit = Instant::now() + HANG_TIMEOUT;
        loop {
            let used: u16 = self
                .memory
                .read_obj(GuestAddress(queue.base + 0x2002))
                .unwrap();
            if used == queue.added {
                break;
            }
            assert!(Instant::now() < limit, "the buffer was not returned");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes one buffer available and kicks, without waiting.
    pub fn post(&mut self, queue: Queue, address: u64, length: u32, writable: bool) {
        let index = queue.index(self.features).unwrap();
        let queue = &mut self.queues[index];
        let write =
            |at: u64, bytes: &[u8]| self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        write(queue.base, &address.to_le_bytes());
        write(queue.base + 8, &length.to_le_bytes());
        write(queue.base + 12, &[if writable { 2 } else { 0 }, 0, 0, 0]);
        write(
            queue.base + 0x1004 + 2 * u64::from(queue.added % SIZE),
            &[0, 0],
        );
        queue.added += 1;
        write(queue.base + 0x1002, &queue.added.to_le_bytes());
        queue.kick.write(1).unwrap();
    }
}
