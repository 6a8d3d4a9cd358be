// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages from the peer.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

/// Maximum number of characters of a peer's text that the client shows.
const SHOWN: usize = 1000;

/// Returns a peer's text in a form that a terminal can show: without control characters, and not too long.
pub(crate) fn shown(text: &str) -> String {
    let printable = |letter: char| if letter.is_control() { ' ' } else { letter };
    let mut shown: String = text.chars().take(SHOWN).map(printable).collect();
    if shown.len() < text.len() {
        shown.push_str(" ...");
    }
    shown
}

fn shown_text<'a, D: Deserializer<'a>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| shown(&text))
}

/// The error with which the peer refuses a command.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{desc} ({class})")]
pub struct QmpError {
    /// Class of the error: `GenericError`, `CommandNotFound`, ...
    #[serde(deserialize_with = "shown_text")]
    pub class: String,
    /// Description for the user. It is cut if it is long, and has no control characters.
    #[serde(deserialize_with = "shown_text")]
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

/// A message from the peer, one line: a JSON object.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub(crate) enum Message {
    Event(Event),
    Return { value: Value, id: Option<Value> },
    Error { error: QmpError, id: Option<Value> },
    Greeting,
}

impl TryFrom<Map<String, Value>> for Message {
    type Error = serde_json::Error;

    fn try_from(mut object: Map<String, Value>) -> Result<Self, serde_json::Error> {
        if object.contains_key("event") {
            return Event::deserialize(Value::Object(object)).map(Self::Event);
        }
        let id = object.remove("id").filter(|id| !id.is_null());
        if let Some(value) = object.remove("return") {
            return Ok(Self::Return { value, id });
        }
        match object.remove("error") {
            Some(error) if error.is_object() => {
                let error = QmpError::deserialize(error)?;
                Ok(Self::Error { error, id })
            }
            _ if object.contains_key("QMP") => Ok(Self::Greeting),
            _ => Err(serde_json::Error::custom(
                "neither an event, nor an answer, nor a greeting",
            )),
        }
    }
}
