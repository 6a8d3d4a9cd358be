// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The session of one QMP client: greeting, negotiation, commands, answers.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{json, Value};

use super::command::{expect_no_arguments, parse, CommandError};
use super::context::CommandContext;
use super::outbox::Outbox;
use super::{dispatch, json};
use crate::events::Subscription;

/// A command, as received.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QmpRequest {
    execute: String,
    #[serde(default)]
    arguments: Option<Value>,
    #[serde(default)]
    id: Option<Value>,
}

/// Returns the greeting, the first line of a session.
pub fn greeting() -> String {
    json!({
        "QMP": {
            "version": { "vhost-device-balloon": env!("CARGO_PKG_VERSION"), "package": "" },
            "capabilities": [],
        },
    })
    .to_string()
}

/// Returns an error answer.
pub fn error(id: Option<&Value>, class: &str, desc: &str) -> String {
    with_id(json!({ "error": { "class": class, "desc": desc } }), id)
}

fn with_id(mut answer: Value, id: Option<&Value>) -> String {
    if let (Some(id), Some(answer)) = (id, answer.as_object_mut()) {
        answer.insert("id".into(), id.clone());
    }
    answer.to_string()
}

/// Checks the arguments of `qmp_capabilities`. The server offers no capability.
///
/// # Errors
///
/// If the client requests a capability.
fn negotiate_capabilities(arguments: Option<&Value>) -> Result<(), CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        #[serde(default)]
        enable: Vec<String>,
    }
    let arguments: Arguments = parse(arguments)?;
    match arguments.enable.into_iter().next() {
        Some(capability) => Err(CommandError::Capability(capability)),
        None => Ok(()),
    }
}

/// The state of one client's session.
pub(super) struct QmpSession<'a> {
    context: &'a CommandContext,
    /// The subscription to events; `None` before the negotiation.
    events: Option<Subscription>,
    quit_requested: bool,
}

impl<'a> QmpSession<'a> {
    /// Creates a session in the state before `qmp_capabilities`.
    pub fn new(context: &'a CommandContext) -> Self {
        Self {
            context,
            events: None,
            quit_requested: false,
        }
    }

    /// Returns whether the client has sent `quit`.
    pub fn quit_requested(&self) -> bool {
        self.quit_requested
    }

    /// Returns whether the client has sent `qmp_capabilities`.
    pub fn is_negotiated(&self) -> bool {
        self.events.is_some()
    }

    /// Returns the answer to the command in `frame`. Events are sent to `outbox` after the negotiation.
    pub fn answer(&mut self, frame: &[u8], outbox: &Arc<Outbox>) -> String {
        let value = match json::parse(frame) {
            Ok(value) => value,
            Err(why) => return error(None, "GenericError", &format!("JSON parse error, {why}")),
        };
        let id = value.get("id").cloned();
        let request = match QmpRequest::deserialize(value) {
            Ok(request) => request,
            Err(why) => {
                return error(
                    id.as_ref(),
                    "GenericError",
                    &format!("invalid QMP input: {why}"),
                )
            }
        };
        match self.execute(&request, outbox) {
            Ok(value) => with_id(json!({ "return": value }), request.id.as_ref()),
            Err(why) => error(request.id.as_ref(), why.class(), &why.to_string()),
        }
    }

    fn execute(
        &mut self,
        request: &QmpRequest,
        outbox: &Arc<Outbox>,
    ) -> Result<Value, CommandError> {
        match (request.execute.as_str(), self.events.is_some()) {
            ("qmp_capabilities", false) => {
                negotiate_capabilities(request.arguments.as_ref())?;
                self.events = Some(self.context.events.subscribe(outbox.clone()));
                Ok(json!({}))
            }
            ("qmp_capabilities", true) => Err(CommandError::AlreadyNegotiated),
            (_, false) => Err(CommandError::NotNegotiated),
            ("quit", true) => {
                expect_no_arguments(request.arguments.as_ref())?;
                self.quit_requested = true;
                Ok(json!({}))
            }
            (name, true) => dispatch::execute(self.context, name, request.arguments.as_ref()),
        }
    }
}
