// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Front ends that break the protocol. Each harms its own session only, and the daemon says what happened.

mod common;

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::raw::{self, RawFrontEnd};
use common::{QmpClient, TestServer, Vmm, HANG_TIMEOUT, LENGTH, START};
use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::pipe::{pipe, pipe_with, PipeFlags};
use serde_json::json;
use shared_abi::features::Features;
use vhost_device_balloon::server::ServerError;

/// What a front end does, and a part of the reason that the daemon gives for the end of the session.
type Fault = (&'static str, fn(&mut RawFrontEnd));

/// Sends a memory table with `count` regions, each with a file.
fn send_regions(front_end: &RawFrontEnd, count: u64) {
    let memory = raw::memory();
    let regions: Vec<_> = (0..count)
        .map(|at| raw::region(at << 12, 0x1000, at << 12, 0))
        .collect();
    let files: Vec<_> = (0..count).map(|_| memory.as_fd()).collect();
    front_end.send(raw::SET_MEM_TABLE, &raw::memory_table(&regions), &files);
}

/// Returns a TCP socket whose last `close` waits for an hour.
fn lingering_socket() -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 4096]).is_ok() {}
    let hour = Duration::from_secs(3600);
    rustix::net::sockopt::set_socket_linger(&socket, Some(hour)).unwrap();
    // The peer exists as long as the test program, and reads nothing.
    std::mem::forget(listener.accept().unwrap());
    socket
}

const FAULTS: &[Fault] = &[
    ("payload of 4294967295 bytes", |it| {
        it.send_bytes(&[0xff; 64]);
    }),
    ("payload of 825184340 bytes", |it| {
        it.send_bytes(b"GET / HTTP/1.1\r\n\r\n");
    }),
    ("middle of a message", |it| {
        it.send_bytes(&[1, 0, 0, 0, 1]);
        it.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }),
    ("middle of a message", |it| {
        let header = [2u32, 1, 8].map(u32::to_ne_bytes).concat();
        it.send_bytes(&header);
        it.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }),
    (
        "protocol: invalid message; its last request was 9999",
        |it| {
            it.send(9999, &[], &[]);
        },
    ),
    ("its last request was SET_OWNER", |it| {
        it.send(raw::SET_OWNER, &[], &[]);
        it.send(raw::SET_OWNER, &[], &[]);
    }),
    ("its last request was SET_VRING_NUM", |it| {
        it.send(raw::SET_VRING_NUM, &raw::ring_state(0, 0), &[]);
    }),
    ("its last request was SET_VRING_NUM", |it| {
        it.send(raw::SET_VRING_NUM, &raw::ring_state(0, u32::MAX), &[]);
    }),
    ("its last request was SET_VRING_NUM", |it| {
        it.send(raw::SET_VRING_NUM, &raw::ring_state(200, 16), &[]);
    }),
    ("its last request was SET_VRING_BASE", |it| {
        it.send(raw::SET_VRING_BASE, &raw::ring_state(u32::MAX, 0), &[]);
    }),
    ("its last request was SET_VRING_ADDR", |it| {
        it.share_memory(0);
        let addresses = raw::words(&[200, 0, 0x1000, 0x2000, 0]);
        it.send(raw::SET_VRING_ADDR, &addresses, &[]);
    }),
    ("its last request was SET_VRING_ADDR", |it| {
        it.share_memory(0);
        let addresses = raw::words(&[0, !15, !15, !15, 0]);
        it.send(raw::SET_VRING_ADDR, &addresses, &[]);
    }),
    ("its last request was SET_VRING_ENABLE", |it| {
        it.send(raw::SET_VRING_ENABLE, &raw::ring_state(0, 1), &[]);
    }),
    ("its last request was SET_VRING_KICK", |it| {
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        it.send(raw::SET_VRING_KICK, &raw::words(&[200]), &[kick.as_fd()]);
    }),
    ("its last request was SET_VRING_KICK", |it| {
        it.send(raw::SET_VRING_KICK, &raw::words(&[0]), &[]);
    }),
    ("character device", |it| {
        let null = File::open("/dev/null").unwrap();
        it.send(raw::SET_VRING_KICK, &raw::words(&[0]), &[null.as_fd()]);
    }),
    ("regular file", |it| {
        let file = raw::memory();
        it.send(raw::SET_VRING_CALL, &raw::words(&[1]), &[file.as_fd()]);
    }),
    ("socket of another kind than a Unix socket", |it| {
        let socket = lingering_socket();
        it.send(raw::SET_VRING_CALL, &raw::words(&[0]), &[socket.as_fd()]);
    }),
    ("socket of another kind than a Unix socket", |it| {
        // A message without a descriptor.
        it.send(raw::SET_OWNER, &[], &[lingering_socket().as_fd()]);
    }),
    ("end of a connection to this daemon", |it| {
        let own = it.stream.try_clone().unwrap();
        it.send(raw::SET_BACKEND_REQ_FD, &[], &[own.as_fd()]);
    }),
    ("its last request was SET_FEATURES", |it| {
        it.send(raw::SET_FEATURES, &raw::words(&[u64::MAX]), &[]);
    }),
    ("its last request was GET_CONFIG", |it| {
        let payload = [0, u32::MAX, 0].map(u32::to_ne_bytes).concat();
        it.send(raw::GET_CONFIG, &payload, &[]);
    }),
    ("its last request was SET_MEM_TABLE", |it| {
        let nothing = raw::memory_table(&[]);
        it.send(raw::SET_MEM_TABLE, &nothing, &[]);
    }),
    ("more than 32 descriptors", |it| send_regions(it, 33)),
    ("its last request was SET_MEM_TABLE", |it| {
        let memory = raw::memory();
        let twice = [
            raw::region(START, LENGTH, START, START),
            raw::region(START + 0x1000, LENGTH, START + 0x1000, START),
        ];
        let files = [memory.as_fd(), memory.as_fd()];
        it.send(raw::SET_MEM_TABLE, &raw::memory_table(&twice), &files);
    }),
    ("its last request was SET_MEM_TABLE", |it| {
        let memory = raw::memory();
        let wild = [raw::region(u64::MAX - 0xfff, 0x2000, 0, 0)];
        it.send(
            raw::SET_MEM_TABLE,
            &raw::memory_table(&wild),
            &[memory.as_fd()],
        );
    }),
    ("kick descriptor of queue 0", |it| {
        it.share_memory(0);
        let call = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (kick, _) = pipe().unwrap();
        it.start_ring(0, kick.as_fd(), call.as_fd());
    }),
];

#[test]
fn the_end_of_a_session_names_the_fault_of_the_front_end() {
    let mut wrong = Vec::new();
    for (index, (expected, fault)) in FAULTS.iter().enumerate() {
        let server = TestServer::start(Features::STATS_VQ, false);
        let mut front_end = RawFrontEnd::connect(&server.socket());
        fault(&mut front_end);
        match server.join() {
            Err(ServerError::FrontEnd(why)) if why.contains(expected) => {}
            other => wrong.push(format!("{index}: '{expected}': {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_persistent_server_survives_every_fault_of_a_front_end() {
    let server = TestServer::start(Features::STATS_VQ, true);
    let mut qmp = server.qmp();
    for (expected, fault) in FAULTS {
        let mut front_end = RawFrontEnd::connect(&server.socket());
        fault(&mut front_end);
        let ended = qmp.event("FRONTEND_DISCONNECTED", &json!({}));
        let why = ended["data"]["reason"].as_str().unwrap();
        assert!(why.contains(expected), "'{expected}': {why}");
        drop(front_end);
        let mut vmm = Vmm::connect(&server.socket());
        vmm.start_driver(Features::STATS_VQ);
        qmp.until_running();
        drop(vmm);
        qmp.event("FRONTEND_DISCONNECTED", &json!({}));
    }
    server.stop();
}

/// Makes an empty request available in ring 0, and kicks.
fn post(memory: &File, kick: &OwnedFd) {
    use std::os::unix::fs::FileExt;
    memory.write_all_at(&[0, 0, 1, 0], START + 0x1000).unwrap();
    rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
}

/// Waits until the device has used the buffer of ring 0, and checks that QMP still answers.
fn is_served(qmp: &mut QmpClient, memory: &File) {
    use std::os::unix::fs::FileExt;
    let limit = std::time::Instant::now() + HANG_TIMEOUT;
    let mut used = [0; 2];
    while used != [1, 0] {
        assert!(
            std::time::Instant::now() < limit,
            "the buffer was not returned"
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
        memory.read_exact_at(&mut used, START + 0x2002).unwrap();
    }
    assert_eq!(qmp.run("query-virtio-status")["connected"], true);
}

#[test]
fn interrupts_that_nobody_takes_do_not_stop_the_device() {
    // The counter of this event descriptor has no room for another interrupt.
    let full = eventfd(0, EventfdFlags::empty()).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    // User-mode Linux takes interrupts from a pipe, or from a socket.
    let (_reader, pipe) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    while rustix::io::write(&pipe, &[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&pipe, false).unwrap();
    let (_other, mut socket) = UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 4096]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    for call in [full, pipe, socket.into()] {
        let server = TestServer::start(Features::STATS_VQ, false);
        let mut qmp = server.qmp();
        let mut front_end = RawFrontEnd::connect(&server.socket());
        let memory = front_end.share_memory(0);
        let kick = eventfd(0, EventfdFlags::empty()).unwrap();
        front_end.start_ring(0, kick.as_fd(), call.as_fd());
        post(&memory, &kick);
        is_served(&mut qmp, &memory);
        server.stop();
    }
}

/// A front end shares the flags of its descriptors with the daemon, and can change them after the daemon has.
#[test]
fn descriptors_that_become_blocking_again_stop_nobody() {
    let server = TestServer::start(Features::STATS_VQ, false);
    let mut qmp = server.qmp();
    let mut front_end = RawFrontEnd::connect(&server.socket());
    let memory = front_end.share_memory(0);
    let event = || eventfd(0, EventfdFlags::empty()).unwrap();
    let (kick, call) = (event(), event());
    let (_other, mut channel) = UnixStream::pair().unwrap();
    let protocol = raw::words(&[raw::BACKEND_REQ]);
    front_end.send(raw::SET_PROTOCOL_FEATURES, &protocol, &[]);
    front_end.send(raw::SET_BACKEND_REQ_FD, &[], &[channel.as_fd()]);
    front_end.start_ring(0, kick.as_fd(), call.as_fd());
    // Answered after the requests before it.
    front_end.ask(raw::GET_FEATURES);
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    while channel.write(&[0; 4096]).is_ok() {}
    while channel.write(&[0]).is_ok() {}
    for fd in [kick.as_fd(), call.as_fd(), channel.as_fd()] {
        rustix::io::ioctl_fionbio(fd, false).unwrap();
    }
    post(&memory, &kick);
    is_served(&mut qmp, &memory);
    // Sends a message to the front end.
    qmp.execute("balloon", &json!({ "value": LENGTH / 2 }));
    assert_eq!(qmp.run("query-balloon")["actual"], LENGTH);
    server.stop();
}

/// QEMU sends event descriptors. User-mode Linux sends the write end of a pipe, and reads the other end when it is ready.
#[test]
fn interrupts_arrive_through_event_descriptors_pipes_and_sockets() {
    let event = eventfd(0, EventfdFlags::empty()).unwrap();
    let copy = event.try_clone().unwrap();
    let (reader, pipe) = pipe().unwrap();
    let (other, socket) = UnixStream::pair().unwrap();
    for (call, ours) in [(event, copy), (pipe, reader), (socket.into(), other.into())] {
        let server = TestServer::start(Features::STATS_VQ, false);
        let mut qmp = server.qmp();
        let mut front_end = RawFrontEnd::connect(&server.socket());
        let memory = front_end.share_memory(0);
        let kick = eventfd(0, EventfdFlags::empty()).unwrap();
        front_end.start_ring(0, kick.as_fd(), call.as_fd());
        post(&memory, &kick);
        is_served(&mut qmp, &memory);
        let mut fds = [PollFd::new(&ours, PollFlags::IN)];
        let limit = Timespec::try_from(HANG_TIMEOUT).unwrap();
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1);
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&ours, &mut count).unwrap(), 8);
        assert_eq!(u64::from_ne_bytes(count), 1);
        server.stop();
    }
}

#[test]
fn a_kick_that_is_no_whole_number_does_not_stop_the_device() {
    let server = TestServer::start(Features::STATS_VQ, false);
    let mut qmp = server.qmp();
    let mut front_end = RawFrontEnd::connect(&server.socket());
    let memory = front_end.share_memory(0);
    let (kick, kicker) = pipe().unwrap();
    let call = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    front_end.start_ring(0, kick.as_fd(), call.as_fd());
    rustix::io::write(&kicker, &[1, 0, 0]).unwrap();
    post(&memory, &kicker);
    is_served(&mut qmp, &memory);
    server.stop();
}

#[test]
fn a_running_kick_that_is_replaced_does_not_keep_the_device_busy() {
    let server = TestServer::start(Features::STATS_VQ, false);
    let mut front_end = RawFrontEnd::connect(&server.socket());
    front_end.share_memory(0);
    let event = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let (first, second, call) = (event(), event(), event());
    front_end.start_ring(0, first.as_fd(), call.as_fd());
    front_end.send(raw::SET_VRING_KICK, &raw::words(&[0]), &[second.as_fd()]);
    // Answered after the requests before it.
    front_end.ask(raw::GET_FEATURES);
    // The device still watches the first descriptor, but reads the second one.
    rustix::io::write(&first, &1u64.to_ne_bytes()).unwrap();
    match server.join() {
        Err(ServerError::FrontEnd(why)) => assert!(why.contains("kick descriptor"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn r13_silent_connections_do_not_keep_a_vmm_out() {
    let server = TestServer::start(Features::STATS_VQ, false);
    let mut qmp = server.qmp();
    let silent: Vec<_> = (0..40)
        .map(|_| UnixStream::connect(server.socket()).unwrap())
        .collect();
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(Features::STATS_VQ);
    qmp.event("DRIVER_STARTED", &json!({}));
    drop(silent);
    server.stop();
}

#[test]
fn the_next_front_end_waits_for_the_end_of_the_last_session() {
    let server = TestServer::start(Features::STATS_VQ, true);
    for _ in 0..200 {
        let vmm = Vmm::connect(&server.socket());
        drop(vmm);
    }
    server.stop();
}
