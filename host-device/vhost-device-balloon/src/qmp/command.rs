// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What all commands share: the type of a handler, its errors, and the parsing of arguments.

use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{Map, Value};
use thiserror::Error;

use super::context::CommandContext;
use crate::device::hinting::HintingError;
use crate::device::saved_state::SavedStateError;
use crate::device::BalloonError;
use crate::migrate::parameters::ParameterError;
use crate::migrate::MigrateError;

pub(super) type CommandHandler = fn(&CommandContext, Option<&Value>) -> Result<Value, CommandError>;

/// Why a command fails.
#[derive(Debug, Error)]
pub enum CommandError {
    /// No command has this name.
    #[error("The command {0} has not been found")]
    NotFound(String),
    /// The client has not sent `qmp_capabilities`.
    #[error("Expecting capabilities negotiation with 'qmp_capabilities'")]
    NotNegotiated,
    /// The client has already sent `qmp_capabilities`.
    #[error("Capabilities negotiation is already complete, command ignored")]
    AlreadyNegotiated,
    /// The arguments are not valid for the command.
    #[error("invalid arguments: {0}")]
    Arguments(#[from] serde_json::Error),
    /// The capability is not offered.
    #[error("Capability '{0}' is not available")]
    Capability(String),
    /// See [`BalloonError`].
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// See [`HintingError`].
    #[error(transparent)]
    Hinting(#[from] HintingError),
    /// See [`SavedStateError`].
    #[error(transparent)]
    SavedState(#[from] SavedStateError),
    /// See [`MigrateError`].
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// See [`ParameterError`].
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// The memory files cannot be examined.
    #[error("guest memory files cannot be examined: {0}")]
    Memory(std::io::Error),
    /// The guest has sent no statistics.
    #[error("driver has sent no statistics: it has not accepted VIRTIO_BALLOON_F_STATS_VQ, or has not answered yet")]
    NoStats,
}

impl CommandError {
    /// Returns the class of the error in QMP.
    pub fn class(&self) -> &'static str {
        match self {
            Self::NotFound(_) | Self::NotNegotiated | Self::AlreadyNegotiated => "CommandNotFound",
            _ => "GenericError",
        }
    }
}

pub(super) fn parse<T: DeserializeOwned>(arguments: Option<&Value>) -> Result<T, CommandError> {
    let arguments = arguments
        .cloned()
        .unwrap_or_else(|| Value::Object(Map::new()));
    Ok(serde_json::from_value(arguments)?)
}

/// Checks that there are no arguments.
///
/// # Errors
///
/// If there are any.
pub fn expect_no_arguments(arguments: Option<&Value>) -> Result<(), CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct None {}
    parse::<None>(arguments).map(|None {}| ())
}
