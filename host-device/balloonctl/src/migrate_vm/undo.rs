// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The way back: the guest goes on at the source as if nothing had been.

use std::time::Duration;

use migration::status::{State, Status};
use qmp_client::{Client, Error};
use serde_json::json;

use super::perform::Running;
use super::plan::{chardev_add, device_add, Order, Side};
use super::survey::Survey;
use super::world::{peripheral, property, wait, RunState, VmState};
use crate::failure::Failure;

/// How long a single thing may take.
const LIMIT: Duration = Duration::from_secs(20);
/// How long a device that the guest was asked for is waited for.
const LATE_UNPLUG: Duration = Duration::from_secs(3);

/// How a step is undone.
#[derive(Clone, Debug, PartialEq)]
pub enum Undo {
    /// QEMU does not save its state.
    CancelVmState,
    /// The guest runs.
    Continue,
    /// Memory is not sent.
    CancelMemory,
    /// The balloon is plugged in.
    Plug,
    /// The command that was run here is ended.
    Shell,
    /// A capability is off.
    Capability(Side, Order),
}

impl Undo {
    /// The order in which things are undone: the guest has waited long enough.
    fn rank(&self) -> u8 {
        match self {
            Self::CancelVmState => 0,
            Self::Continue => 1,
            Self::CancelMemory => 2,
            Self::Plug => 3,
            Self::Shell => 4,
            Self::Capability(..) => 5,
        }
    }
}

/// Undoes all of these; one that fails does not keep others from being tried. Returns what was done, in words, and what
/// could not be.
pub(super) fn undo(running: &mut Running<'_>, begun: &[Undo]) -> (Vec<String>, Vec<String>) {
    let mut all: Vec<&Undo> = begun.iter().collect();
    all.sort_by_key(|undo| undo.rank());
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for undo in all {
        match one(running, undo) {
            Ok(None) => {}
            Ok(Some(what)) => done.push(what),
            Err(failure) => failed.push(format!("{}: {}", purpose(undo), failure.story())),
        }
    }
    (done, failed)
}

fn purpose(undo: &Undo) -> String {
    match undo {
        Undo::CancelVmState => "cancelling QEMU's migration".into(),
        Undo::Continue => "letting the guest go on at the source".into(),
        Undo::CancelMemory => "cancelling the daemon's migration".into(),
        Undo::Plug => "plugging the balloon in again at the source".into(),
        Undo::Shell => "ending the destination's daemon".into(),
        Undo::Capability(side, _) => format!("setting back a capability of the {}", side.name()),
    }
}

fn one(running: &mut Running<'_>, undo: &Undo) -> Result<Option<String>, Failure> {
    match undo {
        Undo::CancelVmState => cancel_vm_state(running),
        Undo::Continue => go_on(running),
        Undo::CancelMemory => cancel_memory(running),
        Undo::Plug => plug(running),
        Undo::Shell => Ok(running.end_shell()),
        Undo::Capability(side, order) => {
            if let Some(client) = running.world.of(*side) {
                client.command(&order.execute, order.arguments.clone())?;
            }
            Ok(None)
        }
    }
}

fn cancel_vm_state(running: &mut Running<'_>) -> Result<Option<String>, Failure> {
    let source = &mut running.world.source;
    if source.query::<VmState>("query-migrate")?.is_over() {
        return Ok(None);
    }
    source.command("migrate_cancel", json!({}))?;
    wait("QEMU did not cancel its migration", LIMIT, None, || {
        let state: VmState = source.query("query-migrate")?;
        Ok(state.is_over().then_some(()))
    })?;
    Ok(Some("QEMU's migration is cancelled".into()))
}

fn go_on(running: &mut Running<'_>) -> Result<Option<String>, Failure> {
    let source = &mut running.world.source;
    source.command("cont", json!({}))?;
    wait("the source did not run", LIMIT, None, || {
        let state: RunState = source.query("query-status")?;
        Ok(state.running.then_some(()))
    })?;
    Ok(Some("the guest goes on at the source".into()))
}

fn cancel_memory(running: &mut Running<'_>) -> Result<Option<String>, Failure> {
    let daemon = &mut running.world.daemon;
    let mut status: Status = daemon.query("query-migrate")?;
    if !status.status.is_over() {
        match daemon.command("migrate-cancel", json!({})) {
            Err(error) if error.is_final() => return Err(error.into()),
            // It may be over by now.
            _ => {}
        }
        status = wait("the daemon did not cancel", LIMIT, None, || {
            let status: Status = daemon.query("query-migrate")?;
            Ok(status.status.is_over().then_some(status))
        })?;
    }
    Ok(match status.status {
        State::None => None,
        state => Some(format!("the migration of memory is {}", state.name())),
    })
}

/// A device that the guest has not let go is there; one that it has gets its chardev anew, as QEMU has hung up.
fn plug(running: &mut Running<'_>) -> Result<Option<String>, Failure> {
    let survey = running.survey;
    let source = &mut running.world.source;
    let id = survey.device.get("id").and_then(|id| id.as_str());
    let path = peripheral(id.unwrap_or_default());
    let gone = wait("", LATE_UNPLUG, None, || {
        let there = property(source, &path, "type")?.is_some();
        Ok((!there).then_some(()))
    });
    match gone {
        Ok(()) => {}
        Err(Failure::TimedOut(_)) => {
            return Ok(Some(
                "the balloon is still plugged in at the source, though the guest was asked to let it go, and may yet".into(),
            ))
        }
        Err(failure) => return Err(failure),
    }
    // QEMU lets the chardev go a little after the device, and the daemon has to notice that QEMU has hung up, and to have
    // done with its migration, before it takes anybody.
    let mut last = None;
    let plugged = wait("", LIMIT, None, || match plug_once(source, survey) {
        Ok(()) => Ok(Some(())),
        Err(error) if error.is_final() => Err(error.into()),
        Err(error) => {
            last = Some(error);
            Ok(None)
        }
    });
    match (plugged, last) {
        (Err(Failure::TimedOut(_)), Some(error)) => return Err(error.into()),
        (plugged, _) => plugged?,
    }
    Ok(Some("the balloon is plugged in again at the source".into()))
}

/// With a new chardev: QEMU does not connect one a second time.
fn plug_once(source: &mut Client, survey: &Survey) -> Result<(), Error> {
    match source.command("chardev-remove", json!({ "id": survey.chardev })) {
        // It may have gone before.
        Err(error) if !error.to_string().contains("not found") => return Err(error),
        _ => {}
    }
    for order in [
        chardev_add(&survey.chardev, &survey.socket),
        device_add(&survey.device, &survey.bus, &survey.chardev),
    ] {
        source.command(&order.execute, order.arguments)?;
    }
    Ok(())
}
