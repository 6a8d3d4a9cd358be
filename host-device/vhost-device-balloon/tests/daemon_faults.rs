// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program on a hostile host: a log without a reader, no descriptors, signals, races at the start.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::program::Program;
use common::raw::{self, RawFrontEnd};
use common::{QmpClient, Vmm, HANG_TIMEOUT, LENGTH, START};
use rustix::event::{eventfd, EventfdFlags};
use rustix::pipe::{fcntl_setpipe_size, pipe_with, PipeFlags};
use rustix::process::Signal;
use serde_json::json;
use shared_abi::features::Features;
use shared_abi::queue::Queue;

const STATS: Features = Features::STATS_VQ;
const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-device-balloon");

fn is_empty(directory: &Path) -> bool {
    directory.read_dir().unwrap().next().is_none()
}

/// Attaches a guest, causes log lines, and checks that inflation is answered after each of them.
fn guest_is_served(program: &Program) {
    let mut qmp = QmpClient::connect(&program.qmp);
    let mut vmm = Vmm::connect(&program.socket);
    for _ in 0..3 {
        vmm.start_driver(STATS);
        qmp.until_running();
        vmm.send(Queue::Inflate, &[0; 4]);
        // A guest error, which the thread of the queues logs.
        vmm.send(Queue::Inflate, &[0; 3]);
        qmp.run("query-balloon");
        vmm.stop_driver();
    }
}

#[test]
fn a_log_without_a_reader_stops_nothing() {
    for log in ["closed", "full"] {
        let directory = tempfile::tempdir().unwrap();
        let command = Command::new(PROGRAM);
        let sink = match log {
            "closed" => Stdio::piped(),
            _ => File::options()
                .write(true)
                .open("/dev/full")
                .unwrap()
                .into(),
        };
        let mut program = Program::start_with(command, directory.path(), &["--persistent"], sink);
        if log == "closed" {
            drop(program.take_log());
        }
        let program = program.ready();
        guest_is_served(&program);
        program.signal(Signal::TERM);
        let (output, _) = program.finish();
        assert_eq!(output.status.code(), Some(0), "{log}: {}", output.status);
        assert!(is_empty(directory.path()), "{log}");
    }
}

#[test]
fn a_log_that_is_not_read_stops_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let size = fcntl_setpipe_size(&writer, 4096).unwrap();
    rustix::io::write(&writer, &vec![b'x'; size]).unwrap();
    let command = Command::new(PROGRAM);
    let program = Program::start_with(command, directory.path(), &["--persistent"], writer).ready();
    guest_is_served(&program);
    let log = thread::spawn(move || {
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        text
    });
    program.signal(Signal::TERM);
    let (output, _) = program.finish();
    assert!(output.status.success(), "{}", output.status);
    let log = log.join().unwrap();
    assert!(log.contains("shutdown requested"), "{log}");
}

#[test]
fn sessions_leave_no_descriptor_and_no_thread() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--persistent"]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    let mut sessions = |count: usize| {
        for _ in 0..count {
            let mut vmm = Vmm::connect(&program.socket);
            vmm.start_driver(STATS);
            qmp.until_running();
            drop(vmm);
            qmp.event("FRONTEND_DISCONNECTED", &json!({}));
        }
    };
    sessions(3);
    // A thread that has ended may still be counted for a moment.
    let lowest = || {
        let mut lowest = program.descriptors_and_threads();
        for _ in 0..50 {
            thread::sleep(Duration::from_millis(10));
            lowest = lowest.min(program.descriptors_and_threads());
        }
        lowest
    };
    let before = lowest();
    sessions(60);
    let limit = Instant::now() + HANG_TIMEOUT / 10;
    while program.descriptors_and_threads() > before {
        let now = program.descriptors_and_threads();
        assert!(
            Instant::now() < limit,
            "{before:?} before, {now:?} after 60 sessions"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_front_end_that_cannot_be_served_is_refused_and_the_daemon_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(PROGRAM);
    command.env("TMPDIR", "/nonexistent");
    let program =
        Program::start_with(command, directory.path(), &["--persistent"], Stdio::piped()).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    // The directory for temporary files does not matter.
    drop(Vmm::connect(&program.socket));
    qmp.event("FRONTEND_DISCONNECTED", &json!({}));
    let (used, _) = program.descriptors_and_threads();
    for spare in 1..12 {
        program.limit_descriptors((used + spare) as u64);
        let mut front_end = RawFrontEnd::connect(&program.socket);
        let _ = front_end.try_send(raw::SET_OWNER, &[], &[]);
        let _ = front_end.try_send(raw::GET_FEATURES, &[], &[]);
        let mut answer = [0; 20];
        // An answer, or the end of the connection.
        let _ = front_end.stream.read_exact(&mut answer);
        drop(front_end);
        qmp.run("query-version");
    }
    program.limit_descriptors(256);
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(STATS);
    qmp.until_running();
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    assert!(log.contains("front end refused"), "{log}");
}

/// The kernel counts the descriptors in flight of all processes of a user. Without privileges, a process with a lower limit
/// than their number can send none.
#[test]
fn descriptors_that_others_have_in_flight_delay_a_front_end() {
    const LIMIT: u64 = 256;
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &[]).ready();
    program.limit_descriptors(LIMIT);
    let (near, far) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let fds = vec![file.as_fd(); 64];
    for _ in 0..=LIMIT / 64 {
        raw::send_with_descriptors(&near, &[1], &fds).unwrap();
    }
    let released = thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        drop((near, far));
    });
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(STATS);
    QmpClient::connect(&program.qmp).until_running();
    released.join().unwrap();
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
}

/// Limits the descriptors of the program so that it can have `spare` more.
fn leave_descriptors(program: &Program, spare: u64) {
    let directory = fs::read_dir(format!("/proc/{}/fd", program.id())).unwrap();
    let names = directory.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let used: BTreeSet<u64> = names.map(|name| name.parse().unwrap()).collect();
    let free = (0..).filter(|number| !used.contains(number));
    // The limit is above the last free number that may be used.
    program.limit_descriptors(free.take(spare as usize).last().map_or(0, |last| last + 1));
}

#[test]
fn a_front_end_is_not_blamed_for_the_descriptors_that_the_daemon_lacks() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--persistent"]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.run("query-version");
    for spare in 1..3 {
        program.limit_descriptors(256);
        let mut front_end = RawFrontEnd::connect(&program.socket);
        front_end.ask(raw::GET_FEATURES);
        leave_descriptors(&program, spare);
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        front_end.send(raw::SET_VRING_KICK, &raw::words(&[0]), &[kick.as_fd()]);
        let ended = qmp.event("FRONTEND_DISCONNECTED", &json!({}));
        let why = ended["data"]["reason"].as_str().unwrap();
        assert!(why.contains("no descriptors left"), "{spare}: {why}");
    }
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
}

/// Returns the CPU time of all threads in clock ticks.
fn cpu_ticks(id: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap().split_whitespace();
    fields
        .skip(11)
        .take(2)
        .map(|it| it.parse::<u64>().unwrap())
        .sum()
}

#[test]
fn a_daemon_without_descriptors_sleeps_and_then_takes_the_connections() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--persistent"]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.run("query-version");
    // The lowest numbers are in use, so there is no descriptor for a new connection.
    program.limit_descriptors(3);
    let front_end = UnixStream::connect(&program.socket).unwrap();
    let client = UnixStream::connect(&program.qmp).unwrap();
    // Whatever the load of the host: a daemon that sleeps uses no time for a whole second, sooner or later.
    let limit = Instant::now() + HANG_TIMEOUT / 10;
    loop {
        let before = cpu_ticks(program.id());
        thread::sleep(Duration::from_secs(1));
        if cpu_ticks(program.id()) <= before + 1 {
            break;
        }
        assert!(Instant::now() < limit, "the daemon does not sleep");
    }
    program.limit_descriptors(256);
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(STATS);
    qmp.until_running();
    QmpClient::connect(&program.qmp).run("query-version");
    drop((front_end, client));
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    let lines = log.lines().filter(|line| line.contains("accept")).count();
    assert!((1..100).contains(&lines), "{lines} lines");
}

/// QEMU aborts if the connection ends while it starts a device.
#[test]
fn a_front_end_without_shared_memory_keeps_its_session() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &[]).ready();
    let mut front_end = RawFrontEnd::connect(&program.socket);
    front_end.send(raw::SET_OWNER, &[], &[]);
    front_end.ask(raw::GET_FEATURES);
    front_end.send(raw::SET_FEATURES, &raw::words(&[raw::FEATURES]), &[]);
    let [kick, call] = [(); 2].map(|()| eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    for ring in 0..2 {
        front_end.start_ring(ring, kick.as_fd(), call.as_fd());
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    }
    assert_ne!(front_end.ask(raw::GET_FEATURES), 0);
    let status = QmpClient::connect(&program.qmp).run("query-virtio-status");
    assert_eq!(status["status"], "no-driver", "{status}");
    assert_eq!(status["memory-shared"], false, "{status}");
    // With VHOST_USER_NEED_REPLY the front end learns that the ring was refused.
    let addresses = [raw::ring_state(0, 0), raw::words(&[0, 0x2000, 0x1000, 0])].concat();
    let header = [raw::SET_VRING_ADDR, 1 << 3 | 1, 40].map(u32::to_ne_bytes);
    front_end.send_bytes(&[header.concat(), addresses].concat());
    let mut answer = [0; 20];
    front_end.stream.read_exact(&mut answer).unwrap();
    let expected = [raw::SET_VRING_ADDR, 1 << 2 | 1, 8, 1, 0].map(u32::to_ne_bytes);
    assert_eq!(answer[..], expected.concat());
    assert_ne!(front_end.ask(raw::GET_FEATURES), 0);
    drop(front_end);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    let warnings = log.matches("shares no guest memory").count();
    assert_eq!(warnings, 1, "{log}");
    assert!(log.contains("share=on"), "{log}");
}

/// As in a VM with private memory into which shared memory is plugged.
#[test]
fn a_ring_without_addresses_is_not_started_by_memory_that_is_shared_later() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &[]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    let mut front_end = RawFrontEnd::connect(&program.socket);
    front_end.send(raw::SET_OWNER, &[], &[]);
    front_end.ask(raw::GET_FEATURES);
    front_end.send(raw::SET_FEATURES, &raw::words(&[raw::FEATURES]), &[]);
    let [kick, call] = [(); 2].map(|()| eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let start_rings = |front_end: &RawFrontEnd| {
        for ring in 0..2 {
            front_end.start_ring(ring, kick.as_fd(), call.as_fd());
        }
    };
    start_rings(&front_end);
    let memory = raw::memory();
    let table = raw::memory_table(&[raw::region(START, LENGTH, START, START)]);
    front_end.send(raw::SET_MEM_TABLE, &table, &[memory.as_fd()]);
    front_end.ask(raw::GET_FEATURES);
    let status = qmp.run("query-virtio-status");
    assert_eq!(status["memory-shared"], true, "{status}");
    assert_eq!(status["status"], "no-driver", "{status}");
    start_rings(&front_end);
    qmp.until_running();
    drop(front_end);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
}

#[test]
fn front_ends_cannot_flood_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--persistent"]).ready();
    let mut front_end = RawFrontEnd::connect(&program.socket);
    front_end.ask(raw::GET_FEATURES);
    for _ in 0..5000 {
        front_end.send(raw::SET_FEATURES, &raw::words(&[raw::FEATURES]), &[]);
        drop(UnixStream::connect(&program.socket));
    }
    front_end.ask(raw::GET_FEATURES);
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success());
    for text in ["driver accepted features", "second front end refused"] {
        let lines = log.lines().filter(|line| line.contains(text));
        let (count, bytes) = lines.fold((0, 0), |(count, bytes), line| {
            (count + 1, bytes + line.len())
        });
        assert!(count < 2500, "'{text}': {count} lines, {bytes} bytes");
        let summary = log
            .lines()
            .any(|it| it.contains("more lines like this") && it.contains(text));
        assert!(
            summary,
            "'{text}': {count} lines, and no count of those that were left out"
        );
    }
}

#[test]
fn signals_end_it_cleanly_unless_they_were_ignored_at_the_start() {
    let names = [
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
        (Signal::QUIT, "QUIT"),
        (Signal::TERM, "TERM"),
    ];
    for (signal, name) in names {
        let directory = tempfile::tempdir().unwrap();
        let program = Program::start(directory.path(), &["--persistent"]).ready();
        let mut vmm = Vmm::connect(&program.socket);
        vmm.start_driver(STATS);
        // These have no meaning, and end nothing.
        for ignored in [Signal::PIPE, Signal::USR1, Signal::USR2] {
            program.signal(ignored);
        }
        QmpClient::connect(&program.qmp).run("query-version");
        program.signal(signal);
        let (output, log) = program.finish();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{name}: {} {log}",
            output.status
        );
        assert!(is_empty(directory.path()), "{name}");
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("env");
    command.arg("--ignore-signal=HUP").arg(PROGRAM);
    let program =
        Program::start_with(command, directory.path(), &["--persistent"], Stdio::piped()).ready();
    program.signal(Signal::HUP);
    QmpClient::connect(&program.qmp).run("query-version");
    program.signal(Signal::TERM);
    assert!(program.finish().0.status.success());
}

#[test]
fn of_many_daemons_on_a_stale_socket_one_runs() {
    for round in 0..10 {
        let directory = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(directory.path().join("vhost")).unwrap());
        drop(UnixListener::bind(directory.path().join("qmp")).unwrap());
        let (outcomes, received) = mpsc::channel();
        let mut programs: Vec<_> = (0..6)
            .map(|_| Program::start(directory.path(), &["--persistent"]))
            .collect();
        for program in &mut programs {
            let (log, outcomes) = (BufReader::new(program.take_log()), outcomes.clone());
            thread::spawn(move || {
                let mut lines = log.lines().map_while(Result::ok);
                let _ = outcomes.send(lines.any(|line| line.contains("QMP: listening")));
                // The program must not find its log closed.
                lines.for_each(drop);
            });
        }
        let running: Vec<bool> = (0..6)
            .map(|_| received.recv_timeout(HANG_TIMEOUT).unwrap())
            .collect();
        let count = running.iter().filter(|runs| **runs).count();
        assert_eq!(count, 1, "round {round}: {count} daemons run");
        QmpClient::connect(&programs[0].qmp).run("quit");
        for program in programs {
            program.finish();
        }
        assert!(is_empty(directory.path()));
    }
}

#[test]
fn killed_daemons_leave_nothing_that_keeps_the_next_one_out() {
    let directory = tempfile::tempdir().unwrap();
    for _ in 0..100 {
        let program = Program::start(directory.path(), &["--persistent"]).ready();
        let mut vmm = Vmm::connect(&program.socket);
        vmm.start_driver(STATS);
        program.signal(Signal::KILL);
        program.finish();
    }
    let program = Program::start(directory.path(), &[]).ready();
    let (descriptors, threads) = program.descriptors_and_threads();
    assert!(descriptors < 30 && threads < 10, "{descriptors} {threads}");
    program.signal(Signal::TERM);
    assert!(program.finish().0.status.success());
    assert!(is_empty(directory.path()));
}
