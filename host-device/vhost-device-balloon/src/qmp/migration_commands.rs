// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands of migration. Names, arguments and answers are QEMU's where QEMU has them.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{json, Map, Value};

use super::command::{expect_no_arguments, parse, CommandError, CommandHandler};
use super::context::CommandContext;
use crate::migrate::MigrateRequest;

/// The commands of migration, with their names.
pub const COMMANDS: [(&str, CommandHandler); 10] = [
    ("migrate", migrate),
    ("migrate_cancel", cancel),
    ("migrate-cancel", cancel),
    ("migrate-continue", migrate_continue),
    ("query-migrate", query),
    ("migrate-set-parameters", set_parameters),
    ("query-migrate-parameters", query_parameters),
    ("migrate-set-capabilities", set_capabilities),
    ("query-migrate-capabilities", query_capabilities),
    ("cont", cont),
];

/// The state of a capability.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CapabilityState {
    capability: String,
    state: bool,
}

fn migrate(context: &CommandContext, arguments: Option<&Value>) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Arguments {
        uri: String,
        #[serde(default)]
        vmm_qmp: Option<PathBuf>,
        /// For this migration only.
        #[serde(default)]
        parameters: Map<String, Value>,
        /// For this migration only.
        #[serde(default)]
        capabilities: Vec<CapabilityState>,
        /// Ignored, as in QEMU.
        #[serde(default, rename = "detach")]
        _detach: bool,
    }
    let arguments: Arguments = parse(arguments)?;
    let capabilities = arguments.capabilities.into_iter();
    context.migration_manager.start(MigrateRequest {
        uri: arguments.uri,
        vmm_qmp: arguments.vmm_qmp,
        parameters: arguments.parameters,
        capabilities: capabilities.map(|it| (it.capability, it.state)).collect(),
    })?;
    Ok(json!({}))
}

/// Cancels the migration in progress. As in QEMU, no migration is no error.
fn cancel(context: &CommandContext, arguments: Option<&Value>) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    context.migration_manager.cancel();
    Ok(json!({}))
}

fn migrate_continue(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        state: String,
    }
    let Arguments { state } = parse(arguments)?;
    context.migration_manager.continue_migration(&state)?;
    Ok(json!({}))
}

fn query(context: &CommandContext, arguments: Option<&Value>) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    Ok(serde_json::to_value(context.migration_manager.status())?)
}

fn set_parameters(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    let values: Map<String, Value> = parse(arguments)?;
    context
        .migration_manager
        .set(|parameters, _| parameters.set(&values))?;
    Ok(json!({}))
}

fn query_parameters(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    Ok(serde_json::to_value(
        context.migration_manager.parameters(),
    )?)
}

fn set_capabilities(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        capabilities: Vec<CapabilityState>,
    }
    let Arguments { capabilities } = parse(arguments)?;
    let states = capabilities
        .iter()
        .map(|it| (it.capability.as_str(), it.state));
    context.migration_manager.set(|_, all| all.set(states))?;
    Ok(json!({}))
}

fn query_capabilities(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let all = context.migration_manager.capabilities().all();
    Ok(all
        .into_iter()
        .map(|(name, state)| json!({ "capability": name, "state": state }))
        .collect())
}

/// Resumes the guest that a completed migration has left paused.
fn cont(context: &CommandContext, arguments: Option<&Value>) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    context.migration_manager.resume()?;
    Ok(json!({}))
}
