// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the confinement of a running daemon, as the kernel shows it.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::program::Program;
use common::{QmpClient, Vmm};
use rustix::process::Signal;
use serde_json::json;
use shared_abi::features::Features;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-device-balloon");

/// All measures off.
const OFF: [&str; 10] = [
    "--sandbox",
    "none",
    "--seccomp",
    "none",
    "--landlock",
    "off",
    "--drop-capabilities",
    "off",
    "--no-new-privs",
    "off",
];

/// Returns a field of a file in `/proc`, such as `Seccomp`.
fn field(path: &Path, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{name}: {text}"))
        .trim()
        .to_owned()
}

fn status(id: u32, name: &str) -> String {
    field(Path::new(&format!("/proc/{id}/status")), name)
}

/// Returns which network namespace a process is in.
fn network(id: u32) -> std::path::PathBuf {
    fs::read_link(format!("/proc/{id}/ns/net")).unwrap()
}

/// A daemon whose guest runs, with a QMP client.
fn serving(program: &Program) -> (Vmm, QmpClient) {
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(Features::STATS_VQ);
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    (vmm, qmp)
}

#[test]
fn each_thread_of_a_daemon_is_confined() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &[]).ready();
    let served = serving(&program);
    let tasks = fs::read_dir(format!("/proc/{}/task", program.id())).unwrap();
    let tasks: Vec<_> = tasks.map(|task| task.unwrap().path()).collect();
    // Of the server, the log, the QMP client, the messages, the queues, and the relay.
    assert!(tasks.len() >= 6, "{tasks:?}");
    for task in tasks {
        let status = task.join("status");
        assert_eq!(field(&status, "NoNewPrivs"), "1");
        assert_eq!(field(&status, "Seccomp"), "2");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
    }
    for (id, kind) in [(program.id(), "device".to_owned())]
        .into_iter()
        .chain(program.descendants())
    {
        let [rss, anonymous, file] = ["VmRSS", "RssAnon", "RssFile"].map(|name| status(id, name));
        println!("{kind}: {rss} resident, {anonymous} of it its own, {file} of files");
    }
    let id = program.id();
    // The helper process of a migration, which is not confined, tracks writes of this process as well.
    let own_maps = fs::read_to_string(format!("/proc/{id}/maps")).unwrap();
    assert!(own_maps.contains("memfd:guest"), "{own_maps}");
    fs::File::open(format!("/proc/{id}/pagemap")).unwrap();
    fs::write(format!("/proc/{id}/clear_refs"), "4").unwrap();
    let is_empty = fs::read_dir(format!("/proc/{id}/root"))
        .unwrap()
        .next()
        .is_none();
    let has_own_network = network(id) != network(std::process::id());
    drop(served);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    let is_permitted = !log.contains("sandbox is not complete");
    assert_eq!((is_empty, has_own_network), (is_permitted, is_permitted));
    // The broker process has removed the sockets.
    assert!(directory.path().read_dir().unwrap().next().is_none());
}

#[test]
fn each_measure_can_be_switched_off() {
    let own = std::process::id();
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &OFF).ready();
    let served = serving(&program);
    let id = program.id();
    for name in ["NoNewPrivs", "Seccomp", "CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(id, name), status(own, name), "{name}");
    }
    assert_eq!(network(id), network(own));
    let root = fs::read_link(format!("/proc/{id}/root")).unwrap();
    assert_eq!(root, fs::read_link("/proc/self/root").unwrap());
    drop(served);
    assert!(program.finish().0.status.success());

    // One is on, and the others are off.
    for (option, value, field, expected) in [
        ("--seccomp", "kill", "Seccomp", "2"),
        ("--no-new-privs", "on", "NoNewPrivs", "1"),
        ("--landlock", "on", "NoNewPrivs", "1"),
        ("--drop-capabilities", "on", "CapPrm", "0000000000000000"),
    ] {
        let mut arguments = OFF;
        let at = arguments.iter().position(|it| *it == option).unwrap();
        arguments[at + 1] = value;
        let directory = tempfile::tempdir().unwrap();
        let program = Program::start(directory.path(), &arguments).ready();
        let served = serving(&program);
        assert_eq!(status(program.id(), field), expected, "{option}");
        drop(served);
        let (output, log) = program.finish();
        assert!(output.status.success(), "{option}: {log}");
    }
}

/// A user namespace in which no further namespaces can be created.
fn without_namespaces() -> Command {
    let script = "for kind in user mnt net; do echo 0 > /proc/sys/user/max_${kind}_namespaces || exit 77; done; exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "sh", "-c", script, "sh"])
        .arg(PROGRAM);
    command
}

fn has_user_namespaces() -> bool {
    let mut command = Command::new("unshare");
    let status = command
        .args(["--user", "--map-root-user", "true"])
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn a_sandbox_that_the_host_forbids_is_an_error_only_if_it_was_asked_for() {
    if !has_user_namespaces() {
        println!("this host forbids user namespaces to the test as well");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--sandbox", "namespace"];
    let command = without_namespaces();
    let program = Program::start_with(command, directory.path(), &arguments, Stdio::piped());
    let (output, log) = program.finish();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(
        log.contains("sandbox cannot be set up: namespaces: "),
        "{log}"
    );
    assert!(directory.path().read_dir().unwrap().next().is_none());

    let command = without_namespaces();
    let program = Program::start_with(command, directory.path(), &[], Stdio::piped()).ready();
    let served = serving(&program);
    assert_eq!(status(program.id(), "Seccomp"), "2");
    drop(served);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    assert!(
        log.contains("sandbox is not complete: namespaces: "),
        "{log}"
    );
}

#[test]
fn without_migration_no_process_has_its_rights() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--migration", "off"]).ready();
    let (_vmm, mut qmp) = serving(&program);
    let stream = directory.path().join("stream");
    let uri = json!({ "uri": format!("file:{}", stream.display()) });
    let (_, why) = qmp.fail("migrate", &uri);
    assert!(why.contains("--migration off"), "{why}");
    let state = directory.path().join("state");
    let (_, why) = qmp.fail("save-device-state", &json!({ "filename": state }));
    assert!(why.contains("--migration off"), "{why}");
    assert!(!stream.exists() && !state.exists());
    program.signal(Signal::TERM);
    assert!(program.finish().0.status.success());
}
