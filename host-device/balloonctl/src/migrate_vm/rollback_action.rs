// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The actions that undo the steps of a migration.

use serde::{Deserialize, Serialize};

use super::peer::Peer;
use super::qmp_command::QmpCommand;

/// The action that undoes a step.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RollbackAction {
    /// Cancel QEMU's own migration.
    CancelVmState,
    /// Resume the guest at the source.
    ResumeGuest,
    /// Cancel the daemon's migration of memory.
    CancelMemory,
    /// Plug the balloon in at the source.
    PlugBalloon,
    /// Terminate the command that this program has started.
    TerminateShell,
    /// Reset a capability of a peer with this command.
    RestoreCapability(Peer, QmpCommand),
}

impl RollbackAction {
    /// Returns the rank of the action: actions of lower rank run first. The guest resumes as early as possible.
    pub(super) fn rank(&self) -> u8 {
        match self {
            Self::CancelVmState => 0,
            Self::ResumeGuest => 1,
            Self::CancelMemory => 2,
            Self::PlugBalloon => 3,
            Self::TerminateShell => 4,
            Self::RestoreCapability(..) => 5,
        }
    }
}
