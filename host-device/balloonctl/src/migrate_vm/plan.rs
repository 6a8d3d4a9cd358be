// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All that will be done, before any of it is.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_migration::status::MigrationStatus;
use serde::Serialize;
use serde_json::{json, Map, Value};

use super::preflight::Preflight;
use super::rollback::RollbackAction;
use crate::args::MigrateVm;
use crate::commands::migrate::parameters;

/// Whom a command is given to.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// The QEMU that runs the guest.
    Source,
    /// The QEMU that waits for it.
    Destination,
    /// Our daemon at the source.
    Daemon,
    /// This program.
    Here,
}

impl Peer {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Daemon => "daemon",
            Self::Here => "here",
        }
    }
}

/// A QMP command.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QmpCommand {
    /// Its name.
    pub execute: String,
    /// Its arguments.
    pub arguments: Value,
}

/// What a step waits for.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WaitCondition {
    /// The answer.
    Answered,
    /// The answer, which is written into a file.
    Written(PathBuf),
    /// The guest has let this device go.
    Unplugged(String),
    /// The guest runs, or does not.
    Running(bool),
    /// The daemon's migration is in this state.
    Memory(#[serde(serialize_with = "name")] MigrationStatus),
    /// QEMU's migration has completed.
    VmState,
    /// This socket is there, after the command, if any, was run in a shell.
    Listening {
        /// The socket.
        socket: PathBuf,
        /// The command.
        shell: Option<String>,
    },
}

fn name<S: serde::Serializer>(state: &MigrationStatus, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// One of the things to do.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Step {
    /// By whom.
    #[serde(rename = "side")]
    pub peer: Peer,
    /// What it is for.
    pub what: String,
    /// The command.
    #[serde(rename = "order")]
    pub command: Option<QmpCommand>,
    /// What it waits for.
    pub until: WaitCondition,
    /// The most time that this may take; `None` where the guest's work decides.
    #[serde(skip)]
    pub timeout: Option<Duration>,
    /// How it is undone, should it or a later one fail.
    #[serde(skip)]
    pub rollback: Option<RollbackAction>,
    /// Whether nothing is undone once this was not refused.
    #[serde(skip)]
    pub is_commit_point: bool,
}

/// The capability by which QEMU leaves out memory in shared files.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// The capability by which the daemon waits before the last of memory.
pub const PAUSE_BEFORE_SWITCHOVER: &str = "pause-before-switchover";

/// The command that sets a capability.
#[must_use]
pub fn set_capability(name: &str, state: bool) -> QmpCommand {
    let one = json!({ "capability": name, "state": state });
    command("migrate-set-capabilities", json!({ "capabilities": [one] }))
}

fn command(name: &str, arguments: Value) -> QmpCommand {
    QmpCommand {
        execute: name.to_owned(),
        arguments,
    }
}

/// The command that connects a chardev to a daemon.
pub(super) fn chardev_add(id: &str, socket: &Path) -> QmpCommand {
    let address = json!({ "type": "unix", "data": { "path": socket } });
    let data = json!({ "addr": address, "server": false });
    let backend = json!({ "type": "socket", "data": data });
    command("chardev-add", json!({ "id": id, "backend": backend }))
}

/// The command that plugs the balloon in.
pub(super) fn device_add(device: &Map<String, Value>, bus: &str, chardev: &str) -> QmpCommand {
    let mut device = device.clone();
    device.insert("bus".into(), bus.into());
    device.insert("chardev".into(), chardev.into());
    command("device_add", device.into())
}

/// A plan in the making.
struct PlanBuilder {
    timeout: Duration,
    steps: Vec<Step>,
}

impl PlanBuilder {
    /// A step that ends with its answer; what it returns can be changed.
    fn step(
        &mut self,
        peer: Peer,
        what: &str,
        command: Option<QmpCommand>,
        until: WaitCondition,
    ) -> StepBuilder<'_> {
        self.steps.push(Step {
            peer,
            what: what.to_owned(),
            command,
            until,
            timeout: Some(self.timeout),
            rollback: None,
            is_commit_point: false,
        });
        StepBuilder(self.steps.last_mut())
    }
}

struct StepBuilder<'a>(Option<&'a mut Step>);

impl<'a> StepBuilder<'a> {
    fn change(mut self, change: impl FnOnce(&mut Step)) -> StepBuilder<'a> {
        if let Some(step) = self.0.as_mut() {
            change(step);
        }
        self
    }

    fn rollback(self, rollback: RollbackAction) -> StepBuilder<'a> {
        self.change(|step| step.rollback = Some(rollback))
    }

    fn without_timeout(self) -> StepBuilder<'a> {
        self.change(|step| step.timeout = None)
    }
}

/// Every step, with QEMU's own state going to `vm_state`.
#[must_use]
pub fn plan(options: &MigrateVm, preflight: &Preflight, vm_state: &str) -> Vec<Step> {
    use Peer::{Daemon, Destination, Here, Source};
    let mut plan = PlanBuilder {
        timeout: Duration::from_secs(options.step_limit),
        steps: Vec::new(),
    };
    for peer in [Destination, Source] {
        let what = "leave guest memory out of QEMU's own migration";
        let set = set_capability(IGNORE_SHARED, true);
        let back = RollbackAction::RestoreCapability(peer, set_capability(IGNORE_SHARED, false));
        plan.step(peer, what, Some(set), WaitCondition::Answered)
            .rollback(back);
    }
    let back =
        RollbackAction::RestoreCapability(Daemon, set_capability(PAUSE_BEFORE_SWITCHOVER, false));
    let set = set_capability(PAUSE_BEFORE_SWITCHOVER, true);
    let what = "have memory's migration wait before its last round";
    plan.step(Daemon, what, Some(set), WaitCondition::Answered)
        .rollback(back);
    let set = command(
        "migrate-set-parameters",
        parameters(&options.migration_parameters).into(),
    );
    let what = "set how memory is sent";
    plan.step(Daemon, what, Some(set), WaitCondition::Answered);
    let send = command("migrate", json!({ "uri": options.to }));
    let until = WaitCondition::Memory(MigrationStatus::PreSwitchover);
    plan.step(
        Daemon,
        "send memory while the guest runs",
        Some(send),
        until,
    )
    .rollback(RollbackAction::CancelMemory)
    .without_timeout();
    if let Some(file) = &options.device_state {
        let ask = command("query-device-state", json!({}));
        let what = "save the state of the balloon";
        plan.step(
            Daemon,
            what,
            Some(ask),
            WaitCondition::Written(file.clone()),
        );
    }
    let listening = WaitCondition::Listening {
        socket: options.device_socket.clone(),
        shell: options.device_command.clone(),
    };
    let what = "see that the destination's daemon listens";
    plan.step(Here, what, None, listening)
        .rollback(RollbackAction::TerminateShell);
    let pull = command("device_del", json!({ "id": options.device }));
    let until = WaitCondition::Unplugged(options.device.clone());
    plan.step(Source, "unplug the balloon", Some(pull), until)
        .rollback(RollbackAction::PlugBalloon);
    let stop = command("stop", json!({}));
    plan.step(
        Source,
        "stop the guest",
        Some(stop),
        WaitCondition::Running(false),
    )
    .rollback(RollbackAction::ResumeGuest);
    let migrate_continue = command(
        "migrate-continue",
        json!({ "state": MigrationStatus::PreSwitchover.name() }),
    );
    let until = WaitCondition::Memory(MigrationStatus::Completed);
    plan.step(
        Daemon,
        "send the rest of memory",
        Some(migrate_continue),
        until,
    )
    .without_timeout();
    migrate_vm_state(&mut plan, vm_state);
    let (bus, chardev) = (&preflight.destination_bus, &preflight.destination_chardev);
    let connect = chardev_add(chardev, &options.device_socket);
    let what = "connect to the destination's daemon";
    plan.step(Destination, what, Some(connect), WaitCondition::Answered);
    let plug = device_add(&preflight.device, bus, chardev);
    plan.step(
        Destination,
        "plug the balloon in",
        Some(plug),
        WaitCondition::Answered,
    );
    let run = command("cont", json!({}));
    plan.step(
        Destination,
        "let the guest go on",
        Some(run),
        WaitCondition::Running(true),
    )
    .change(|step| step.is_commit_point = true);
    if options.quit_source {
        let quit = command("quit", json!({}));
        plan.step(
            Source,
            "end the source",
            Some(quit),
            WaitCondition::Answered,
        );
    }
    plan.steps
}

/// A file is written and then read; anything else needs a listener first.
fn migrate_vm_state(plan: &mut PlanBuilder, uri: &str) {
    use Peer::{Destination, Source};
    let send = command("migrate", json!({ "uri": uri }));
    let receive = command(
        "migrate-incoming",
        json!({ "uri": uri, "exit-on-error": false }),
    );
    let (sending, receiving) = ("save the state of QEMU's devices", "load it");
    if uri.starts_with("file:") {
        plan.step(Source, sending, Some(send), WaitCondition::VmState)
            .rollback(RollbackAction::CancelVmState);
        plan.step(
            Destination,
            receiving,
            Some(receive),
            WaitCondition::VmState,
        );
    } else {
        let what = "listen for the state of QEMU's devices";
        plan.step(Destination, what, Some(receive), WaitCondition::Answered);
        plan.step(Source, sending, Some(send), WaitCondition::VmState)
            .rollback(RollbackAction::CancelVmState);
        plan.step(Destination, receiving, None, WaitCondition::VmState);
    }
}

/// A plan for people.
#[must_use]
pub fn describe(steps: &[Step]) -> String {
    let mut text = String::new();
    for (step, number) in steps.iter().zip(1u32..) {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{number:2}. {}: {}", step.peer.name(), step.what);
        if let Some(command) = &step.command {
            let (name, arguments) = (&command.execute, &command.arguments);
            let execute = Value::from(name.as_str());
            let _ = writeln!(
                text,
                "    {{\"execute\": {execute}, \"arguments\": {arguments}}}"
            );
        }
        let until = match &step.until {
            WaitCondition::Answered => None,
            WaitCondition::Written(path) => Some(format!("write the answer to {}", path.display())),
            WaitCondition::Unplugged(id) => {
                Some(format!("wait for the event DEVICE_DELETED of {id}"))
            }
            WaitCondition::Running(true) => {
                Some("wait until query-status says that it runs".into())
            }
            WaitCondition::Running(false) => {
                Some("wait until query-status says that it is paused".into())
            }
            WaitCondition::Memory(state) => {
                Some(format!("wait until query-migrate says {}", state.name()))
            }
            WaitCondition::VmState => Some("wait until query-migrate says completed".into()),
            WaitCondition::Listening { socket, shell } => {
                if let Some(shell) = shell {
                    let _ = writeln!(text, "    run: {shell}");
                }
                Some(format!("wait for the socket {}", socket.display()))
            }
        };
        if let Some(until) = until {
            let _ = writeln!(text, "    {until}");
        }
        if step.is_commit_point {
            let _ = writeln!(
                text,
                "    from here on nothing is undone: the guest is at the destination"
            );
        }
    }
    text
}
