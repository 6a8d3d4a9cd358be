// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of migrations with a hinting driver and a receiver, over real sockets.

mod common;

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::program::Program;
use common::vmm_qmp::FakeVmmQmp;
use common::{QmpClient, TestServer, Vmm, HANG_TIMEOUT, LENGTH, START};
use guest_migration::stream::{
    Destination, Listener, Received, Receiver, ReceiverOptions, StreamError,
};
use rustix::process::Signal;
use serde_json::{json, Value};
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_device_balloon::server::Exit;

const HINT: Features = Features::STATS_VQ.union(Features::FREE_PAGE_HINT);
const DISCARD: Features = HINT.union(Features::KEEPS_HINTED_UNTIL_RETURNED);
/// Bytes that the driver hints.
const FREE_BYTES: u32 = 0x10_0000;

/// A guest that runs only a driver, and its VMM.
struct Guest {
    stop: Arc<AtomicBool>,
    driver: JoinHandle<Vmm>,
}

impl Guest {
    /// Starts a driver. It answers hint requests if `answers` is set.
    fn start(mut vmm: Vmm, answers: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let driver = thread::spawn(move || {
            let mut last = 0;
            while !stopped.load(Ordering::Acquire) {
                let cmd_id = vmm.cmd_id();
                if answers && cmd_id != last && cmd_id > 1 {
                    vmm.send(Queue::FreePage, &cmd_id.to_le_bytes());
                    vmm.offer(Queue::FreePage, Vmm::FREE, FREE_BYTES, true);
                    vmm.send(Queue::FreePage, &[0; 4]);
                }
                last = cmd_id;
                thread::sleep(Duration::from_millis(1));
            }
            vmm
        });
        Self { stop, driver }
    }

    fn end(self) -> Vmm {
        self.stop.store(true, Ordering::Release);
        self.driver.join().unwrap()
    }
}

/// The sockets and the VMM of a migration.
struct Fixture {
    directory: tempfile::TempDir,
    vmm_qmp: FakeVmmQmp,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            vmm_qmp: FakeVmmQmp::start(directory.path()),
            directory,
        }
    }

    fn uri(&self) -> String {
        format!("unix:{}", self.directory.path().join("ram").display())
    }

    fn memory_file(&self) -> PathBuf {
        self.directory.path().join("there")
    }

    /// Receives one stream.
    fn receive(&self) -> JoinHandle<Result<Received, StreamError>> {
        let listener = Listener::bind(&self.uri().parse().unwrap()).unwrap();
        let destination = Destination::with_file(self.memory_file());
        let receiver = Receiver::new(listener, destination, ReceiverOptions::default()).unwrap();
        thread::spawn(move || receiver.run())
    }

    fn arguments(&self) -> Value {
        json!({ "uri": self.uri(), "vmm-qmp": self.vmm_qmp.path })
    }

    /// Starts a migration.
    fn migrate(&self, qmp: &mut QmpClient) {
        ok(qmp, "migrate", &self.arguments());
    }
}

fn ok(qmp: &mut QmpClient, command: &str, arguments: &Value) {
    let answer = qmp.execute(command, arguments);
    assert!(answer.get("return").is_some(), "{command}: {answer}");
}

fn set(qmp: &mut QmpClient, parameters: &Value) {
    ok(qmp, "migrate-set-parameters", parameters);
}

fn pause_before_switchover(qmp: &mut QmpClient) {
    let states = json!([{ "capability": "pause-before-switchover", "state": true }]);
    ok(
        qmp,
        "migrate-set-capabilities",
        &json!({ "capabilities": states }),
    );
}

fn until(qmp: &mut QmpClient, status: &str) -> Value {
    qmp.event("MIGRATION", &json!({ "status": status }));
    qmp.run("query-migrate")
}

/// Returns a VMM whose driver runs and whose guest memory has content in every page.
fn filled(socket: &std::path::Path, accepted: Features, qmp: &mut QmpClient) -> Vmm {
    let mut vmm = Vmm::connect(socket);
    let pages = LENGTH >> 12;
    for page in 0..pages {
        let content = (page + 1).to_le_bytes().repeat(512);
        vmm.write(START + (page << 12), &content);
    }
    vmm.start_driver(accepted);
    qmp.until_running();
    vmm
}

/// Whether migrations run in a helper process: see `migrate_in_helper.rs`.
fn has_helper() -> bool {
    env!("CARGO_CRATE_NAME") == "migrate_in_helper"
}

/// A server that offers discarding hints, in this process or in a daemon.
enum Server {
    Thread(TestServer),
    Daemon(tempfile::TempDir, Program),
}

impl Server {
    fn socket(&self) -> PathBuf {
        match self {
            Self::Thread(server) => server.socket(),
            Self::Daemon(_, program) => program.socket.clone(),
        }
    }

    /// Stops the server, and checks that it leaves no files.
    fn stop(self) {
        match self {
            Self::Thread(server) => server.stop(),
            Self::Daemon(directory, program) => {
                program.signal(Signal::TERM);
                assert!(Self::ended(&directory, program).contains("shutdown requested"));
            }
        }
    }

    /// Waits until the server ends because its front end has disconnected, and checks that it leaves no files.
    fn join(self) {
        match self {
            Self::Thread(server) => {
                let exit = server.join();
                assert!(
                    matches!(exit, Ok(Exit::FrontEndDisconnected(_))),
                    "{exit:?}"
                );
            }
            Self::Daemon(directory, program) => {
                assert!(Self::ended(&directory, program).contains("exiting: front end"));
            }
        }
    }

    fn ended(directory: &tempfile::TempDir, program: Program) -> String {
        let (output, log) = program.finish();
        assert!(output.status.success(), "{}: {log}", output.status);
        assert!(directory.path().read_dir().unwrap().next().is_none());
        log
    }
}

fn server() -> (Server, QmpClient) {
    if has_helper() {
        let directory = tempfile::tempdir().unwrap();
        let program = Program::start(directory.path(), &["--discard-hinted"]).ready();
        let qmp = QmpClient::connect(&program.qmp);
        return (Server::Daemon(directory, program), qmp);
    }
    let server = TestServer::start(DISCARD, false);
    let qmp = server.qmp();
    (Server::Thread(server), qmp)
}

#[test]
fn memory_is_migrated_and_hinted_pages_are_not_sent() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, true);
    // The timeout is long, because the driver always answers.
    set(&mut qmp, &json!({ "free-page-hint-wait": 600_000 }));
    let receiving = fixture.receive();
    assert_eq!(qmp.run("query-migrate")["status"], "none");
    fixture.migrate(&mut qmp);
    let mut states = Vec::new();
    for state in ["setup", "active", "device", "completed"] {
        qmp.event("MIGRATION", &json!({ "status": state }));
        states.push(state);
    }
    qmp.event("MIGRATION_PASS", &json!({ "pass": 1 }));
    let received = receiving.join().unwrap().unwrap();
    assert!(received.content_checked);

    let status = qmp.run("query-migrate");
    let free = u64::from(FREE_BYTES) >> 12;
    assert_eq!(status["status"], "completed", "{status}");
    assert_eq!(status["tracking"]["mode"], "content");
    assert_eq!(status["tracking"]["free-page-hint"], true);
    let ram = &status["ram"];
    assert_eq!(ram["skipped"], free, "{status}");
    assert_eq!(ram["remaining"], 0);
    assert_eq!(ram["total"], START + LENGTH);
    // All pages except the free ones and the zero pages of the rings.
    let normal = ram["normal"].as_u64().unwrap();
    let (pages, rings) = (LENGTH >> 12, 3 * 3);
    assert!(
        normal <= pages - free + rings && normal + rings >= pages - free,
        "{status}"
    );
    assert!(status["downtime"].as_u64().is_some());
    assert!(status["rounds"].as_array().unwrap().len() >= 2);
    assert_eq!(fixture.vmm_qmp.commands(), ["stop"]);

    let vmm = guest.end();
    let there = fs::read(fixture.memory_file()).unwrap();
    assert!(there == vmm.bytes(), "the memory is the same");
    assert!(!Destination::marker(&fixture.memory_file()).exists());

    // The guest can be resumed here.
    qmp.run("cont");
    assert_eq!(fixture.vmm_qmp.commands(), ["stop", "cont"]);
    let (_, why) = qmp.fail("cont", &json!({}));
    assert!(why.contains("no migration"), "{why}");
    assert!(qmp.run("free-page-hint-start")["id"].as_u64().is_some());
    drop(vmm);
    drop(qmp);
    server.join();
}

#[test]
fn r17_hints_are_ignored_where_nothing_else_is_sound_and_it_says_so() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    // As Linux's own driver, this one hints and does not keep its hinted blocks.
    let vmm = filled(&server.socket(), HINT, &mut qmp);
    let guest = Guest::start(vmm, true);
    set(
        &mut qmp,
        &json!({ "dirty-tracking": "content", "multifd-channels": 3, "multifd-compression": "zstd" }),
    );
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    let status = until(&mut qmp, "completed");
    assert_eq!(status["tracking"]["free-page-hint"], false);
    let reason = status["tracking"]["reason"].as_str().unwrap();
    assert!(reason.contains("hints are ignored"), "{reason}");
    assert_eq!(status["ram"]["skipped"], 0);
    assert_eq!(receiving.join().unwrap().unwrap().channels, 3);
    assert_eq!(qmp.run("query-free-page-hint")["blocks"], 0);
    let vmm = guest.end();
    assert!(fs::read(fixture.memory_file()).unwrap() == vmm.bytes());
    server.stop();
}

#[test]
fn it_goes_without_hints_where_there_are_none() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), Features::STATS_VQ, &mut qmp);
    let guest = Guest::start(vmm, false);
    set(
        &mut qmp,
        &json!({ "verify": true, "zero-page-detection": "none" }),
    );
    for attempt in 0..2 {
        let receiving = fixture.receive();
        fixture.migrate(&mut qmp);
        let status = until(&mut qmp, "completed");
        assert!(receiving.join().unwrap().unwrap().content_checked);
        assert_eq!(status["tracking"]["free-page-hint"], false, "{status}");
        assert_eq!(status["ram"]["missed"], 0, "{status}");
        // The VMM reports that its guest is paused. After it resumes the guest, another migration is possible.
        let vmm_knows = until_failed(&fixture, &mut qmp);
        assert!(
            vmm_knows.contains("is not running"),
            "{attempt}: {vmm_knows}"
        );
        fixture.vmm_qmp.cont();
        fs::remove_file(fixture.memory_file()).unwrap();
    }
    let mut vmm = guest.end();
    assert_eq!(vmm.cmd_id(), 0, "no hints were requested");
    server.stop();
}

/// Starts a migration that fails, and returns its error.
fn until_failed(fixture: &Fixture, qmp: &mut QmpClient) -> String {
    qmp.events.clear();
    fixture.migrate(qmp);
    let status = until(qmp, "failed");
    status["error-desc"].as_str().unwrap().to_owned()
}

#[test]
fn r14_a_silent_guest_delays_it_by_the_limit_at_most() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, false);
    set(&mut qmp, &json!({ "free-page-hint-wait": 100 }));
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    let status = until(&mut qmp, "completed");
    receiving.join().unwrap().unwrap();
    let waits = status["rounds"].as_array().unwrap().iter();
    let waited: u64 = waits.map(|it| it["hint-wait-us"].as_u64().unwrap()).sum();
    // Without a timeout the wait would never end.
    assert!(waited >= 100_000, "{status}");
    assert_eq!(status["ram"]["skipped"], 0);
    let mut vmm = guest.end();
    assert_eq!(vmm.cmd_id(), 1, "R16");
    server.stop();
}

#[test]
fn r16_it_can_be_cancelled_at_any_point_and_the_guest_has_its_pages() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, false);
    let path = fixture.directory.path().join("ram");

    // This socket does not accept the stream.
    let listener = UnixListener::bind(&path).unwrap();
    fixture.migrate(&mut qmp);
    qmp.event("MIGRATION", &json!({ "status": "setup" }));
    qmp.run("migrate_cancel");
    let status = until(&mut qmp, "cancelled");
    assert_eq!(status["status"], "cancelled");
    drop(listener);
    fs::remove_file(&path).unwrap();

    // The migration waits for hints that do not come.
    set(&mut qmp, &json!({ "free-page-hint-wait": 600_000 }));
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "requested" }));
    qmp.run("migrate-cancel");
    until(&mut qmp, "cancelled");
    assert_eq!(qmp.run("query-free-page-hint")["status"], "done");
    assert!(receiving.join().unwrap().is_err());
    assert!(Destination::marker(&fixture.memory_file()).exists());

    // The migration sends so slowly that it cannot complete before it is cancelled.
    let slow = json!({ "free-page-hint-wait": 0, "max-bandwidth": 10_000 });
    set(&mut qmp, &slow);
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    qmp.event("MIGRATION", &json!({ "status": "active" }));
    let limit = Instant::now() + HANG_TIMEOUT;
    while qmp.run("query-migrate")["ram"]["transferred"] == 0 {
        assert!(Instant::now() < limit);
        thread::sleep(Duration::from_millis(2));
    }
    qmp.run("migrate-cancel");
    until(&mut qmp, "cancelled");
    assert!(receiving.join().unwrap().is_err());

    // The migration waits for `migrate-continue`.
    set(&mut qmp, &json!({ "max-bandwidth": 0 }));
    pause_before_switchover(&mut qmp);
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    until(&mut qmp, "pre-switchover");
    assert_eq!(qmp.run("query-free-page-hint")["status"], "done");
    qmp.run("migrate-cancel");
    until(&mut qmp, "cancelled");
    assert!(receiving.join().unwrap().is_err());

    assert_eq!(
        fixture.vmm_qmp.commands(),
        [""; 0],
        "the guest was never paused"
    );
    let mut vmm = guest.end();
    assert_eq!(vmm.cmd_id(), 1);
    // As in QEMU, it is no error to cancel when no migration is in progress.
    qmp.run("migrate_cancel");
    server.stop();
}

#[test]
fn what_does_not_go_together_is_refused_at_the_start() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let (_, why) = qmp.fail("migrate", &fixture.arguments());
    assert!(why.contains("no front end has shared"), "{why}");
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let (_, why) = qmp.fail("migrate", &json!({ "uri": "carrier-pigeon:home" }));
    assert!(
        why.contains("'carrier-pigeon:home' is not an address"),
        "{why}"
    );
    let (_, why) = qmp.fail("migrate", &json!({ "uri": fixture.uri(), "wings": 2 }));
    assert!(why.contains("wings"), "{why}");
    let (_, why) = qmp.fail("migrate-set-parameters", &json!({ "max-rounds": 0 }));
    assert!(
        why.contains("'max-rounds' expects an integer from 1"),
        "{why}"
    );
    assert_eq!(qmp.run("query-migrate-parameters")["max-rounds"], 10);
    let (_, why) = qmp.fail("migrate-continue", &json!({ "state": "pre-switchover" }));
    assert!(why.contains("migration state is none"), "{why}");
    let (_, why) = qmp.fail("migrate-continue", &json!({ "state": "device" }));
    assert!(why.contains("not 'device'"), "{why}");
    assert_eq!(qmp.run("query-migrate")["status"], "none");
    drop(vmm);
    drop(qmp);
    server.join();
}

#[test]
fn r7_postcopy_is_refused_and_with_hints_for_their_sake() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, true);
    let states = json!([{ "capability": "postcopy-ram", "state": true }]);
    let states = json!({ "capabilities": states });
    ok(&mut qmp, "migrate-set-capabilities", &states);
    let all = qmp.run("query-migrate-capabilities");
    assert_eq!(
        all[0],
        json!({ "capability": "postcopy-ram", "state": true })
    );
    let (_, why) = qmp.fail("migrate", &fixture.arguments());
    assert!(
        why.contains("free-page-hint cannot be used with postcopy-ram"),
        "{why}"
    );
    set(&mut qmp, &json!({ "free-page-hint": false }));
    let (_, why) = qmp.fail("migrate", &fixture.arguments());
    assert!(why.contains("postcopy-ram is not supported"), "{why}");
    assert_eq!(qmp.run("query-migrate")["status"], "none");
    assert_eq!(qmp.run("query-free-page-hint")["status"], "stopped");
    let _vmm = guest.end();
    server.stop();
}

#[test]
fn one_migration_at_a_time_and_hinting_is_its_own() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, true);
    pause_before_switchover(&mut qmp);
    let receiving = fixture.receive();
    // The migration ends the hint round of a QMP client.
    qmp.run("free-page-hint-start");
    fixture.migrate(&mut qmp);
    until(&mut qmp, "pre-switchover");
    let (_, why) = qmp.fail("migrate", &fixture.arguments());
    assert!(why.contains("in progress (pre-switchover)"), "{why}");
    for command in ["start", "stop", "sync", "done"] {
        let (_, why) = qmp.fail(&format!("free-page-hint-{command}"), &json!({}));
        assert!(
            why.contains("a migration is in progress"),
            "{command}: {why}"
        );
    }
    ok(
        &mut qmp,
        "migrate-continue",
        &json!({ "state": "pre-switchover" }),
    );
    until(&mut qmp, "completed");
    receiving.join().unwrap().unwrap();
    // With `pause-before-switchover`, the migration does not pause the guest.
    assert_eq!(fixture.vmm_qmp.commands(), [""; 0]);
    let vmm = guest.end();
    assert!(fs::read(fixture.memory_file()).unwrap() == vmm.bytes());
    qmp.run("free-page-hint-start");
    server.stop();
}

#[test]
fn a_front_end_that_goes_before_the_switchover_fails_the_migration() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, false);
    set(&mut qmp, &json!({ "free-page-hint-wait": 600_000 }));
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "requested" }));
    drop(guest.end());
    let status = until(&mut qmp, "failed");
    let why = status["error-desc"].as_str().unwrap();
    assert!(why.contains("front end closed the connection"), "{why}");
    assert_eq!(status["status"], "failed");
    assert!(receiving.join().unwrap().is_err());
    drop(qmp);
    server.join();
}

#[test]
fn a_balloon_that_is_unplugged_for_the_switchover_does_not_end_it() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, true);
    pause_before_switchover(&mut qmp);
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    until(&mut qmp, "pre-switchover");
    let vmm = guest.end();
    // The guest writes after the balloon is unplugged. Then it is paused.
    let memory = vmm.unplug();
    qmp.event("FRONTEND_DISCONNECTED", &json!({}));
    memory.write(Vmm::FREE + 0x1234, &[7; 0x2000]);
    // Another front end is refused until the migration has ended.
    let mut other = std::os::unix::net::UnixStream::connect(server.socket()).unwrap();
    other.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
    let end = std::io::Read::read(&mut other, &mut [0]);
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    ok(
        &mut qmp,
        "migrate-continue",
        &json!({ "state": "pre-switchover" }),
    );
    let status = until(&mut qmp, "completed");
    assert_eq!(status["status"], "completed");
    receiving.join().unwrap().unwrap();
    assert!(fs::read(fixture.memory_file()).unwrap() == memory.bytes());
    // The server stays until its QMP clients have disconnected. Then it ends.
    drop(qmp);
    server.join();
}

#[test]
fn memory_that_changes_under_it_fails_the_migration() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, false);
    set(&mut qmp, &json!({ "free-page-hint-wait": 600_000 }));
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "requested" }));
    let mut vmm = guest.end();
    vmm.share_memory();
    vmm.cmd_id();
    assert_eq!(qmp.run("query-migrate")["status"], "active");
    vmm.share_half_the_memory();
    let status = until(&mut qmp, "failed");
    let why = status["error-desc"].as_str().unwrap();
    assert!(why.contains("guest memory regions changed"), "{why}");
    assert!(receiving.join().unwrap().is_err());
    server.stop();
}

#[test]
fn r16_a_destination_that_goes_leaves_the_guest_unharmed() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let before = vmm.bytes();
    let guest = Guest::start(vmm, false);
    set(
        &mut qmp,
        &json!({ "free-page-hint-wait": 0, "max-bandwidth": 100_000 }),
    );
    let cancel = guest_migration::CancelToken::default();
    let listener = Listener::bind(&fixture.uri().parse().unwrap()).unwrap();
    let options = ReceiverOptions {
        cancel: cancel.clone(),
        ..ReceiverOptions::default()
    };
    let destination = Destination::with_file(fixture.memory_file());
    let receiver = Receiver::new(listener, destination, options).unwrap();
    let receiving = thread::spawn(move || receiver.run());
    fixture.migrate(&mut qmp);
    qmp.event("MIGRATION", &json!({ "status": "active" }));
    cancel.cancel();
    assert!(receiving.join().unwrap().is_err());
    let status = until(&mut qmp, "failed");
    assert!(status["error-desc"].as_str().is_some(), "{status}");
    let mut vmm = guest.end();
    assert_eq!(vmm.cmd_id(), 1);
    let (rings, after) = ((START + 0x20_0000) as usize, vmm.bytes());
    assert!(after[rings..] == before[rings..]);
    assert_eq!(fixture.vmm_qmp.commands(), [""; 0]);
    server.stop();
}

#[test]
fn a_descriptor_of_the_program_itself_is_no_destination() {
    use std::os::fd::AsRawFd;
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, true);
    let own = tempfile::tempfile().unwrap();
    // The helper process has its connections to the daemon at 0 and 1.
    let numbers = match has_helper() {
        true => vec![0, 1],
        false => vec![own.as_raw_fd()],
    };
    for number in numbers {
        let uri = format!("fd:{number}");
        ok(&mut qmp, "migrate", &json!({ "uri": uri }));
        let status = until(&mut qmp, "failed");
        let why = status["error-desc"].as_str().unwrap();
        assert!(why.contains("of this program itself"), "{why}");
        assert!(why.contains(&uri), "{why}");
    }
    let _vmm = guest.end();
    server.stop();
}

#[test]
fn a_vmm_that_does_not_answer_is_an_error_before_anything_is_sent() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, true);
    let nowhere = fixture.directory.path().join("nowhere");
    let arguments = json!({ "uri": fixture.uri(), "vmm-qmp": nowhere });
    ok(&mut qmp, "migrate", &arguments);
    let status = until(&mut qmp, "failed");
    let why = status["error-desc"].as_str().unwrap();
    assert!(why.contains("nowhere"), "{why}");
    assert_eq!(qmp.run("query-free-page-hint")["blocks"], 0);
    // QMP clients can use hinting again.
    qmp.run("free-page-hint-start");
    let _vmm = guest.end();
    server.stop();
}

#[test]
fn r16_a_daemon_that_is_told_to_end_gives_up_and_the_guest_has_its_pages() {
    let fixture = Fixture::new();
    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &["--discard-hinted"]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    let mut vmm = filled(&program.socket, DISCARD, &mut qmp);
    set(&mut qmp, &json!({ "free-page-hint-wait": 600_000 }));
    let receiving = fixture.receive();
    fixture.migrate(&mut qmp);
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "requested" }));
    vmm.config_change();
    assert!(vmm.cmd_id() > 1);
    program.signal(Signal::TERM);
    vmm.config_change();
    // The program waits for the driver to read DONE, but not for long: a slow driver finds the connection closed.
    let heard = vmm.last_cmd_id();
    assert!(heard.is_none_or(|command| command == 1), "{heard:?}");
    qmp.event("MIGRATION", &json!({ "status": "cancelled" }));
    assert!(receiving.join().unwrap().is_err());
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    assert_eq!(fixture.vmm_qmp.commands(), [""; 0]);
    assert!(here.path().read_dir().unwrap().next().is_none());
}

#[test]
fn parameters_of_one_migration_are_not_those_of_the_next() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let vmm = filled(&server.socket(), DISCARD, &mut qmp);
    let guest = Guest::start(vmm, false);
    set(
        &mut qmp,
        &json!({ "free-page-hint-wait": 0, "max-rounds": 7 }),
    );
    let before = qmp.run("query-migrate-parameters");
    let capabilities = qmp.run("query-migrate-capabilities");

    // A file has one channel, so this migration fails.
    let mut wrong = fixture.arguments();
    let stream = fixture.directory.path().join("stream");
    wrong["uri"] = json!(format!("file:{}", stream.display()));
    wrong["parameters"] = json!({ "multifd-channels": 4, "verify": true });
    ok(&mut qmp, "migrate", &wrong);
    until(&mut qmp, "failed");
    assert_eq!(qmp.run("query-migrate-parameters"), before);
    // The same command without the parameters succeeds.
    wrong.as_object_mut().unwrap().remove("parameters");
    ok(&mut qmp, "migrate", &wrong);
    until(&mut qmp, "completed");
    qmp.run("cont");

    // A capability of one migration.
    let receiving = fixture.receive();
    let mut waits = fixture.arguments();
    let states = json!([{ "capability": "pause-before-switchover", "state": true }]);
    waits["capabilities"] = states;
    ok(&mut qmp, "migrate", &waits);
    until(&mut qmp, "pre-switchover");
    assert_eq!(qmp.run("query-migrate-capabilities"), capabilities);
    qmp.run("migrate-cancel");
    until(&mut qmp, "cancelled");
    assert!(receiving.join().unwrap().is_err());

    for (key, value, word) in [
        ("parameters", json!({ "wings": 2 }), "'wings' is unknown"),
        (
            "parameters",
            json!({ "max-rounds": 0 }),
            "'max-rounds' expects",
        ),
        (
            "capabilities",
            json!([{ "capability": "xbzrle", "state": true }]),
            "'xbzrle' is unknown",
        ),
        (
            "capabilities",
            json!([{ "capability": "postcopy-ram", "state": true }]),
            "postcopy-ram",
        ),
    ] {
        let mut arguments = fixture.arguments();
        arguments[key] = value;
        let (_, why) = qmp.fail("migrate", &arguments);
        assert!(why.contains(word), "{why}");
    }
    assert_eq!(qmp.run("query-migrate-parameters"), before);
    let _vmm = guest.end();
    server.stop();
}

/// Each state has its own message and its own cure.
#[test]
fn a_front_end_without_shared_memory_is_told_from_none() {
    let fixture = Fixture::new();
    let (server, mut qmp) = server();
    let check = |qmp: &mut QmpClient, words: &str, driver: &str, shared: bool| {
        for (command, arguments) in [
            ("migrate", fixture.arguments()),
            ("balloon", json!({ "value": 1 << 20 })),
            ("query-balloon", json!({})),
        ] {
            let answer = qmp.execute(command, &arguments);
            let why = answer["error"]["desc"].as_str().unwrap_or_default();
            assert!(why.contains(words), "{command}: {answer}");
        }
        let status = qmp.run("query-virtio-status");
        assert_eq!(status["driver"], driver, "{status}");
        assert_eq!(status["memory-shared"], shared, "{status}");
    };
    check(&mut qmp, "none is connected", "none", false);
    let mut vmm = Vmm::connect(&server.socket());
    qmp.event("FRONTEND_CONNECTED", &json!({}));
    check(&mut qmp, "no driver has started", "none", false);
    vmm.accept_features(HINT);
    check(&mut qmp, "share=on", "stopped", false);
    vmm.start_driver(HINT);
    qmp.until_running();
    let status = qmp.run("query-virtio-status");
    assert_eq!(status["driver"], "running", "{status}");
    assert_eq!(status["memory-shared"], true, "{status}");
    // A paused guest: the front end stops the queues.
    vmm.stop_driver();
    let status = qmp.run("query-virtio-status");
    assert_eq!(
        (&status["status"], &status["driver"]),
        (&json!("no-driver"), &json!("stopped"))
    );
    server.stop();
}
