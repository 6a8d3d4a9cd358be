// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rollback: undoes the steps of a failed migration, so that the guest continues at the source.

use std::time::Duration;

use guest_migration::status::{MigrationInfo, MigrationStatus};
use qmp_client::{Client, Error};
use serde_json::json;

use super::connections::{peripheral, property, wait, QemuMigrationInfo, RunState};
use super::peer::Peer;
use super::preflight::Preflight;
use super::qmp_command::{chardev_add, device_add};
use super::rollback_action::RollbackAction;
use crate::error::CommandError;

/// Timeout of one rollback action.
const ROLLBACK_TIMEOUT: Duration = Duration::from_secs(20);
/// How long to wait for the guest to release a device.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(3);

/// What a rollback works with. A peer without a connection fails its actions, and no others.
pub(super) struct RollbackContext<'a> {
    /// The QEMU that runs the guest.
    pub source: Option<&'a mut Client>,
    /// The QEMU that waits for the guest.
    pub destination: Option<&'a mut Client>,
    /// The daemon at the source.
    pub daemon: Option<&'a mut Client>,
    /// The result of the checks.
    pub preflight: &'a Preflight,
    /// Terminates the shell command, and returns what was done if there was one.
    pub terminate_shell: &'a mut dyn FnMut() -> Option<String>,
}

impl RollbackContext<'_> {
    fn client(&mut self, peer: Peer) -> Result<&mut Client, CommandError> {
        let client = match peer {
            Peer::Source => self.source.as_deref_mut(),
            Peer::Destination => self.destination.as_deref_mut(),
            Peer::Daemon => self.daemon.as_deref_mut(),
            Peer::Here => None,
        };
        client.ok_or_else(|| {
            CommandError::Failed(format!("{} has closed its QMP socket", peer.name()))
        })
    }
}

/// Runs all actions. If one fails, the others still run. Returns descriptions of the completed and the failed actions.
pub(super) fn rollback(
    context: &mut RollbackContext<'_>,
    rollback_actions: &[RollbackAction],
) -> (Vec<String>, Vec<String>) {
    let mut all: Vec<&RollbackAction> = rollback_actions.iter().collect();
    all.sort_by_key(|rollback| rollback.rank());
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for rollback in all {
        match one(context, rollback) {
            Ok(None) => {}
            Ok(Some(what)) => done.push(what),
            Err(error) => failed.push(format!("{}: {}", purpose(rollback), error.full_message())),
        }
    }
    (done, failed)
}

fn purpose(rollback: &RollbackAction) -> String {
    match rollback {
        RollbackAction::CancelVmState => "cancelling QEMU's migration".into(),
        RollbackAction::ResumeGuest => "resuming the guest at the source".into(),
        RollbackAction::CancelMemory => "cancelling the daemon's migration".into(),
        RollbackAction::PlugBalloon => "plugging in the balloon again at the source".into(),
        RollbackAction::TerminateShell => "terminating the destination daemon".into(),
        RollbackAction::RestoreCapability(peer, _) => {
            format!("resetting a capability of the {}", peer.name())
        }
    }
}

fn one(
    context: &mut RollbackContext<'_>,
    rollback: &RollbackAction,
) -> Result<Option<String>, CommandError> {
    match rollback {
        RollbackAction::CancelVmState => cancel_vm_state(context),
        RollbackAction::ResumeGuest => resume_guest(context),
        RollbackAction::CancelMemory => cancel_memory(context),
        RollbackAction::PlugBalloon => plug(context),
        RollbackAction::TerminateShell => Ok((context.terminate_shell)()),
        RollbackAction::RestoreCapability(peer, command) => {
            let client = context.client(*peer)?;
            client.command(&command.execute, command.arguments.clone())?;
            Ok(None)
        }
    }
}

fn cancel_vm_state(context: &mut RollbackContext<'_>) -> Result<Option<String>, CommandError> {
    let source = context.client(Peer::Source)?;
    if source
        .query::<QemuMigrationInfo>("query-migrate")?
        .is_over()
    {
        return Ok(None);
    }
    source.command("migrate_cancel", json!({}))?;
    wait(
        "QEMU did not cancel its migration",
        ROLLBACK_TIMEOUT,
        None,
        || {
            let state: QemuMigrationInfo = source.query("query-migrate")?;
            Ok(state.is_over().then_some(()))
        },
    )?;
    Ok(Some("QEMU's migration is cancelled".into()))
}

fn resume_guest(context: &mut RollbackContext<'_>) -> Result<Option<String>, CommandError> {
    let source = context.client(Peer::Source)?;
    source.command("cont", json!({}))?;
    wait(
        "guest did not resume at the source",
        ROLLBACK_TIMEOUT,
        None,
        || {
            let state: RunState = source.query("query-status")?;
            Ok(state.running.then_some(()))
        },
    )?;
    Ok(Some("guest runs at the source again".into()))
}

fn cancel_memory(context: &mut RollbackContext<'_>) -> Result<Option<String>, CommandError> {
    let daemon = context.client(Peer::Daemon)?;
    let mut status: MigrationInfo = daemon.query("query-migrate")?;
    if !status.status.is_over() {
        match daemon.command("migrate-cancel", json!({})) {
            Err(error) if error.is_fatal() => return Err(error.into()),
            // The migration may have ended meanwhile.
            _ => {}
        }
        status = wait(
            "daemon did not cancel its migration",
            ROLLBACK_TIMEOUT,
            None,
            || {
                let status: MigrationInfo = daemon.query("query-migrate")?;
                Ok(status.status.is_over().then_some(status))
            },
        )?;
    }
    Ok(match status.status {
        MigrationStatus::None => None,
        state => Some(format!("memory migration is {}", state.name())),
    })
}

/// Plugs the balloon in at the source. Does nothing if the guest has not released the balloon. Adds a new chardev,
/// because QEMU has closed the connection of the old one.
fn plug(context: &mut RollbackContext<'_>) -> Result<Option<String>, CommandError> {
    let preflight = context.preflight;
    let source = context.client(Peer::Source)?;
    let id = preflight.device.get("id").and_then(|id| id.as_str());
    let path = peripheral(id.unwrap_or_default());
    let gone = wait("", UNPLUG_TIMEOUT, None, || {
        let there = property(source, &path, "type")?.is_some();
        Ok((!there).then_some(()))
    });
    match gone {
        Ok(()) => {}
        Err(CommandError::TimedOut(_)) => {
            return Ok(Some(
                "balloon is still plugged in at the source, but the guest was asked to release it and may still do so".into(),
            ))
        }
        Err(error) => return Err(error),
    }
    // QEMU releases the chardev a little after the device. The daemon accepts a connection only after it has noticed
    // that QEMU has disconnected, and after its own migration has ended. Retry until then.
    let mut last = None;
    let plugged = wait("", ROLLBACK_TIMEOUT, None, || {
        match plug_once(source, preflight) {
            Ok(()) => Ok(Some(())),
            Err(error) if error.is_fatal() => Err(error.into()),
            Err(error) => {
                last = Some(error);
                Ok(None)
            }
        }
    });
    match (plugged, last) {
        (Err(CommandError::TimedOut(_)), Some(error)) => return Err(error.into()),
        (plugged, _) => plugged?,
    }
    Ok(Some("balloon is plugged in again at the source".into()))
}

/// Makes one attempt to plug the balloon in, with a new chardev: QEMU does not reconnect an existing one.
fn plug_once(source: &mut Client, preflight: &Preflight) -> Result<(), Error> {
    match source.command("chardev-remove", json!({ "id": preflight.chardev })) {
        // The chardev may be removed already.
        Err(error) if !error.to_string().contains("not found") => return Err(error),
        _ => {}
    }
    for command in [
        chardev_add(&preflight.chardev, &preflight.socket),
        device_add(&preflight.device, &preflight.bus, &preflight.chardev),
    ] {
        source.command(&command.execute, command.arguments)?;
    }
    Ok(())
}
