// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands of migration. Names, arguments and answers are QEMU's where QEMU has them.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{json, Map, Value};

use super::commands::{no_arguments, parse, Command, CommandError};
use super::Target;
use crate::migrate::Request;

/// Their names, and what they do.
pub const COMMANDS: [(&str, Command); 10] = [
    ("migrate", migrate),
    ("migrate_cancel", cancel),
    ("migrate-cancel", cancel),
    ("migrate-continue", go_on),
    ("query-migrate", query),
    ("migrate-set-parameters", set_parameters),
    ("query-migrate-parameters", query_parameters),
    ("migrate-set-capabilities", set_capabilities),
    ("query-migrate-capabilities", query_capabilities),
    ("cont", cont),
];

fn migrate(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Arguments {
        uri: String,
        #[serde(default)]
        vmm_qmp: Option<PathBuf>,
        /// QEMU's monitor takes it and does the same with and without.
        #[serde(default, rename = "detach")]
        _detach: bool,
    }
    let arguments: Arguments = parse(arguments)?;
    target.migrations.start(Request {
        uri: arguments.uri,
        vmm_qmp: arguments.vmm_qmp,
    })?;
    Ok(json!({}))
}

/// As in QEMU no error if there is nothing to give up.
fn cancel(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    no_arguments(arguments)?;
    target.migrations.cancel();
    Ok(json!({}))
}

fn go_on(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        state: String,
    }
    let Arguments { state } = parse(arguments)?;
    target.migrations.go_on(&state)?;
    Ok(json!({}))
}

fn query(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    no_arguments(arguments)?;
    Ok(serde_json::to_value(target.migrations.status())?)
}

fn set_parameters(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    let values: Map<String, Value> = parse(arguments)?;
    target
        .migrations
        .set(|parameters, _| parameters.set(&values))?;
    Ok(json!({}))
}

fn query_parameters(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    no_arguments(arguments)?;
    Ok(serde_json::to_value(target.migrations.parameters())?)
}

fn set_capabilities(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct State {
        capability: String,
        state: bool,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        capabilities: Vec<State>,
    }
    let Arguments { capabilities } = parse(arguments)?;
    let states = capabilities
        .iter()
        .map(|it| (it.capability.as_str(), it.state));
    target.migrations.set(|_, all| all.set(states))?;
    Ok(json!({}))
}

fn query_capabilities(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    no_arguments(arguments)?;
    let all = target.migrations.capabilities().all();
    Ok(all
        .into_iter()
        .map(|(name, state)| json!({ "capability": name, "state": state }))
        .collect())
}

/// The guest that a completed migration has left paused goes on.
fn cont(target: &Target, arguments: Option<&Value>) -> Result<Value, CommandError> {
    no_arguments(arguments)?;
    target.migrations.resume()?;
    Ok(json!({}))
}
