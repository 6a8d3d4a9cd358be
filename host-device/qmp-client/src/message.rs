// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the peer may say.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// The peer's refusal of a command.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{desc} ({class})")]
pub struct QmpError {
    /// The class of the error: `GenericError`, `CommandNotFound`, ...
    pub class: String,
    /// A sentence for people.
    pub desc: String,
}

/// Something that the peer told unasked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Event {
    /// Its name: `BALLOON_CHANGE`, ...
    #[serde(rename = "event")]
    pub name: String,
    /// Its data, `null` if it has none.
    #[serde(default)]
    pub data: Value,
}

impl Event {
    /// The text in a field of its data; empty if there is none.
    #[must_use]
    pub fn text(&self, field: &str) -> &str {
        let value = self.data.get(field).and_then(Value::as_str);
        value.unwrap_or_default()
    }
}

/// A line of the peer's.
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
