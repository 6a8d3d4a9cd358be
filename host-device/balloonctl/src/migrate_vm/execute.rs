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
use super::rollback;
use super::rollback_action::RollbackAction;
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

/// Executes a plan.
///
/// # Errors
///
/// The error of the step that failed, with the rollback actions that were run. The guest then runs at the source.
/// [`CommandError::RecoveryRequired`] if the guest does not run at the source, or if its state is unknown.
pub fn execute(
    connections: &mut Connections,
    preflight: &Preflight,
    steps: &[Step],
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
    };
    let (mut rollback_actions, mut completed) = (Vec::new(), Vec::new());
    let (mut stopped, mut downtime) = (None, Duration::ZERO);
    let mut committed = false;
    for (step, number) in steps.iter().zip(1usize..) {
        let (peer, count) = (step.peer.name(), steps.len());
        let name = format!("{number}/{count} {peer}: {}", step.what);
        execution.output.say(&name);
        rollback_actions.extend(step.rollback.clone());
        let then = Instant::now();
        if step.until == WaitCondition::Running(false) {
            stopped = Some(then);
        }
        if let Err(error) = execution.step(step) {
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
            execution
                .output
                .say(&format!("{}; rolling back", error.full_message()));
            return Err(execution.roll_back(&name, error, &rollback_actions));
        }
        committed |= step.is_commit_point;
        if step.is_commit_point {
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
        memory: execution.memory,
        downtime_ms: millis(downtime),
    })
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
    fn roll_back(
        &mut self,
        name: &str,
        error: CommandError,
        rollback_actions: &[RollbackAction],
    ) -> CommandError {
        let (done, failed) = rollback::rollback(self, rollback_actions);
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
