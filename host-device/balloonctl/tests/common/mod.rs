// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Simulated peers: two QEMUs and a daemon, which keep their states as the real ones do.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use balloonctl::args::{Args, Command, MigrateVm};
use balloonctl::migrate_vm::{Connections, Peer, QmpCommand};
use clap::Parser;
use qmp_client::Client;
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Value};

/// The fault that is injected.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The peer refuses the first command of this name.
    Refuse(Peer, &'static str),
    /// The peer closes the connection at the first command of this name, and does not execute it.
    HangUp(Peer, &'static str),
    /// The peer executes the command, and closes the connection before it answers.
    HangUpAfter(Peer, &'static str),
    /// The guest refuses to release the balloon.
    Keeps,
    /// The guest does not respond to the unplug request.
    Silent,
    /// Sending memory fails, in the first iterations (`first`) or in the last one (`last`).
    Memory(&'static str),
    /// QEMU's own migration fails at this peer.
    VmState(Peer),
    /// The user presses Ctrl-C when this peer receives this command.
    Interrupt(Peer, &'static str),
    /// The program is killed when this peer receives this command. The peer executes it nevertheless.
    Kill(Peer, &'static str),
    /// The same, but the peer does not execute the command.
    KillBefore(Peer, &'static str),
}

/// The state of a simulated QEMU.
#[derive(Debug, Default)]
pub struct Qemu {
    pub status: &'static str,
    pub devices: BTreeSet<String>,
    pub chardevs: Vec<(String, String)>,
    pub ignores_shared: bool,
    pub vm_state: &'static str,
}

/// The state of all peers.
#[derive(Debug, Default)]
pub struct State {
    pub source: Qemu,
    pub destination: Qemu,
    pub memory: &'static str,
    pub waits: bool,
    /// Every command that changes something, and `query-device-state`.
    pub journal: Vec<(Peer, String, Value)>,
    pub fault: Option<Fault>,
    pub interrupts: balloonctl::interrupt::Interrupts,
    /// Whether the destination's memory is shared, as the migration requires.
    pub destination_share: bool,
    /// How many attempts to plug the balloon in at the source fail because the daemon is busy.
    pub busy: u32,
    /// The program, once it runs as a process.
    pub program: Option<u32>,
}

/// The simulated peers, and the options of the command line for them.
pub struct Fake {
    pub state: Arc<Mutex<State>>,
    pub connections: Connections,
    pub options: MigrateVm,
    pub folder: tempfile::TempDir,
}

pub const SOURCE_SOCKET: &str = "/run/b1";

/// Starts all peers. `more` are further arguments on the command line.
pub fn fake(fault: Option<Fault>, more: &[&str]) -> Fake {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("b2");
    std::fs::write(&socket, "").unwrap();
    let state = State {
        source: Qemu {
            status: "running",
            devices: ["balloon0".to_owned(), "slot0".to_owned()].into(),
            chardevs: vec![("balloon".into(), format!("unix:{SOURCE_SOCKET}"))],
            ..Qemu::default()
        },
        destination: Qemu {
            status: "inmigrate",
            devices: ["slot0".to_owned()].into(),
            ..Qemu::default()
        },
        memory: "none",
        fault,
        destination_share: true,
        ..State::default()
    };
    let state = Arc::new(Mutex::new(state));
    let connections = Connections {
        source: serve(Peer::Source, &state),
        destination: serve(Peer::Destination, &state),
        daemon: serve(Peer::Daemon, &state),
    };
    let options = options(&socket, more);
    Fake {
        state,
        connections,
        options,
        folder,
    }
}

fn options(socket: &Path, more: &[&str]) -> MigrateVm {
    let socket = socket.to_str().unwrap();
    let line = [
        "balloonctl",
        "migrate-vm",
        "--source-qmp",
        "q1",
        "--destination-qmp",
        "q2",
        "--to",
        "unix:/run/ram",
        "--device-socket",
        socket,
    ];
    let args = Args::try_parse_from(line.iter().chain(more)).unwrap();
    match args.command {
        Command::MigrateVm(options) => *options,
        other => panic!("{other:?}"),
    }
}

impl Fake {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Returns the path of a file in the test's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Checks that the guest runs at the source with its balloon, as before.
pub fn check_source_is_whole(fake: &Fake, what: &str) {
    let state = fake.state();
    let source = &state.source;
    assert_eq!(source.status, "running", "{what}");
    assert!(source.devices.contains("balloon0"), "{what}: {source:?}");
    let chardev = ("balloon".to_owned(), format!("unix:{SOURCE_SOCKET}"));
    assert_eq!(source.chardevs, [chardev], "{what}");
    assert!(!source.ignores_shared, "{what}");
    assert_ne!(state.destination.status, "running", "{what}");
    let over = ["none", "failed", "cancelled", "completed"];
    assert!(over.contains(&state.memory), "{what}: {}", state.memory);
    assert_eq!(
        state.count(Peer::Destination, "cont"),
        usize::from(what.contains("Destination, \"cont\""))
    );
}

impl State {
    /// Returns the commands of the journal, in the form that a plan has.
    pub fn commands(&self) -> Vec<(Peer, QmpCommand)> {
        let commands = self.journal.iter().map(|(peer, name, arguments)| {
            let command = QmpCommand {
                execute: name.clone(),
                arguments: arguments.clone(),
            };
            (*peer, command)
        });
        commands.collect()
    }

    /// Returns how often a peer received a command.
    pub fn count(&self, peer: Peer, name: &str) -> usize {
        let same = |entry: &&(Peer, String, Value)| entry.0 == peer && entry.1 == name;
        self.journal.iter().filter(same).count()
    }
}

/// Serves a peer at the socket `path`, to any number of clients.
pub fn listen(peer: Peer, state: &Arc<Mutex<State>>, path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    let state = state.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            answer_all(peer, &state, stream.unwrap());
        }
    });
}

fn serve(peer: Peer, state: &Arc<Mutex<State>>) -> Client {
    let (near, far) = UnixStream::pair().unwrap();
    answer_all(peer, state, far);
    let peer = format!("the {}", peer.name());
    Client::from_stream(near, &peer, Duration::from_secs(600)).unwrap()
}

fn answer_all(peer: Peer, state: &Arc<Mutex<State>>, far: UnixStream) {
    let state = state.clone();
    thread::spawn(move || {
        let mut output = far.try_clone().unwrap();
        let _ = writeln!(output, r#"{{"QMP": {{}}}}"#);
        for line in BufReader::new(far).lines() {
            let Ok(line) = line else { break };
            let command: Value = serde_json::from_str(&line).unwrap();
            let name = command["execute"].as_str().unwrap();
            let (answer, events) = answer(&state, peer, name, &command["arguments"]);
            let mut answer = match answer {
                Answer::Given(value) => json!({ "return": value }),
                Answer::Refused(why) => {
                    json!({ "error": { "class": "GenericError", "desc": why } })
                }
                Answer::HangUp => break,
            };
            answer["id"] = command["id"].clone();
            let _ = writeln!(output, "{answer}");
            for event in events {
                let _ = writeln!(output, "{event}");
            }
        }
    });
}

enum Answer {
    Given(Value),
    Refused(String),
    HangUp,
}

fn answer(state: &Mutex<State>, peer: Peer, name: &str, arguments: &Value) -> (Answer, Vec<Value>) {
    let mut state = state.lock().unwrap();
    let query = name.starts_with("query-") || name.starts_with("qom-");
    if !query && name != "qmp_capabilities" && name != "device-list-properties"
        || name == "query-device-state"
    {
        let entry = (peer, name.to_owned(), arguments.clone());
        state.journal.push(entry);
    }
    match state.fault.clone() {
        Some(Fault::Refuse(whom, what)) if (whom, what) == (peer, name) => {
            state.fault = None;
            return (Answer::Refused("I will not".into()), Vec::new());
        }
        Some(Fault::HangUp(whom, what)) if (whom, what) == (peer, name) => {
            return (Answer::HangUp, Vec::new());
        }
        Some(Fault::Interrupt(whom, what)) if (whom, what) == (peer, name) => {
            state.fault = None;
            state.interrupts.add();
        }
        Some(Fault::Kill(whom, what)) if (whom, what) == (peer, name) => {
            state.fault = None;
            let program = state.program.and_then(|it| i32::try_from(it).ok());
            kill_process(program.and_then(Pid::from_raw).unwrap(), Signal::KILL).unwrap();
        }
        Some(Fault::KillBefore(whom, what)) if (whom, what) == (peer, name) => {
            state.fault = None;
            let program = state.program.and_then(|it| i32::try_from(it).ok());
            kill_process(program.and_then(Pid::from_raw).unwrap(), Signal::KILL).unwrap();
            return (Answer::HangUp, Vec::new());
        }
        _ => {}
    }
    let mut events = Vec::new();
    let given = match peer {
        Peer::Daemon => daemon(&mut state, name, arguments),
        _ => qemu(&mut state, peer, name, arguments, &mut events),
    };
    if state.fault.as_ref().is_some_and(
        |fault| matches!(fault, Fault::HangUpAfter(whom, what) if (*whom, *what) == (peer, name)),
    ) {
        return (Answer::HangUp, Vec::new());
    }
    match given {
        Ok(value) => (Answer::Given(value), events),
        Err(why) => (Answer::Refused(why), events),
    }
}

fn daemon(state: &mut State, name: &str, arguments: &Value) -> Result<Value, String> {
    let ends_badly =
        |at: &str| state.fault == Some(Fault::Memory(if at == "first" { "first" } else { "last" }));
    match name {
        "migrate" => {
            let waits = &arguments["capabilities"][0];
            assert_eq!(waits["capability"], "pause-before-switchover");
            state.waits = waits["state"] == true;
            state.memory = "active";
        }
        "migrate-continue" if state.memory == "pre-switchover" => {
            assert_eq!(arguments["state"], "pre-switchover");
            assert!(state.source.status != "running", "the guest is not paused");
            state.memory = "device";
        }
        "migrate-cancel" if state.memory != "completed" => state.memory = "cancelling",
        "query-device-state" => return Ok(json!({ "device": "virtio-balloon", "poison-val": 7 })),
        "query-migrate" => {
            let now = state.memory;
            // The state advances with each query.
            state.memory = match now {
                "active" if ends_badly("first") => "failed",
                "active" if state.waits => "pre-switchover",
                "device" if ends_badly("last") => "failed",
                "active" | "device" => "completed",
                "cancelling" => "cancelled",
                now => now,
            };
            let why = (now == "failed").then_some("receiver has disconnected");
            let mut answer = json!({ "status": now, "ram": { "transferred": 1 << 20 } });
            if let Some(why) = why {
                answer["error-desc"] = why.into();
            }
            return Ok(answer);
        }
        "qmp_capabilities" => {}
        other => return Err(format!("The command {other} has not been found")),
    }
    Ok(json!({}))
}

fn qemu(
    state: &mut State,
    peer: Peer,
    name: &str,
    arguments: &Value,
    events: &mut Vec<Value>,
) -> Result<Value, String> {
    let fault = state.fault.clone();
    let share = peer == Peer::Source || state.destination_share;
    let source = peer == Peer::Source;
    let (memory, busy) = (state.memory, state.busy);
    let here = if source {
        &mut state.source
    } else {
        &mut state.destination
    };
    let id = arguments["id"].as_str().unwrap_or_default().to_owned();
    match name {
        "query-status" => {
            return Ok(json!({ "status": here.status, "running": here.status == "running" }))
        }
        "qom-list" => {
            return Ok(json!([
                { "name": "type", "type": "string" },
                { "name": "mem", "type": "child<memory-backend-file>" },
                { "name": "io0", "type": "child<iothread>" },
            ]))
        }
        "qom-get" => return qom_get(here, arguments, share),
        "device-list-properties" => {
            return Ok(json!([
                { "name": "virtio-id", "type": "uint16", "default-value": 0 },
                { "name": "num_vqs", "type": "uint32", "default-value": 1 },
                { "name": "chardev", "type": "str" },
                { "name": "addr", "type": "str", "default-value": -1 },
                { "name": "event_idx", "type": "bool", "default-value": true },
                { "name": "packed", "type": "bool", "default-value": false },
            ]))
        }
        "query-migrate-capabilities" => {
            return Ok(json!([
                { "capability": "xbzrle", "state": true },
                { "capability": "x-ignore-shared", "state": here.ignores_shared },
            ]))
        }
        "query-chardev" => {
            let all = here.chardevs.iter();
            return Ok(all
                .map(|(label, filename)| json!({ "label": label, "filename": filename }))
                .collect());
        }
        "query-migrate" => {
            let now = here.vm_state;
            here.vm_state = match now {
                "active" if fault == Some(Fault::VmState(peer)) => "failed",
                "active" => "completed",
                now => now,
            };
            if now == "completed" {
                here.status = if source { "postmigrate" } else { "paused" };
            }
            return Ok(match now {
                "" => json!({}),
                "failed" => json!({ "status": now, "error-desc": "no space left" }),
                now => json!({ "status": now }),
            });
        }
        "migrate-set-capabilities" => {
            assert_eq!(
                arguments["capabilities"][0]["capability"],
                "x-ignore-shared"
            );
            here.ignores_shared = arguments["capabilities"][0]["state"] == true;
        }
        "migrate" => {
            assert!(here.ignores_shared && here.status == "paused" && memory == "completed");
            assert!(!here.devices.contains("balloon0"), "QEMU cannot migrate it");
            here.vm_state = "active";
        }
        "migrate-incoming" => {
            assert!(here.ignores_shared && here.status == "inmigrate");
            here.vm_state = "active";
        }
        "migrate_cancel" => here.vm_state = "cancelled",
        "stop" => here.status = "paused",
        "cont" => here.status = "running",
        "device_del" => match fault {
            Some(Fault::Keeps) => events
                .push(json!({ "event": "DEVICE_UNPLUG_GUEST_ERROR", "data": { "device": id } })),
            Some(Fault::Silent) => {}
            _ => {
                here.devices.remove(&id);
                let path = format!("/machine/peripheral/{id}/virtio-backend");
                events.push(json!({ "event": "DEVICE_DELETED", "data": { "path": path } }));
                events.push(json!({ "event": "DEVICE_DELETED", "data": { "device": id } }));
            }
        },
        "device_add" if source && busy > 0 => {
            state.busy -= 1;
            return Err("vhost_backend_init failed: Protocol error".into());
        }
        "device_add" => {
            let chardev = arguments["chardev"].as_str().unwrap_or_default();
            if !here.chardevs.iter().any(|(label, _)| label == chardev) {
                return Err(format!("Chardev '{chardev}' not found"));
            }
            assert_eq!(arguments["driver"], "vhost-user-test-device-pci");
            assert_eq!(
                (&arguments["virtio-id"], &arguments["num_vqs"]),
                (&json!(5), &json!(5))
            );
            assert!(arguments.get("event_idx").is_none() && arguments.get("addr").is_none());
            here.devices.insert(id);
        }
        "chardev-add" => {
            let path = arguments["backend"]["data"]["addr"]["data"]["path"].as_str();
            let filename = format!("unix:{}", path.unwrap());
            here.chardevs.push((id, filename));
        }
        "chardev-remove" => {
            let there = here.chardevs.len();
            here.chardevs.retain(|(label, _)| *label != id);
            if here.chardevs.len() == there {
                return Err(format!("Chardev '{id}' not found"));
            }
        }
        "qmp_capabilities" | "quit" => {}
        other => return Err(format!("The command {other} has not been found")),
    }
    Ok(json!({}))
}

fn qom_get(here: &Qemu, arguments: &Value, share: bool) -> Result<Value, String> {
    let path = arguments["path"].as_str().unwrap();
    let property = arguments["property"].as_str().unwrap();
    if path == "/objects/mem" {
        return match property {
            "share" => Ok(share.into()),
            "size" => Ok((512u64 << 20).into()),
            _ => Err("no such property".into()),
        };
    }
    let id = path
        .strip_prefix("/machine/peripheral/")
        .unwrap_or_default();
    if !here.devices.contains(id) {
        return Err(format!("Device '{path}' not found"));
    }
    Ok(match (id, property) {
        ("slot0", "type") => "pcie-root-port".into(),
        (_, "type") => "vhost-user-test-device-pci".into(),
        (_, "chardev") => "balloon".into(),
        (_, "parent_bus") => "/machine/peripheral/slot0/slot0".into(),
        (_, "virtio-id" | "num_vqs") => 5.into(),
        (_, "addr") => 0.into(),
        (_, "event_idx" | "packed") => false.into(),
        _ => return Err("no such property".into()),
    })
}
