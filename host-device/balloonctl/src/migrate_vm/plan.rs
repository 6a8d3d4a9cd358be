// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All that will be done, before any of it is.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migration::status::State;
use serde::Serialize;
use serde_json::{json, Map, Value};

use super::survey::Survey;
use super::undo::Undo;
use crate::args::MigrateVm;
use crate::commands::migrate::parameters;

/// Whom a command is given to.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The QEMU that runs the guest.
    Source,
    /// The QEMU that waits for it.
    Destination,
    /// Our daemon at the source.
    Daemon,
    /// This program.
    Here,
}

impl Side {
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
pub struct Order {
    /// Its name.
    pub execute: String,
    /// Its arguments.
    pub arguments: Value,
}

/// What a step waits for.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// The answer.
    Answered,
    /// The answer, which is written into a file.
    Written(PathBuf),
    /// The guest has let this device go.
    Unplugged(String),
    /// The guest runs, or does not.
    Running(bool),
    /// The daemon's migration is in this state.
    Memory(#[serde(serialize_with = "name")] State),
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

fn name<S: serde::Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// One of the things to do.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Step {
    /// By whom.
    pub side: Side,
    /// What it is for.
    pub what: String,
    /// The command.
    pub order: Option<Order>,
    /// What it waits for.
    pub until: Until,
    /// The most time that this may take; `None` where the guest's work decides.
    #[serde(skip)]
    pub limit: Option<Duration>,
    /// How it is undone, should it or a later one fail.
    #[serde(skip)]
    pub undo: Option<Undo>,
    /// Whether nothing is undone once this was not refused.
    #[serde(skip)]
    pub commits: bool,
}

/// The capability by which QEMU leaves out memory in shared files.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// The capability by which the daemon waits before the last of memory.
pub const PAUSE: &str = "pause-before-switchover";

/// The command that sets a capability.
#[must_use]
pub fn capability(name: &str, state: bool) -> Order {
    let one = json!({ "capability": name, "state": state });
    order("migrate-set-capabilities", json!({ "capabilities": [one] }))
}

fn order(name: &str, arguments: Value) -> Order {
    Order {
        execute: name.to_owned(),
        arguments,
    }
}

/// The command that connects a chardev to a daemon.
pub(super) fn chardev_add(id: &str, socket: &Path) -> Order {
    let address = json!({ "type": "unix", "data": { "path": socket } });
    let data = json!({ "addr": address, "server": false });
    let backend = json!({ "type": "socket", "data": data });
    order("chardev-add", json!({ "id": id, "backend": backend }))
}

/// The command that plugs the balloon in.
pub(super) fn device_add(device: &Map<String, Value>, bus: &str, chardev: &str) -> Order {
    let mut device = device.clone();
    device.insert("bus".into(), bus.into());
    device.insert("chardev".into(), chardev.into());
    order("device_add", device.into())
}

/// A plan in the making.
struct Plan {
    limit: Duration,
    steps: Vec<Step>,
}

impl Plan {
    /// A step that ends with its answer; what it returns can be changed.
    fn step(&mut self, side: Side, what: &str, order: Option<Order>, until: Until) -> Added<'_> {
        self.steps.push(Step {
            side,
            what: what.to_owned(),
            order,
            until,
            limit: Some(self.limit),
            undo: None,
            commits: false,
        });
        Added(self.steps.last_mut())
    }
}

struct Added<'a>(Option<&'a mut Step>);

impl<'a> Added<'a> {
    fn change(mut self, change: impl FnOnce(&mut Step)) -> Added<'a> {
        if let Some(step) = self.0.as_mut() {
            change(step);
        }
        self
    }

    fn undo(self, undo: Undo) -> Added<'a> {
        self.change(|step| step.undo = Some(undo))
    }

    fn unlimited(self) -> Added<'a> {
        self.change(|step| step.limit = None)
    }
}

/// Every step, with QEMU's own state going to `vm_state`.
#[must_use]
pub fn plan(options: &MigrateVm, survey: &Survey, vm_state: &str) -> Vec<Step> {
    use Side::{Daemon, Destination, Here, Source};
    let mut plan = Plan {
        limit: Duration::from_secs(options.step_limit),
        steps: Vec::new(),
    };
    for side in [Destination, Source] {
        let what = "leave guest memory out of QEMU's own migration";
        let set = capability(IGNORE_SHARED, true);
        let back = Undo::Capability(side, capability(IGNORE_SHARED, false));
        plan.step(side, what, Some(set), Until::Answered).undo(back);
    }
    let back = Undo::Capability(Daemon, capability(PAUSE, false));
    let set = capability(PAUSE, true);
    let what = "have memory's migration wait before its last round";
    plan.step(Daemon, what, Some(set), Until::Answered)
        .undo(back);
    let set = order(
        "migrate-set-parameters",
        parameters(&options.sending).into(),
    );
    let what = "set how memory is sent";
    plan.step(Daemon, what, Some(set), Until::Answered);
    let send = order("migrate", json!({ "uri": options.to }));
    let until = Until::Memory(State::PreSwitchover);
    plan.step(
        Daemon,
        "send memory while the guest runs",
        Some(send),
        until,
    )
    .undo(Undo::CancelMemory)
    .unlimited();
    if let Some(file) = &options.device_state {
        let ask = order("query-device-state", json!({}));
        let what = "save the state of the balloon";
        plan.step(Daemon, what, Some(ask), Until::Written(file.clone()));
    }
    let listening = Until::Listening {
        socket: options.device_socket.clone(),
        shell: options.device_command.clone(),
    };
    let what = "see that the destination's daemon listens";
    plan.step(Here, what, None, listening).undo(Undo::Shell);
    let pull = order("device_del", json!({ "id": options.device }));
    let until = Until::Unplugged(options.device.clone());
    plan.step(Source, "unplug the balloon", Some(pull), until)
        .undo(Undo::Plug);
    let stop = order("stop", json!({}));
    plan.step(Source, "stop the guest", Some(stop), Until::Running(false))
        .undo(Undo::Continue);
    let go_on = order(
        "migrate-continue",
        json!({ "state": State::PreSwitchover.name() }),
    );
    let until = Until::Memory(State::Completed);
    plan.step(Daemon, "send the rest of memory", Some(go_on), until)
        .unlimited();
    move_vm_state(&mut plan, vm_state);
    let (bus, chardev) = (&survey.destination_bus, &survey.destination_chardev);
    let connect = chardev_add(chardev, &options.device_socket);
    let what = "connect to the destination's daemon";
    plan.step(Destination, what, Some(connect), Until::Answered);
    let plug = device_add(&survey.device, bus, chardev);
    plan.step(
        Destination,
        "plug the balloon in",
        Some(plug),
        Until::Answered,
    );
    let run = order("cont", json!({}));
    plan.step(
        Destination,
        "let the guest go on",
        Some(run),
        Until::Running(true),
    )
    .change(|step| step.commits = true);
    if options.quit_source {
        let quit = order("quit", json!({}));
        plan.step(Source, "end the source", Some(quit), Until::Answered);
    }
    plan.steps
}

/// A file is written and then read; anything else needs a listener first.
fn move_vm_state(plan: &mut Plan, uri: &str) {
    use Side::{Destination, Source};
    let send = order("migrate", json!({ "uri": uri }));
    let receive = order(
        "migrate-incoming",
        json!({ "uri": uri, "exit-on-error": false }),
    );
    let (sending, receiving) = ("save the state of QEMU's devices", "load it");
    if uri.starts_with("file:") {
        plan.step(Source, sending, Some(send), Until::VmState)
            .undo(Undo::CancelVmState);
        plan.step(Destination, receiving, Some(receive), Until::VmState);
    } else {
        let what = "listen for the state of QEMU's devices";
        plan.step(Destination, what, Some(receive), Until::Answered);
        plan.step(Source, sending, Some(send), Until::VmState)
            .undo(Undo::CancelVmState);
        plan.step(Destination, receiving, None, Until::VmState);
    }
}

/// A plan for people.
#[must_use]
pub fn describe(steps: &[Step]) -> String {
    let mut text = String::new();
    for (step, number) in steps.iter().zip(1u32..) {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{number:2}. {}: {}", step.side.name(), step.what);
        if let Some(order) = &step.order {
            let (name, arguments) = (&order.execute, &order.arguments);
            let execute = Value::from(name.as_str());
            let _ = writeln!(
                text,
                "    {{\"execute\": {execute}, \"arguments\": {arguments}}}"
            );
        }
        let until = match &step.until {
            Until::Answered => None,
            Until::Written(path) => Some(format!("write the answer to {}", path.display())),
            Until::Unplugged(id) => Some(format!("wait for the event DEVICE_DELETED of {id}")),
            Until::Running(true) => Some("wait until query-status says that it runs".into()),
            Until::Running(false) => Some("wait until query-status says that it is paused".into()),
            Until::Memory(state) => Some(format!("wait until query-migrate says {}", state.name())),
            Until::VmState => Some("wait until query-migrate says completed".into()),
            Until::Listening { socket, shell } => {
                if let Some(shell) = shell {
                    let _ = writeln!(text, "    run: {shell}");
                }
                Some(format!("wait for the socket {}", socket.display()))
            }
        };
        if let Some(until) = until {
            let _ = writeln!(text, "    {until}");
        }
        if step.commits {
            let _ = writeln!(
                text,
                "    from here on nothing is undone: the guest is at the destination"
            );
        }
    }
    text
}
