// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Executes a plan.

use std::time::{Duration, Instant};

use guest_migration::status::MigrationInfo;
use qmp_client::Error;
use serde::Serialize;

use super::connections::Connections;
use super::execution::Execution;
use super::peer::Peer;
use super::plan::{Step, WaitCondition};
use super::preflight::Preflight;
use super::rollback::{rollback, RollbackContext};
use super::rollback_action::RollbackAction;
use super::rollback_guard::RollbackGuard;
use super::shell::Shell;
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::output::Output;

/// A step that has completed.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CompletedStep {
    /// The peer that executed the step.
    #[serde(rename = "side")]
    pub peer: Peer,
    /// The purpose of the step.
    pub what: String,
    /// Duration of the step in milliseconds.
    pub ms: u64,
}

/// The result of a migration that has completed.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationSummary {
    /// The steps that were executed.
    pub steps: Vec<CompletedStep>,
    /// The status of the migration of memory.
    pub memory: MigrationInfo,
    /// How long the guest was paused, in milliseconds.
    pub downtime_ms: u64,
}

/// Executes a plan. `guard` undoes the steps if this program is killed.
///
/// # Errors
///
/// The error of the step that failed, with the rollback actions that were run. The guest then runs at the source.
/// [`CommandError::RecoveryRequired`] if the guest does not run at the source, or if its state is unknown.
pub fn execute(
    connections: &mut Connections,
    preflight: &Preflight,
    steps: &[Step],
    guard: RollbackGuard,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<MigrationSummary, CommandError> {
    let mut execution = Execution {
        connections,
        preflight,
        interrupts,
        output,
        memory: MigrationInfo::default(),
        shell: None,
        guard,
    };
    let result = execution.run(steps);
    execution.guard.dismiss(execution.output);
    result
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Returns whether a command was certainly not executed if it failed with `error`. Interrupts are checked before a
/// command is sent.
fn is_harmless(error: &CommandError) -> bool {
    matches!(
        error,
        CommandError::Qmp(Error::Refused { .. }) | CommandError::Cancelled(_)
    )
}

impl Execution<'_> {
    fn run(&mut self, steps: &[Step]) -> Result<MigrationSummary, CommandError> {
        let (mut rollback_actions, mut completed) = (Vec::new(), Vec::new());
        let (mut stopped, mut downtime) = (None, Duration::ZERO);
        let mut committed = false;
        for (step, number) in steps.iter().zip(1usize..) {
            let (peer, count) = (step.peer.name(), steps.len());
            let name = format!("{number}/{count} {peer}: {}", step.what);
            self.output.say(&name);
            if let Some(action) = &step.rollback {
                self.guard.add(action, self.output);
                rollback_actions.push(action.clone());
            }
            if step.is_commit_point {
                self.guard.commit(self.output);
            }
            let then = Instant::now();
            if step.until == WaitCondition::Running(false) {
                stopped = Some(then);
            }
            if let Err(error) = self.step(step) {
                if committed {
                    return Err(CommandError::RecoveryRequired(format!(
                        "guest runs at the destination, but a later step failed: {name}: {}",
                        error.full_message()
                    )));
                }
                if step.is_commit_point && !is_harmless(&error) {
                    return Err(CommandError::RecoveryRequired(format!(
                        "{name}: {}; it is unknown whether the guest runs at the destination, and the source stays paused: if the \
                         guest does not run at the destination, resume it at the source with 'cont'",
                        error.full_message()
                    )));
                }
                self.output
                    .say(&format!("{}; rolling back", error.full_message()));
                return Err(self.roll_back(&name, error, &rollback_actions));
            }
            if step.is_commit_point {
                committed = true;
                self.guard.dismiss(self.output);
                downtime = stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed());
            }
            completed.push(CompletedStep {
                peer: step.peer,
                what: step.what.clone(),
                ms: millis(then.elapsed()),
            });
        }
        Ok(MigrationSummary {
            steps: completed,
            memory: self.memory.clone(),
            downtime_ms: millis(downtime),
        })
    }

    fn roll_back(
        &mut self,
        name: &str,
        error: CommandError,
        rollback_actions: &[RollbackAction],
    ) -> CommandError {
        let Connections {
            source,
            destination,
            daemon,
        } = &mut *self.connections;
        let shell = &mut self.shell;
        let mut terminate = || shell.take().and_then(Shell::terminate);
        let mut context = RollbackContext {
            source: Some(source),
            destination: Some(destination),
            daemon: Some(daemon),
            preflight: self.preflight,
            terminate_shell: &mut terminate,
        };
        let (done, failed) = rollback(&mut context, rollback_actions);
        let mut full_message = format!("{name}: {}", error.full_message());
        for what in done {
            full_message = format!("{full_message}; {what}");
        }
        if !failed.is_empty() {
            return CommandError::RecoveryRequired(format!(
                "{full_message}; rollback failed: {}",
                failed.join("; ")
            ));
        }
        full_message = format!("{full_message}; destination still waits: quit it, and start a new one before the next attempt");
        match error {
            CommandError::Cancelled(_) => CommandError::Cancelled(full_message),
            CommandError::TimedOut(_) => CommandError::TimedOut(full_message),
            _ => CommandError::Failed(full_message),
        }
    }
}
