// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of `migrate-vm` with peers that fail at every step.

mod common;

use balloonctl::error::CommandError;
use balloonctl::migrate_vm::{
    execute, plan, preflight, MigrationSummary, Peer, RollbackGuard, Step,
};
use balloonctl::output::Output;
use common::{check_source_is_whole, fake, Fake, Fault};
use serde_json::{json, Value};

const VM_STATE: &str = "file:/run/vm-state";

fn steps(fake: &mut Fake, vm_state: &str) -> Vec<Step> {
    let seen = preflight(&mut fake.connections, &fake.options).unwrap();
    plan(&fake.options, &seen, vm_state)
}

fn migrate(fake: &mut Fake, vm_state: &str) -> Result<MigrationSummary, CommandError> {
    let seen = preflight(&mut fake.connections, &fake.options)?;
    let steps = plan(&fake.options, &seen, vm_state);
    let interrupts = fake.state().interrupts.clone();
    let mut output = Output::new(true);
    execute(
        &mut fake.connections,
        &seen,
        &steps,
        RollbackGuard::default(),
        &interrupts,
        &mut output,
    )
}

#[test]
fn a_guest_is_migrated_by_exactly_the_commands_of_the_plan() {
    let mut fake = fake(None, &["--max-bandwidth", "100M", "--quit-source"]);
    let steps = steps(&mut fake, VM_STATE);
    assert!(fake.state().journal.is_empty(), "to look changes nothing");
    let done = migrate(&mut fake, VM_STATE).unwrap();
    assert_eq!(done.steps.len(), steps.len());
    let planned: Vec<_> = steps
        .iter()
        .filter_map(|step| Some((step.peer, step.command.clone()?)))
        .collect();
    let state = fake.state();
    assert_eq!(state.commands(), planned);
    assert_eq!(state.source.status, "postmigrate");
    assert_eq!(state.destination.status, "running");
    assert!(state.destination.devices.contains("balloon0"));
    let waits = json!([{ "capability": "pause-before-switchover", "state": true }]);
    assert_eq!(
        planned[2].1.arguments,
        json!({
            "uri": "unix:/run/ram", "parameters": { "max-bandwidth": 100 << 20 }, "capabilities": waits,
        })
    );
    let plugged = planned
        .iter()
        .find(|(_, command)| command.execute == "device_add");
    assert_eq!(
        plugged.unwrap().1.arguments,
        json!({
            "driver": "vhost-user-test-device-pci", "id": "balloon0", "bus": "slot0",
            "chardev": "balloon", "virtio-id": 5, "num_vqs": 5,
        })
    );
}

#[test]
fn a_listener_is_there_before_what_is_sent_to_it() {
    let mut fake = fake(None, &[]);
    migrate(&mut fake, "unix:/run/state").unwrap();
    let state = fake.state();
    let place = |peer, name: &str| {
        let found = |entry: &(Peer, String, Value)| entry.0 == peer && entry.1 == name;
        state.journal.iter().position(found).unwrap()
    };
    assert!(place(Peer::Destination, "migrate-incoming") < place(Peer::Source, "migrate"));
}

#[test]
fn the_state_of_the_balloon_is_written_for_the_fresh_daemon() {
    let mut fake = fake(None, &[]);
    let file = fake.path("state");
    fake.options.device_state = Some(file.clone());
    // The command creates the socket as a copy of the state file, so the file must be written before the command runs.
    let socket = fake.path("late");
    fake.options.device_socket.clone_from(&socket);
    let (from, to) = (file.display(), socket.display());
    // The command ends when the test has ended and its folder is removed.
    let lives = format!("while [ -e {to} ]; do sleep 1; done");
    fake.options.device_command = Some(format!("cp {from} {to}; {lives}"));
    migrate(&mut fake, VM_STATE).unwrap();
    let state: Value = serde_json::from_slice(&std::fs::read(socket).unwrap()).unwrap();
    assert_eq!(state["poison-val"], 7);
}

#[test]
fn whatever_is_refused_the_guest_goes_on_at_the_source() {
    let mut quiet = fake(None, &["--downtime-limit", "100"]);
    let mut seen = 0;
    for step in steps(&mut quiet, VM_STATE) {
        let Some(command) = step.command else {
            continue;
        };
        let name: &'static str = command.execute.clone().leak();
        // A later pass of the loop tries the same command of the other QEMU.
        let fault = Fault::Refuse(step.peer, name);
        let mut fake = fake(Some(fault.clone()), &["--downtime-limit", "100"]);
        let error = migrate(&mut fake, VM_STATE).unwrap_err();
        let what = format!("{fault:?}: {}", error.full_message());
        assert_eq!(error.exit_status(), 1, "{what}");
        assert!(error.full_message().contains("I will not"), "{what}");
        check_source_is_whole(&fake, &what);
        seen += 1;
    }
    assert_eq!(seen, 11);
}

#[test]
fn whatever_fails_on_the_way_the_guest_goes_on_at_the_source() {
    let cases = [
        (Fault::Memory("first"), "receiver has disconnected"),
        (Fault::Memory("last"), "receiver has disconnected"),
        (Fault::VmState(Peer::Source), "no space left"),
        (Fault::VmState(Peer::Destination), "no space left"),
        (Fault::Keeps, "still plugged in"),
        (
            Fault::HangUp(Peer::Destination, "migrate-incoming"),
            "closed the connection",
        ),
        (
            Fault::HangUp(Peer::Destination, "device_add"),
            "closed the connection",
        ),
    ];
    for (fault, words) in cases {
        let mut fake = fake(Some(fault.clone()), &[]);
        let error = migrate(&mut fake, VM_STATE).unwrap_err();
        let what = format!("{fault:?}: {}", error.full_message());
        assert!(error.full_message().contains(words), "{what}");
        check_source_is_whole(&fake, &what);
    }
}

/// What the user has set in a QEMU stays set.
#[test]
fn a_capability_that_was_set_before_is_not_reset() {
    let mut fake = fake(Some(Fault::VmState(Peer::Source)), &[]);
    fake.state().source.ignores_shared = true;
    migrate(&mut fake, VM_STATE).unwrap_err();
    let state = fake.state();
    assert!(state.source.ignores_shared);
    assert!(!state.destination.ignores_shared);
}

#[test]
fn a_daemon_that_is_not_ready_yet_is_asked_again() {
    let mut fake = fake(Some(Fault::VmState(Peer::Source)), &[]);
    fake.state().busy = 3;
    let error = migrate(&mut fake, VM_STATE).unwrap_err();
    assert_eq!(error.exit_status(), 1, "{}", error.full_message());
    assert_eq!(fake.state().count(Peer::Source, "device_add"), 4);
    check_source_is_whole(&fake, "busy");
}

#[test]
fn a_guest_that_does_not_let_the_balloon_go_keeps_it() {
    let mut fake = fake(Some(Fault::Silent), &["--step-limit", "0"]);
    let error = migrate(&mut fake, VM_STATE).unwrap_err();
    assert_eq!(error.exit_status(), 5, "{}", error.full_message());
    assert!(error.full_message().contains("did not release 'balloon0'"));
    check_source_is_whole(&fake, "silent");
}

#[test]
fn ctrl_c_brings_the_guest_back() {
    let cases = [
        (Peer::Destination, "migrate-set-capabilities"),
        (Peer::Daemon, "migrate"),
        (Peer::Source, "device_del"),
        (Peer::Source, "stop"),
        (Peer::Daemon, "migrate-continue"),
        (Peer::Source, "migrate"),
        (Peer::Destination, "device_add"),
    ];
    for (peer, name) in cases {
        let mut fake = fake(Some(Fault::Interrupt(peer, name)), &[]);
        let error = migrate(&mut fake, VM_STATE).unwrap_err();
        let what = format!("{peer:?} {name}: {}", error.full_message());
        assert_eq!(error.exit_status(), 4, "{what}");
        check_source_is_whole(&fake, &what);
    }
}

#[test]
fn a_guest_that_may_run_at_the_destination_is_not_let_go_on_at_the_source() {
    for fault in [
        Fault::HangUp(Peer::Destination, "cont"),
        Fault::HangUpAfter(Peer::Destination, "cont"),
    ] {
        let mut fake = fake(Some(fault.clone()), &[]);
        let error = migrate(&mut fake, VM_STATE).unwrap_err();
        assert_eq!(
            error.exit_status(),
            7,
            "{fault:?}: {}",
            error.full_message()
        );
        let state = fake.state();
        assert_eq!(state.source.status, "postmigrate", "{fault:?}");
        assert_eq!(state.count(Peer::Source, "cont"), 0, "{fault:?}");
    }
}

#[test]
fn once_it_runs_at_the_destination_nothing_is_undone() {
    let fault = Fault::Refuse(Peer::Source, "quit");
    let mut fake = fake(Some(fault), &["--quit-source"]);
    let error = migrate(&mut fake, VM_STATE).unwrap_err();
    assert_eq!(error.exit_status(), 7);
    assert!(error
        .full_message()
        .starts_with("guest runs at the destination"));
    assert_eq!(fake.state().source.status, "postmigrate");
}

#[test]
fn what_cannot_be_undone_is_said() {
    let fault = Fault::HangUp(Peer::Source, "migrate");
    let mut fake = fake(Some(fault), &[]);
    let error = migrate(&mut fake, VM_STATE).unwrap_err();
    let full_message = error.full_message();
    assert_eq!(error.exit_status(), 7, "{full_message}");
    for words in [
        "resuming the guest at the source",
        "plugging in the balloon again",
    ] {
        assert!(full_message.contains(words), "{full_message}");
    }
}

#[test]
fn a_guest_that_cannot_be_migrated_is_left_unchanged() {
    let mut fake = fake(None, &["--device", "other", "--bus", "nowhere"]);
    {
        let mut state = fake.state();
        state.source.status = "paused";
        state.destination.status = "running";
        state.destination_share = false;
    }
    fake.options.to = "file:/tmp/ram".into();
    let full_message = migrate(&mut fake, VM_STATE).unwrap_err().full_message();
    for words in [
        "nothing was changed",
        "source is paused",
        "destination is running",
        "'mem' of the destination must be a memory-backend-file with share=on",
        "no vhost-user device 'other'",
        "not 'file:/tmp/ram'",
    ] {
        assert!(full_message.contains(words), "{full_message}");
    }
    fake.options.device = "balloon0".into();
    let full_message = migrate(&mut fake, VM_STATE).unwrap_err().full_message();
    assert!(full_message.contains("no slot 'nowhere'"), "{full_message}");
    assert!(fake.state().journal.is_empty());
}
