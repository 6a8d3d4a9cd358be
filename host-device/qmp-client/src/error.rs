// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::json_lines::LineError;
use crate::message::QmpError;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum Error {
    /// Nobody listens there.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Nothing was said within the limit. A monitor of QEMU serves one client at a time: another one may hold it.
    #[error("{peer} did not greet within {timeout:?}: is it a QMP socket, and is nobody else connected to it?")]
    NoGreeting {
        /// Who.
        peer: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// The first thing said was something else.
    #[error("{peer} did not begin with a QMP greeting")]
    NotQmp {
        /// Who.
        peer: String,
    },
    /// The command was refused; the peer is ready for others.
    #[error("{peer} refused {command}: {qmp_error}")]
    Refused {
        /// Who.
        peer: String,
        /// The command's name.
        command: String,
        /// In the peer's words.
        qmp_error: QmpError,
    },
    /// No answer came within the limit. Should it still come, it is dropped.
    #[error("{peer} did not answer {command} within {timeout:?}")]
    Timeout {
        /// Who.
        peer: String,
        /// The command's name.
        command: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// The answer is not of the type that was expected.
    #[error("{peer} gave a strange answer to {command}: {response}")]
    UnexpectedResponse {
        /// Who.
        peer: String,
        /// The command's name.
        command: String,
        /// What it said.
        response: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The connection is of no more use.
    #[error(transparent)]
    Line(#[from] LineError),
}

impl Error {
    /// What the peer said, if it refused.
    #[must_use]
    pub fn qmp_error(&self) -> Option<&QmpError> {
        match self {
            Self::Refused { qmp_error, .. } => Some(qmp_error),
            _ => None,
        }
    }

    /// Whether the connection can be used no more.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Line(_) | Self::Connect { .. } | Self::NoGreeting { .. } | Self::NotQmp { .. }
        )
    }
}
