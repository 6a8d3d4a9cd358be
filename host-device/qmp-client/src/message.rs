// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages from the peer.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// The error with which the peer refuses a command.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{desc} ({class})")]
pub struct QmpError {
    /// Class of the error: `GenericError`, `CommandNotFound`, ...
    pub class: String,
    /// Description for the user.
    pub desc: String,
}

/// An event that the peer sends.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Event {
    /// Name of the event: `BALLOON_CHANGE`, ...
    #[serde(rename = "event")]
    pub name: String,
    /// Data of the event, `null` if it has none.
    #[serde(default)]
    pub data: Value,
}

impl Event {
    /// Returns the text in a field of the data, or an empty string if the field has no text.
    #[must_use]
    pub fn text(&self, field: &str) -> &str {
        let value = self.data.get(field).and_then(Value::as_str);
        value.unwrap_or_default()
    }
}

/// A message from the peer, one line.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Message {
    Event(Event),
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: Option<Value>,
    },
    Error {
        error: QmpError,
        id: Option<Value>,
    },
    Greeting {
        #[serde(rename = "QMP")]
        _greeting: Value,
    },
}
