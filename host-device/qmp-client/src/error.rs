// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of the client.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::json_lines::LineError;
use crate::message::QmpError;

/// Why a command has no result.
#[derive(Debug, Error)]
pub enum Error {
    /// The connection to the socket failed.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// The system error.
        source: io::Error,
    },
    /// The peer sent no greeting before the timeout. A QEMU monitor serves one client at a time, so another client may
    /// be connected.
    #[error("{peer} sent no greeting within {timeout:?}: check that it is a QMP socket and that no other QMP client is connected")]
    NoGreeting {
        /// Name of the peer.
        peer: String,
        /// The timeout.
        timeout: Duration,
    },
    /// The first message was not a greeting.
    #[error("{peer} sent no QMP greeting: check that it is a QMP socket")]
    NotQmp {
        /// Name of the peer.
        peer: String,
    },
    /// The peer refused the command. The connection remains usable.
    #[error("{peer} refused {command}: {qmp_error}")]
    Refused {
        /// Name of the peer.
        peer: String,
        /// Name of the command.
        command: String,
        /// The error that the peer returned.
        qmp_error: QmpError,
    },
    /// The peer did not answer before the timeout. A later answer is dropped.
    #[error("{peer} did not answer {command} within {timeout:?}")]
    Timeout {
        /// Name of the peer.
        peer: String,
        /// Name of the command.
        command: String,
        /// The timeout.
        timeout: Duration,
    },
    /// The answer does not have the expected type.
    #[error("{peer} sent an unexpected response to {command}: {response}")]
    UnexpectedResponse {
        /// Name of the peer.
        peer: String,
        /// Name of the command.
        command: String,
        /// The answer.
        response: String,
        /// The reason why it cannot be deserialized.
        source: serde_json::Error,
    },
    /// The connection is unusable.
    #[error(transparent)]
    Line(#[from] LineError),
}

impl Error {
    /// Returns the error that the peer returned, if it refused the command.
    #[must_use]
    pub fn qmp_error(&self) -> Option<&QmpError> {
        match self {
            Self::Refused { qmp_error, .. } => Some(qmp_error),
            _ => None,
        }
    }

    /// Returns whether the connection is unusable.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Line(_) | Self::Connect { .. } | Self::NoGreeting { .. } | Self::NotQmp { .. }
        )
    }
}
