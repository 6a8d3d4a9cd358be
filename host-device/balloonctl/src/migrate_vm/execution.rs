// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The execution of one step of a plan, and the wait for its end.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use guest_migration::status::MigrationInfo;
use serde_json::Value;

use super::connections::{wait, Connections, QemuMigrationInfo, RunState, POLL_INTERVAL};
use super::peer::Peer;
use super::plan::{Step, WaitCondition};
use super::preflight::Preflight;
use super::rollback_guard::RollbackGuard;
use super::shell::Shell;
use crate::commands::progress;
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::output::Output;

/// The execution of a plan.
pub(super) struct Execution<'a> {
    pub connections: &'a mut Connections,
    pub preflight: &'a Preflight,
    pub interrupts: &'a Interrupts,
    pub output: &'a mut Output,
    pub memory: MigrationInfo,
    pub shell: Option<Shell>,
    pub guard: RollbackGuard,
}

impl Execution<'_> {
    pub(super) fn step(&mut self, step: &Step) -> Result<(), CommandError> {
        if self.interrupts.count() > 0 {
            return Err(CommandError::Cancelled("interrupted".into()));
        }
        let answer = match (&step.command, self.connections.client_mut(step.peer)) {
            (Some(command), Some(client)) => {
                // Earlier events do not concern this command.
                client.clear_events();
                client.command(&command.execute, command.arguments.clone())?
            }
            _ => Value::Null,
        };
        let timeout = step.timeout.unwrap_or(Duration::MAX);
        match &step.until {
            WaitCondition::Answered => Ok(()),
            WaitCondition::Written(path) => write(path, &answer),
            WaitCondition::Unplugged(id) => self.unplugged(id, timeout),
            WaitCondition::Running(wanted) => self.runs(step.peer, *wanted, timeout),
            WaitCondition::Memory(state) => {
                let (daemon, output) = (&mut self.connections.daemon, &mut *self.output);
                self.memory =
                    progress::wait_for_migration(daemon, Some(*state), self.interrupts, output)?;
                if self.memory.status == *state {
                    Ok(())
                } else {
                    progress::outcome(&self.memory)
                }
            }
            WaitCondition::VmState => self.vm_state(step.peer, timeout),
            WaitCondition::Listening { socket, shell } => {
                self.listening(socket, shell.as_deref(), timeout)
            }
        }
    }

    fn unplugged(&mut self, id: &str, timeout: Duration) -> Result<(), CommandError> {
        let (source, interrupts) = (&mut self.connections.source, self.interrupts);
        let what = format!("guest did not release '{id}'");
        wait(&what, timeout, Some(interrupts), || {
            let told = |name: &str| name == "DEVICE_DELETED" || name == "DEVICE_UNPLUG_GUEST_ERROR";
            let event = source.wait_event(
                |event| told(&event.name) && event.text("device") == id,
                POLL_INTERVAL,
            )?;
            match event {
                Some(event) if event.name == "DEVICE_DELETED" => Ok(Some(())),
                Some(_) => Err(CommandError::Failed(format!(
                    "guest refused to release '{id}'"
                ))),
                None => Ok(None),
            }
        })
    }

    fn runs(&mut self, peer: Peer, wanted: bool, timeout: Duration) -> Result<(), CommandError> {
        let Some(client) = self.connections.client_mut(peer) else {
            return Ok(());
        };
        let word = if wanted { "run" } else { "stop" };
        let what = format!("guest at the {} did not {word}", peer.name());
        wait(&what, timeout, None, || {
            let state: RunState = client.query("query-status")?;
            Ok((state.running == wanted).then_some(()))
        })
    }

    fn vm_state(&mut self, peer: Peer, timeout: Duration) -> Result<(), CommandError> {
        let interrupts = self.interrupts;
        let Some(client) = self.connections.client_mut(peer) else {
            return Ok(());
        };
        let what = format!("{} QEMU did not migrate its device state", peer.name());
        wait(&what, timeout, Some(interrupts), || {
            let state: QemuMigrationInfo = client.query("query-migrate")?;
            match state.status.as_str() {
                "completed" => Ok(Some(())),
                "failed" | "cancelled" => Err(CommandError::Failed(format!(
                    "migration of QEMU's device state {}: {}",
                    state.status,
                    state
                        .error_desc
                        .unwrap_or_else(|| "QEMU gave no reason".into())
                ))),
                _ => Ok(None),
            }
        })
    }

    fn listening(
        &mut self,
        socket: &Path,
        shell: Option<&str>,
        timeout: Duration,
    ) -> Result<(), CommandError> {
        if let Some(command) = shell {
            let failed = |error| CommandError::Io(format!("cannot run '{command}'"), error);
            let shell = Shell::start(command).map_err(failed)?;
            if let Some(group) = shell.group() {
                self.guard.shell(group, self.output);
            }
            self.shell = Some(shell);
        }
        let what = format!("destination daemon did not listen on {}", socket.display());
        let mut shell = self.shell.as_mut();
        let result = wait(&what, timeout, Some(self.interrupts), || {
            if socket.exists() {
                return Ok(Some(()));
            }
            match shell.as_mut().and_then(|shell| shell.failure()) {
                Some(failure) => Err(CommandError::Failed(failure)),
                None => Ok(None),
            }
        });
        match (result, shell) {
            (Err(CommandError::TimedOut(what)), Some(shell)) => {
                let last_words = shell.last_words();
                Err(CommandError::TimedOut(format!("{what}{last_words}")))
            }
            (result, _) => result,
        }
    }
}

/// Writes a file atomically: whole or not at all.
fn write(path: &Path, value: &Value) -> Result<(), CommandError> {
    let failed = |error| CommandError::Io(format!("cannot write {}", path.display()), error);
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    writeln!(file, "{value:#}").map_err(failed)?;
    fs::File::sync_all(file.as_file()).map_err(failed)?;
    let persisted = file.persist(path);
    persisted.map(drop).map_err(|error| failed(error.error))
}
