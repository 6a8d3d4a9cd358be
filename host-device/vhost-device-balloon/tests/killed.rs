// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of a daemon that ends while its guest is paused for the last iteration of a migration.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver as Channel, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::program::Program;
use common::vmm_qmp::FakeVmmQmp;
use common::{QmpClient, Vmm, HANG_TIMEOUT};
use guest_migration::stream::{Destination, Listener, Receiver, ReceiverOptions};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Value};
use shared_abi::features::Features;

/// The variable that names the socket of the daemon to the VMM process.
const VMM_SOCKET: &str = "TEST_VMM_SOCKET";

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + HANG_TIMEOUT;
    while !done() {
        assert!(Instant::now() < limit, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A receiver whose confirmation arrives only when the test says so: until then, the daemon is in its last iteration.
struct HeldReceiver {
    uri: String,
    release: Option<Sender<()>>,
}

impl HeldReceiver {
    /// Holds back what the receiver sends once `is_paused` returns true.
    fn start(directory: &Path, is_paused: impl Fn() -> bool + Send + 'static) -> Self {
        let (near, far) = (directory.join("near"), directory.join("far"));
        let listener = Listener::bind(&format!("unix:{}", far.display()).parse().unwrap()).unwrap();
        let destination = Destination::with_file(directory.join("there"));
        let receiver = Receiver::new(listener, destination, ReceiverOptions::default()).unwrap();
        thread::spawn(move || receiver.run());
        let front = UnixListener::bind(&near).unwrap();
        let (release, released) = channel();
        thread::spawn(move || {
            let (daemon, _) = front.accept().unwrap();
            let receiver = UnixStream::connect(far).unwrap();
            let (from, to) = (daemon.try_clone().unwrap(), receiver.try_clone().unwrap());
            thread::spawn(move || forward(from, to, || {}));
            forward(receiver, daemon, || hold(&is_paused, &released));
        });
        Self {
            uri: format!("unix:{}", near.display()),
            release: Some(release),
        }
    }

    /// Lets the confirmation through.
    fn confirm(&mut self) {
        self.release = None;
    }
}

fn hold(is_paused: &impl Fn() -> bool, released: &Channel<()>) {
    if is_paused() {
        let _ = released.recv();
    }
}

fn forward(mut from: UnixStream, mut to: UnixStream, before: impl Fn()) {
    let mut bytes = [0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut bytes) {
        before();
        if to.write_all(&bytes[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn migrate(qmp: &mut QmpClient, uri: &str, vmm_qmp: Option<&Path>) {
    let parameters = json!({ "free-page-hint": false });
    let answer = qmp.execute("migrate-set-parameters", &parameters);
    assert!(answer.get("return").is_some(), "{answer}");
    let mut arguments = json!({ "uri": uri });
    if let Some(path) = vmm_qmp {
        arguments["vmm-qmp"] = json!(path);
    }
    let answer = qmp.execute("migrate", &arguments);
    assert!(answer.get("return").is_some(), "{answer}");
}

/// A daemon in the last iteration of a migration, with a VMM that pauses its guest through QMP.
struct Fixture {
    _directory: tempfile::TempDir,
    receiver: HeldReceiver,
    vmm_qmp: Arc<FakeVmmQmp>,
    qmp: QmpClient,
    _vmm: Vmm,
}

impl Fixture {
    fn start(program: &Program) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let vmm_qmp = Arc::new(FakeVmmQmp::start(directory.path()));
        let vmm = vmm_qmp.clone();
        let is_paused = move || vmm.commands() == ["stop"];
        let receiver = HeldReceiver::start(directory.path(), is_paused);
        let mut qmp = QmpClient::connect(&program.qmp);
        let mut vmm = Vmm::connect(&program.socket);
        vmm.start_driver(Features::STATS_VQ);
        qmp.until_running();
        migrate(&mut qmp, &receiver.uri, Some(&vmm_qmp.path));
        wait_until("it does not pause the guest", || {
            vmm_qmp.commands() == ["stop"]
        });
        Self {
            _directory: directory,
            receiver,
            vmm_qmp,
            qmp,
            _vmm: vmm,
        }
    }
}

#[test]
fn a_daemon_that_is_killed_in_the_last_iteration_leaves_the_guest_running() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let fixture = Fixture::start(&program);
    program.signal(Signal::KILL);
    // The guard process has the log as well, so the log ends after both.
    let (_, log) = program.finish();
    assert_eq!(fixture.vmm_qmp.commands(), ["stop", "cont"], "{log}");
    assert!(log.contains("guest runs again"), "{log}");
}

#[test]
fn a_vmm_that_answers_late_is_told_to_resume_the_guest_after_the_end_of_the_daemon() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let fixture = Fixture::start(&program);
    fixture.vmm_qmp.set_silent(true);
    program.signal(Signal::TERM);
    wait_until("the daemon does not end", || program.has_ended());
    fixture.vmm_qmp.set_silent(false);
    let (_, log) = program.finish();
    assert_eq!(fixture.vmm_qmp.commands(), ["stop", "cont"], "{log}");
    assert!(log.contains("guest runs again"), "{log}");
}

#[test]
fn a_vmm_that_answers_late_is_told_to_resume_the_guest_of_a_cancelled_migration() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let mut fixture = Fixture::start(&program);
    fixture.vmm_qmp.set_silent(true);
    fixture.qmp.run("migrate_cancel");
    fixture
        .qmp
        .event("MIGRATION", &json!({ "status": "cancelled" }));
    let status = fixture.qmp.run("query-migrate");
    assert_eq!(status["guest-paused"], true, "{status}");
    fixture.vmm_qmp.set_silent(false);
    wait_until("the guest stays paused", || {
        fixture.vmm_qmp.commands() == ["stop", "cont"]
    });
    program.signal(Signal::TERM);
    let (_, log) = program.finish();
    assert!(log.contains("a guard process tries again"), "{log}");
}

#[test]
fn a_guard_outlives_the_signals_that_end_its_parent() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let fixture = Fixture::start(&program);
    let kinds = ["broker-process", "guard-process", "migration-helper"];
    assert_eq!(program.kinds_of_descendants(), kinds);
    let descendants = program.descendants();
    for signal in [Signal::HUP, Signal::INT, Signal::TERM, Signal::QUIT] {
        for (pid, _) in &descendants {
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            kill_process(pid, signal).unwrap();
        }
    }
    program.signal(Signal::KILL);
    let (_, log) = program.finish();
    assert_eq!(fixture.vmm_qmp.commands(), ["stop", "cont"], "{log}");
}

/// The helper process is killed together with the daemon: then the guard process resumes the guest.
#[test]
fn a_guard_resumes_the_guest_if_all_others_are_killed() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let fixture = Fixture::start(&program);
    let others = program.descendants();
    let others = others.iter().filter(|(_, kind)| kind != "guard-process");
    // The helper process last: it would resume the guest at the end of the daemon.
    for pid in others.map(|(pid, _)| *pid).rev() {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }
    program.signal(Signal::KILL);
    let (_, log) = program.finish();
    assert_eq!(fixture.vmm_qmp.commands(), ["stop", "cont"], "{log}");
    assert!(log.contains("guest runs again"), "{log}");
}

#[test]
fn a_migration_whose_helper_is_killed_fails_and_the_guest_is_resumed() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let mut fixture = Fixture::start(&program);
    for (pid, kind) in program.descendants() {
        if kind == "migration-helper" {
            let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).unwrap();
        }
    }
    let qmp = &mut fixture.qmp;
    qmp.event("MIGRATION", &json!({ "status": "failed" }));
    let status = qmp.run("query-migrate");
    let why = status["error-desc"].as_str().unwrap();
    assert!(why.contains("migration helper process failed"), "{why}");
    wait_until("the guest is not resumed", || {
        fixture.vmm_qmp.commands() == ["stop", "cont"]
    });
    wait_until("processes of the migration remain", || {
        program.kinds_of_descendants() == ["broker-process"]
    });
    // The daemon serves on, and the next migration has a helper process of its own.
    let nowhere = here.path().join("nowhere");
    let uri = format!("unix:{}", nowhere.display());
    migrate(&mut fixture.qmp, &uri, Some(&fixture.vmm_qmp.path));
    fixture
        .qmp
        .event("MIGRATION", &json!({ "status": "failed" }));
    let status = fixture.qmp.run("query-migrate");
    let why = status["error-desc"].as_str().unwrap();
    assert!(why.contains("nowhere"), "{why}");
    program.signal(Signal::TERM);
    assert!(program.finish().0.status.success());
}

/// A helper process has the rights to read and stop other processes. The daemon has them only while a migration runs.
#[test]
fn a_helper_exists_while_a_migration_runs() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    assert_eq!(program.kinds_of_descendants(), ["broker-process"]);
    let mut fixture = Fixture::start(&program);
    let kinds = ["broker-process", "guard-process", "migration-helper"];
    assert_eq!(program.kinds_of_descendants(), kinds);
    fixture.receiver.confirm();
    fixture
        .qmp
        .event("MIGRATION", &json!({ "status": "completed" }));
    wait_until("processes of the migration remain", || {
        program.kinds_of_descendants() == ["broker-process"]
    });
    // Another helper process resumes the guest.
    fixture.qmp.run("cont");
    assert_eq!(fixture.vmm_qmp.commands(), ["stop", "cont"]);
    wait_until("the helper process remains", || {
        program.kinds_of_descendants() == ["broker-process"]
    });
    program.signal(Signal::TERM);
    assert!(program.finish().0.status.success());
}

#[test]
fn without_a_broker_there_is_no_migration_and_the_daemon_serves_on() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(Features::STATS_VQ);
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    kill_broker(&program);
    let (_, why) = qmp.fail("migrate", &json!({ "uri": "unix:/nonexistent" }));
    assert!(
        why.contains("migration helper process cannot be started"),
        "{why}"
    );
    qmp.run("query-balloon");
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    assert!(log.contains("ERROR broker process has ended"), "{log}");
}

#[test]
fn without_a_broker_and_a_front_end_the_daemon_ends() {
    for has_front_end in [false, true] {
        let here = tempfile::tempdir().unwrap();
        let program = Program::start(here.path(), &["--persistent"]).ready();
        let vmm = has_front_end.then(|| {
            let mut vmm = Vmm::connect(&program.socket);
            vmm.start_driver(Features::STATS_VQ);
            QmpClient::connect(&program.qmp).until_running();
            vmm
        });
        kill_broker(&program);
        if has_front_end {
            QmpClient::connect(&program.qmp).run("query-balloon");
        }
        drop(vmm);
        let (output, log) = program.finish();
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(
            log.contains("ends because its broker process has ended"),
            "{log}"
        );
    }
}

#[test]
fn a_broker_that_does_not_answer_does_not_keep_the_daemon() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let broker = Pid::from_raw(i32::try_from(program.descendants()[0].0).unwrap()).unwrap();
    kill_process(broker, Signal::STOP).unwrap();
    program.signal(Signal::TERM);
    wait_until("the daemon does not end", || program.has_ended());
    kill_process(broker, Signal::CONT).unwrap();
    let (_, log) = program.finish();
    assert!(log.contains("did not answer within 10s"), "{log}");
}

/// Kills the broker process, the only other process of the program.
fn kill_broker(program: &Program) {
    for (pid, _) in program.descendants() {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }
    wait_until("the broker process remains", || {
        program.descendants().is_empty()
    });
}

#[test]
fn after_the_switchover_nothing_resumes_the_guest() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let mut fixture = Fixture::start(&program);
    fixture.receiver.confirm();
    fixture
        .qmp
        .event("MIGRATION", &json!({ "status": "completed" }));
    program.signal(Signal::KILL);
    let (_, log) = program.finish();
    assert_eq!(fixture.vmm_qmp.commands(), ["stop"], "{log}");
}

/// The terminal of the daemon is closed: it gets SIGHUP, and it cannot write its log.
#[test]
fn a_daemon_that_is_told_to_end_in_the_last_iteration_resumes_the_guest() {
    for signal in [Signal::HUP, Signal::TERM, Signal::INT] {
        let here = tempfile::tempdir().unwrap();
        let mut program = Program::start(here.path(), &[]).ready();
        let fixture = Fixture::start(&program);
        program.close_log();
        program.signal(signal);
        let (output, _) = program.finish();
        assert_eq!(fixture.vmm_qmp.commands(), ["stop", "cont"], "{signal:?}");
        assert_eq!(output.status.code(), Some(0), "{signal:?}: {output:?}");
        assert!(here.path().read_dir().unwrap().next().is_none());
    }
}

/// The VMM of the next tests, as a process of its own: the daemon stops the processes that map guest memory.
#[test]
#[ignore = "a process of other tests"]
fn vmm_process() {
    let Some(socket) = std::env::var_os(VMM_SOCKET) else {
        return;
    };
    let mut vmm = Vmm::connect(&PathBuf::from(socket));
    vmm.start_driver(Features::STATS_VQ);
    println!("ready");
    // Until the test closes the pipe.
    let _ = std::io::stdin().read(&mut [0]);
}

struct VmmProcess(Child);

impl VmmProcess {
    fn start(socket: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vmm_process", "--ignored", "--nocapture"])
            .env(VMM_SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("ready")));
        Self(child)
    }

    /// Returns whether all threads of the process are stopped.
    fn is_stopped(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let mut states = tasks.map(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            let fields = stat.rsplit(')').next().unwrap_or_default();
            fields.trim_start().starts_with('T')
        });
        states.all(|stopped| stopped)
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a migration that stops the processes of the VMM, and waits until they are stopped.
fn stopped_vmm(program: &Program) -> (tempfile::TempDir, HeldReceiver, VmmProcess, QmpClient) {
    let directory = tempfile::tempdir().unwrap();
    let vmm = VmmProcess::start(&program.socket);
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    let state = Arc::new(Mutex::new(QmpClient::connect(&program.qmp)));
    let is_paused = move || state.lock().unwrap().run("query-migrate")["status"] == "device";
    let receiver = HeldReceiver::start(directory.path(), is_paused);
    migrate(&mut qmp, &receiver.uri, None);
    qmp.event("MIGRATION", &json!({ "status": "device" }));
    wait_until("the VMM is not stopped", || vmm.is_stopped());
    (directory, receiver, vmm, qmp)
}

#[test]
fn stopped_processes_continue_when_their_daemon_is_killed() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let (_directory, _receiver, vmm, _qmp) = stopped_vmm(&program);
    program.signal(Signal::KILL);
    let (_, log) = program.finish();
    assert!(!vmm.is_stopped(), "{log}");
    // Either the helper process resumes the guest, or the guard process does.
    assert!(
        log.contains("which is cancelled") || log.contains("guest runs again"),
        "{log}"
    );
}

#[test]
fn after_the_switchover_stopped_processes_stay_stopped() {
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &[]).ready();
    let (_directory, mut receiver, vmm, mut qmp) = stopped_vmm(&program);
    receiver.confirm();
    qmp.event("MIGRATION", &json!({ "status": "completed" }));
    let status: Value = qmp.run("query-migrate");
    assert_eq!(status["status"], "completed", "{status}");
    program.signal(Signal::KILL);
    let (_, log) = program.finish();
    assert!(vmm.is_stopped(), "{log}");
}
