// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of `migrate-vm` as a process that is killed at every step.

mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use balloonctl::migrate_vm::{plan, preflight, Peer};
use common::{check_source_is_whole, fake, listen, Fake, Fault};

/// Runs `migrate-vm` until it and its guard process have ended.
fn run(fake: &Fake, folder: &Path) -> Output {
    let socket = |peer: Peer| fake.path(peer.name());
    for peer in [Peer::Source, Peer::Destination, Peer::Daemon] {
        listen(peer, &fake.state, &socket(peer));
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_balloonctl"));
    command
        .arg("--qmp")
        .arg(socket(Peer::Daemon))
        .args(["--timeout", "600", "migrate-vm", "--to", "unix:/run/ram"])
        .arg("--source-qmp")
        .arg(socket(Peer::Source))
        .arg("--destination-qmp")
        .arg(socket(Peer::Destination))
        .arg("--device-socket")
        .arg(&fake.options.device_socket)
        .args(["--step-limit", "600"])
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(shell) = &fake.options.device_command {
        command.args(["--device-command", shell]);
    }
    let child = {
        // No peer answers before the program is known.
        let mut state = fake.state();
        let child = command.spawn().unwrap();
        state.program = Some(child.id());
        child
    };
    // The guard process has standard error as well, so this waits for both.
    child.wait_with_output().unwrap()
}

#[test]
fn a_program_that_is_killed_at_any_step_leaves_the_guest_running_once() {
    let mut quiet = fake(None, &[]);
    let seen = preflight(&mut quiet.connections, &quiet.options).unwrap();
    let steps = plan(&quiet.options, &seen, "file:/run/vm-state");
    let mut killed = 0;
    for step in steps {
        let Some(command) = step.command else {
            continue;
        };
        let name: &'static str = command.execute.leak();
        let fake = fake(Some(Fault::Kill(step.peer, name)), &[]);
        let folder = tempfile::tempdir().unwrap();
        let output = run(&fake, folder.path());
        let log = String::from_utf8_lossy(&output.stderr);
        let what = format!("{:?} {name}: {log}", step.peer);
        assert_eq!(output.status.code(), None, "{what}");
        assert!(folder.path().read_dir().unwrap().next().is_none(), "{what}");
        if step.is_commit_point {
            assert!(log.contains("guest runs at the destination"), "{what}");
            let state = fake.state();
            assert_eq!(state.destination.status, "running", "{what}");
            assert_eq!(state.source.status, "postmigrate", "{what}");
            assert_eq!(state.count(Peer::Source, "cont"), 0, "{what}");
        } else {
            check_source_is_whole(&fake, &what);
            assert!(fake.state().count(Peer::Source, "cont") <= 1, "{what}");
        }
        killed += 1;
    }
    assert_eq!(killed, 11);
}

/// The destination has not executed the last command, and never will.
#[test]
fn a_program_that_is_killed_before_the_last_command_arrives_leaves_the_guest_at_the_source() {
    let fake = fake(Some(Fault::KillBefore(Peer::Destination, "cont")), &[]);
    let folder = tempfile::tempdir().unwrap();
    let output = run(&fake, folder.path());
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("guest runs at the source again"), "{log}");
    let state = fake.state();
    assert_eq!(state.source.status, "running", "{log}");
    assert_ne!(state.destination.status, "running", "{log}");
}

#[test]
fn nothing_is_undone_after_a_migration() {
    let fake = fake(None, &[]);
    let folder = tempfile::tempdir().unwrap();
    let output = run(&fake, folder.path());
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(!log.contains("guard process"), "{log}");
    let state = fake.state();
    assert_eq!(state.destination.status, "running");
    assert_eq!(state.source.status, "postmigrate");
}

/// The destination daemon outlives the program. A reader of the output of the program sees its end nevertheless.
#[test]
fn the_destination_daemon_does_not_keep_the_output_of_the_program_open() {
    let mut fake = fake(None, &[]);
    let socket = fake.path("late");
    fake.options.device_socket.clone_from(&socket);
    let socket = socket.display();
    // The command ends when the test has ended and its folder is removed.
    fake.options.device_command = Some(format!(
        "touch {socket}; while [ -e {socket} ]; do sleep 1; done"
    ));
    let folder = tempfile::tempdir().unwrap();
    let output = run(&fake, folder.path());
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(
        fake.options.device_socket.exists(),
        "the command has not ended"
    );
}
