// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The plan: all steps of a migration, before any of them is executed.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use guest_migration::status::MigrationStatus;
use serde::Serialize;
use serde_json::{json, Value};

use super::peer::Peer;
use super::preflight::{Preflight, IGNORE_SHARED};
use super::qmp_command::{chardev_add, command, device_add, set_capability, QmpCommand};
use super::rollback_action::RollbackAction;
use crate::args::MigrateVm;
use crate::migration_parameters::migrate_arguments;

/// The condition that ends a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WaitCondition {
    /// The command was answered.
    Answered,
    /// The command was answered, and the answer is written to this file.
    Written(PathBuf),
    /// The guest has released the device with this id.
    Unplugged(String),
    /// The guest runs, or is paused.
    Running(bool),
    /// The daemon's migration is in this state.
    Memory(#[serde(serialize_with = "name")] MigrationStatus),
    /// QEMU's migration has completed.
    VmState,
    /// This socket exists, after the shell command, if any, was started.
    Listening {
        /// Path of the socket.
        socket: PathBuf,
        /// The shell command.
        shell: Option<String>,
    },
}

fn name<S: serde::Serializer>(state: &MigrationStatus, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// One step of the plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Step {
    /// The peer that executes the step.
    #[serde(rename = "side")]
    pub peer: Peer,
    /// The purpose of the step.
    pub what: String,
    /// The command.
    #[serde(rename = "order")]
    pub command: Option<QmpCommand>,
    /// The condition that ends the step.
    pub until: WaitCondition,
    /// Timeout of the step. `None` if its duration depends on the work of the guest.
    #[serde(skip)]
    pub timeout: Option<Duration>,
    /// The action that undoes the step if this step or a later one fails.
    #[serde(skip)]
    pub rollback: Option<RollbackAction>,
    /// Whether nothing is undone once the peer may have executed the command of this step.
    #[serde(skip)]
    pub is_commit_point: bool,
}

/// Collects the steps of a plan.
struct PlanBuilder {
    timeout: Duration,
    steps: Vec<Step>,
}

impl PlanBuilder {
    /// Adds a step that has the default timeout. The returned builder can change it.
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

/// Returns all steps of the migration. QEMU's own state goes to `vm_state`.
#[must_use]
pub fn plan(options: &MigrateVm, preflight: &Preflight, vm_state: &str) -> Vec<Step> {
    use Peer::{Daemon, Destination, Here, Source};
    let mut plan = PlanBuilder {
        timeout: Duration::from_secs(options.step_limit),
        steps: Vec::new(),
    };
    for peer in [Destination, Source] {
        let what = "exclude guest memory from QEMU's migration";
        let set = set_capability(IGNORE_SHARED, true);
        // A capability that was set before stays set.
        let back = (!preflight.ignores_shared.contains(&peer))
            .then(|| RollbackAction::RestoreCapability(peer, set_capability(IGNORE_SHARED, false)));
        plan.step(peer, what, Some(set), WaitCondition::Answered)
            .change(|step| step.rollback = back);
    }
    let arguments = migrate_arguments(&options.to, &options.migration_parameters, true);
    let send = command("migrate", arguments.into());
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
        let what = "save the state of the balloon device";
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
    let what = "wait until the destination daemon listens";
    plan.step(Here, what, None, listening)
        .rollback(RollbackAction::TerminateShell);
    let pull = command("device_del", json!({ "id": options.device }));
    let until = WaitCondition::Unplugged(options.device.clone());
    plan.step(Source, "unplug the balloon", Some(pull), until)
        .rollback(RollbackAction::PlugBalloon);
    let stop = command("stop", json!({}));
    plan.step(
        Source,
        "pause the guest",
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
        "send the remaining memory",
        Some(migrate_continue),
        until,
    )
    .without_timeout();
    migrate_vm_state(&mut plan, vm_state);
    let (bus, chardev) = (&preflight.destination_bus, &preflight.destination_chardev);
    let connect = chardev_add(chardev, &options.device_socket);
    let what = "connect to the destination daemon";
    plan.step(Destination, what, Some(connect), WaitCondition::Answered);
    let plug = device_add(&preflight.device, bus, chardev);
    plan.step(
        Destination,
        "plug in the balloon",
        Some(plug),
        WaitCondition::Answered,
    );
    let run = command("cont", json!({}));
    plan.step(
        Destination,
        "resume the guest",
        Some(run),
        WaitCondition::Running(true),
    )
    .change(|step| step.is_commit_point = true);
    if options.quit_source {
        let quit = command("quit", json!({}));
        plan.step(
            Source,
            "quit the source QEMU",
            Some(quit),
            WaitCondition::Answered,
        );
    }
    plan.steps
}

/// Adds the steps that migrate QEMU's own state. A file is written before it is read. Any other transport needs a
/// listener first.
fn migrate_vm_state(plan: &mut PlanBuilder, uri: &str) {
    use Peer::{Destination, Source};
    let send = command("migrate", json!({ "uri": uri }));
    let receive = command(
        "migrate-incoming",
        json!({ "uri": uri, "exit-on-error": false }),
    );
    let (sending, receiving) = ("save QEMU's device state", "load QEMU's device state");
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
        let what = "listen for QEMU's device state";
        plan.step(Destination, what, Some(receive), WaitCondition::Answered);
        plan.step(Source, sending, Some(send), WaitCondition::VmState)
            .rollback(RollbackAction::CancelVmState);
        plan.step(Destination, receiving, None, WaitCondition::VmState);
    }
}

/// Returns a description of the plan for the user.
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
                Some("wait until query-status reports that the guest runs".into())
            }
            WaitCondition::Running(false) => {
                Some("wait until query-status reports that the guest is paused".into())
            }
            WaitCondition::Memory(state) => {
                Some(format!("wait until query-migrate reports {}", state.name()))
            }
            WaitCondition::VmState => Some("wait until query-migrate reports completed".into()),
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
                "    commit point: no rollback from here on, the guest runs at the destination"
            );
        }
    }
    text
}
