// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of a command, and their exit statuses.

use std::error::Error as _;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use thiserror::Error;

/// Why a command failed.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// A QMP server refused a command, did not answer, or closed the connection.
    #[error(transparent)]
    Qmp(#[from] qmp_client::Error),
    /// The command failed or is not possible. The message states the reason.
    #[error("{0}")]
    Failed(String),
    /// The user interrupted the command, or the migration was cancelled.
    #[error("{0}")]
    Cancelled(String),
    /// The command exceeded its time limit.
    #[error("{0}")]
    TimedOut(String),
    /// The memory that was received is incomplete.
    #[error("{0}")]
    Incomplete(String),
    /// The command left a state that the user must check.
    #[error("{0}")]
    RecoveryRequired(String),
    /// A system call failed.
    #[error("{0}")]
    Io(String, #[source] io::Error),
}

impl CommandError {
    /// Returns the exit status, as `--help` documents it.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Qmp(qmp_client::Error::Timeout { .. }) => 5,
            Self::Qmp(error) if error.is_fatal() => 3,
            Self::Qmp(_) | Self::Failed(_) | Self::Io(..) => 1,
            Self::Usage(_) => 2,
            Self::Cancelled(_) => 4,
            Self::TimedOut(_) => 5,
            Self::Incomplete(_) => 6,
            Self::RecoveryRequired(_) => 7,
        }
    }

    /// Returns the message with all causes, in one line.
    #[must_use]
    pub fn full_message(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        match self {
            Self::Qmp(error) => format!("{text}{}", advice(error)),
            _ => text,
        }
    }
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|it| it.file_type().is_socket())
}

/// Returns what to do about an error of a QMP connection, to be appended to its message.
fn advice(error: &qmp_client::Error) -> &'static str {
    use qmp_client::{Error, LineError};
    match error {
        Error::Connect { path, source } => match source.kind() {
            io::ErrorKind::NotFound => ": start its program, or correct the path",
            io::ErrorKind::ConnectionRefused if !is_socket(path) => {
                ": it is not a socket; correct the path"
            }
            io::ErrorKind::ConnectionRefused => ": its program has ended; start it again",
            io::ErrorKind::PermissionDenied => ": run as the user of its program",
            _ => "",
        },
        Error::NoGreeting { .. } => "; --timeout sets another limit",
        Error::Timeout { .. } => {
            ": check that its program is not stopped; --timeout sets another limit"
        }
        Error::Line(LineError::Closed { .. }) => ": its log says why",
        Error::Line(_) | Error::NotQmp { .. } | Error::UnexpectedResponse { .. } => {
            ": check that the path is that of the right program"
        }
        Error::Refused { .. } => "",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use qmp_client::Client;

    use super::*;

    #[test]
    fn a_socket_without_a_listener_is_told_from_another_file() {
        let folder = tempfile::tempdir().unwrap();
        let [socket, file] = ["socket", "file"].map(|name| folder.path().join(name));
        drop(UnixListener::bind(&socket).unwrap());
        fs::write(&file, "").unwrap();
        for (path, text) in [
            (socket, "its program has ended"),
            (file, "it is not a socket"),
        ] {
            let error = CommandError::from(Client::connect(&path).unwrap_err());
            assert!(
                error.full_message().contains(text),
                "{}",
                error.full_message()
            );
        }
    }
}
