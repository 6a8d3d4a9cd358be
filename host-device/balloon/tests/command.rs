// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program as a process: signals, sockets, sleep.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Operator, Vmm};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::json;
use shared_abi::features::Features;
use shared_abi::queue::Queue;

const HINT: Features = Features::STATS_VQ.union(Features::FREE_PAGE_HINT);

/// The program, with its sockets in a directory of its own. Killed if the test fails before its end.
struct Program {
    child: Option<Child>,
    socket: PathBuf,
    qmp: PathBuf,
}

impl Program {
    fn start(directory: &Path, arguments: &[&str]) -> Self {
        let (socket, qmp) = (directory.join("vhost"), directory.join("qmp"));
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-device-balloon"))
            .args(["--socket-path".as_ref(), socket.as_os_str()])
            .args(["--qmp-socket".as_ref(), qmp.as_os_str()])
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child: Some(child),
            socket,
            qmp,
        }
    }

    /// Waits until it listens.
    fn ready(self) -> Self {
        let limit = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(&self.qmp).is_err() {
            assert!(Instant::now() < limit, "it does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        self
    }

    fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(i32::try_from(self.id()).unwrap()).unwrap();
        kill_process(id, signal).unwrap();
    }

    fn finish(mut self) -> (Output, String) {
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, log)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn empty(directory: &Path) -> bool {
    directory.read_dir().unwrap().next().is_none()
}

#[test]
fn signals_end_it_and_take_its_sockets() {
    for signal in [Signal::TERM, Signal::INT] {
        let directory = tempfile::tempdir().unwrap();
        let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
        let mut vmm = Vmm::connect(&program.socket);
        vmm.start_driver(HINT);
        program.signal(signal);
        let (output, log) = program.finish();
        assert!(output.status.success(), "{log}");
        assert!(log.contains("told to end"), "{log}");
        assert!(empty(directory.path()));
    }
}

#[test]
fn r13_a_second_program_is_refused_and_a_dead_one_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let first = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let (output, log) = Program::start(directory.path(), &[]).finish();
    assert_eq!(output.status.code(), Some(1));
    assert!(log.contains("is in use by a running process"), "{log}");

    // The first was not disturbed; then it dies in the middle of a round.
    let mut vmm = Vmm::connect(&first.socket);
    vmm.start_driver(HINT);
    let mut operator = Operator::connect(&first.qmp);
    operator.until_running();
    operator.run("free-page-hint-start");
    first.signal(Signal::KILL);
    first.finish();
    assert!(!empty(directory.path()));
    let third = Program::start(directory.path(), &[]).ready();
    third.signal(Signal::TERM);
    let (output, log) = third.finish();
    assert!(output.status.success(), "{log}");
    assert!(log.contains("left behind"), "{log}");
    assert!(empty(directory.path()));
}

#[test]
fn a_front_end_that_goes_in_the_middle_of_a_round_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(HINT);
    let mut operator = Operator::connect(&program.qmp);
    operator.until_running();
    operator.run("free-page-hint-start");
    drop(vmm);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    assert!(log.contains("hinting round 0x80000000 ends"), "{log}");
    assert!(log.contains("the front end closed the connection"), "{log}");
    assert!(empty(directory.path()));
}

/// Context switches and CPU time, in clock ticks, of each thread of a process.
fn activity(id: u32) -> BTreeMap<OsString, (u64, u64)> {
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{id}/task")).unwrap() {
        let task = task.unwrap();
        // A thread may end while it is looked at.
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let switches = read("status")
            .lines()
            .filter(|line| line.contains("ctxt_switches"))
            .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
            .sum();
        let stat = read("stat");
        let fields = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let ticks = fields
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        threads.insert(task.file_name(), (switches, ticks));
    }
    threads
}

#[test]
fn r1_it_sleeps_while_a_round_waits_for_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(HINT);
    let mut operator = Operator::connect(&program.qmp);
    operator.until_running();
    let id = operator.run("free-page-hint-start")["id"].as_u64().unwrap() as u32;
    vmm.send(Queue::FreePage, &id.to_le_bytes());
    operator.event("FREE_PAGE_HINT", &json!({ "status": "started" }));
    thread::sleep(Duration::from_millis(100));
    let before = activity(program.id());
    thread::sleep(Duration::from_millis(500));
    let after = activity(program.id());
    assert_eq!(
        before, after,
        "context switches and CPU time of an idle device"
    );
    vmm.offer(Queue::FreePage, Vmm::FREE, 0x1000, true);
    assert_eq!(operator.run("query-free-page-hint")["blocks"], 1);
    program.signal(Signal::TERM);
    assert!(program.finish().0.status.success());
}

#[test]
fn r17_the_log_says_once_why_nothing_is_discarded() {
    let keeps = Features::KEEPS_HINTED_UNTIL_RETURNED;
    for (accepted, said, discarded) in [(HINT, 1, 0), (HINT | keeps, 0, 0x10_0000)] {
        let directory = tempfile::tempdir().unwrap();
        let program = Program::start(directory.path(), &["--discard-hinted"]).ready();
        let mut vmm = Vmm::connect(&program.socket);
        assert!(vmm.offered().contains(HINT | keeps));
        let mut operator = Operator::connect(&program.qmp);
        for _ in 0..2 {
            vmm.start_driver(accepted);
            operator.event("DRIVER_STARTED", &json!({}));
            let id = operator.run("free-page-hint-start")["id"].as_u64().unwrap() as u32;
            vmm.send(Queue::FreePage, &id.to_le_bytes());
            vmm.offer(Queue::FreePage, Vmm::FREE, 0x8_0000, true);
            operator.run("free-page-hint-done");
            vmm.stop_driver();
        }
        let state = operator.run("query-free-page-hint");
        assert_eq!(state["bytes-discarded"], discarded, "{state}");
        drop(vmm);
        let (output, log) = program.finish();
        assert!(output.status.success(), "{log}");
        assert_eq!(log.matches("is not discarded").count(), said, "{log}");
    }
}

#[test]
fn help_explains_features_and_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-balloon"))
        .arg("--help")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for word in [
        "free-page-reporting",
        "vhost-user-test-device-pci",
        "virtio_uml.device",
        "--persistent",
    ] {
        assert!(text.contains(word), "{word}");
    }
}
