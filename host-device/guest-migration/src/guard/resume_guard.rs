// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guard of a migration that pauses the guest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::process::{GuardError, GuardProcess};
use crate::processes::Process;

/// A message to the guard process.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Message {
    /// These processes are about to be stopped.
    Processes(Vec<Process>),
    /// The VMM with this QMP socket is about to pause its guest.
    Vmm(PathBuf),
    /// The guest runs, or stays paused on purpose.
    Clear,
}

/// Resumes a paused guest if this process is killed, or cannot resume it. Clones share the guard process.
///
/// It never fails: a migration without a guard process is as safe as before until this process is killed, so the log
/// has a warning instead. When the last clone is dropped, the guard process resumes what it still guards.
#[derive(Clone, Debug, Default)]
pub(crate) struct ResumeGuard(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// `None` if guard processes are not enabled, after an error, or at the end.
    process: Option<GuardProcess>,
    /// Whether the guard process would resume anything now.
    is_armed: bool,
}

impl ResumeGuard {
    /// Starts the guard process. Takes some milliseconds, so it is called while the guest runs.
    pub(crate) fn start() -> Self {
        let guard = Self::default();
        match GuardProcess::start() {
            Ok(process) => guard.state().process = process,
            Err(error) => warn_unguarded(&error),
        }
        guard
    }

    /// Guards processes, in addition to those before. Called before they are stopped.
    pub(crate) fn watch_processes(&self, processes: Vec<Process>) {
        if !processes.is_empty() {
            self.state().arm(&Message::Processes(processes));
        }
    }

    /// Guards the guest of the VMM whose QMP socket is at `path`. Called before it is paused.
    pub(crate) fn watch_vmm(&self, path: &Path) {
        self.state().arm(&Message::Vmm(path.to_owned()));
    }

    /// Returns whether a guard process would resume something now.
    pub(crate) fn is_armed(&self) -> bool {
        let state = self.state();
        state.is_armed && state.process.is_some()
    }

    /// Guards nothing any longer: the guest runs.
    pub(crate) fn clear(&self) {
        self.state().clear();
    }

    /// Guards nothing any longer, and ends the guard process.
    pub(crate) fn dismiss(&self) {
        let mut state = self.state();
        state.clear();
        state.process = None;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn arm(&mut self, message: &Message) {
        // Before the message is sent: it may have arrived even if its answer has not.
        self.is_armed = true;
        self.tell(message);
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.is_armed) {
            self.tell(&Message::Clear);
        }
    }

    fn tell(&mut self, message: &Message) {
        if let Some(process) = &mut self.process {
            if let Err(error) = process.tell(message) {
                warn_unguarded(&error);
                self.process = None;
            }
        }
    }
}

fn warn_unguarded(error: &GuardError) {
    warn!(
        "{error}; if this process is killed while the guest is paused, resume the guest manually"
    );
}
