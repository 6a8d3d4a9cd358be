// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a command can fail, and what the shell is told.

use std::error::Error as _;
use std::io;

use thiserror::Error;

/// Why a command was not done.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The command line does not make sense.
    #[error("{0}")]
    Usage(String),
    /// A QMP server refused, or is gone.
    #[error(transparent)]
    Qmp(#[from] qmp_client::Error),
    /// A migration failed, in the words of who did it.
    #[error("{0}")]
    Failed(String),
    /// It was interrupted, and is undone.
    #[error("{0}")]
    Cancelled(String),
    /// It takes longer than it may.
    #[error("{0}")]
    TimedOut(String),
    /// What was received is no whole memory.
    #[error("{0}")]
    Incomplete(String),
    /// Things are in a state that somebody should look at.
    #[error("{0}")]
    RecoveryRequired(String),
    /// The system reports an error.
    #[error("{0}")]
    Io(String, #[source] io::Error),
}

impl CommandError {
    /// The exit status, as `--help` documents it.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Qmp(error) if error.is_fatal() => 3,
            Self::Qmp(_) | Self::Failed(_) | Self::Io(..) => 1,
            Self::Usage(_) => 2,
            Self::Cancelled(_) => 4,
            Self::TimedOut(_) => 5,
            Self::Incomplete(_) => 6,
            Self::RecoveryRequired(_) => 7,
        }
    }

    /// The whole story in one line.
    #[must_use]
    pub fn full_message(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}
