// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guard process that rolls the migration back if this program is killed.

use std::path::{Path, PathBuf};

use guest_migration::guard::{GuardError, GuardProcess};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::preflight::Preflight;
use super::rollback_action::RollbackAction;
use super::sockets::Sockets;
use crate::output::Output;

/// A message to the guard process.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Message {
    /// The migration begins.
    Begin(Box<Begin>),
    /// A step begins that this action undoes.
    Add(RollbackAction),
    /// The shell command runs in this process group.
    Shell(i32),
    /// The command is about to be sent after which the guest may run at the destination.
    Commit,
    /// The rollback has nothing left to undo.
    Clear,
}

/// What a rollback needs to know.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Begin {
    pub sockets: Sockets,
    pub preflight: Preflight,
    /// The temporary directory of this program, to be removed.
    pub folder: PathBuf,
}

/// Rolls the migration back if this program is killed. Without a guard process, it does nothing.
#[derive(Debug, Default)]
pub struct RollbackGuard(Option<GuardProcess>);

impl RollbackGuard {
    /// Starts the guard process. Writes a warning if it cannot be started.
    #[must_use]
    pub fn start(
        sockets: Sockets,
        preflight: &Preflight,
        folder: &Path,
        output: &mut Output,
    ) -> Self {
        let mut guard = match GuardProcess::start() {
            Ok(process) => Self(process),
            Err(error) => {
                warn(&error, output);
                Self::default()
            }
        };
        let begin = Begin {
            sockets,
            preflight: preflight.clone(),
            folder: folder.to_owned(),
        };
        guard.tell(&Message::Begin(Box::new(begin)), output);
        guard
    }

    /// A step begins that `action` undoes.
    pub(super) fn add(&mut self, action: &RollbackAction, output: &mut Output) {
        self.tell(&Message::Add(action.clone()), output);
    }

    /// The shell command runs in the process group `group`.
    pub(super) fn shell(&mut self, group: Pid, output: &mut Output) {
        self.tell(&Message::Shell(group.as_raw_pid()), output);
    }

    /// The next command may make the guest run at the destination.
    pub(super) fn commit(&mut self, output: &mut Output) {
        self.tell(&Message::Commit, output);
    }

    /// The migration is complete or rolled back. Ends the guard process.
    pub(super) fn dismiss(&mut self, output: &mut Output) {
        self.tell(&Message::Clear, output);
        self.0 = None;
    }

    fn tell(&mut self, message: &Message, output: &mut Output) {
        if let Some(process) = &mut self.0 {
            if let Err(error) = process.tell(message) {
                warn(&error, output);
                self.0 = None;
            }
        }
    }
}

fn warn(error: &GuardError, output: &mut Output) {
    output.say(&format!(
        "{error}; if balloonctl is killed, resume the guest at the source manually"
    ));
}
