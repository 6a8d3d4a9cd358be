// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of all commands: finds the handler of a command by its name.

use serde_json::{json, Value};

use super::command::{expect_no_arguments, CommandError, CommandHandler};
use super::context::CommandContext;
use super::{commands, migration_commands};

/// The commands that `query-commands` lists, without those of migration and those of the protocol itself.
const COMMANDS: [(&str, CommandHandler); 17] = [
    ("balloon", commands::balloon),
    ("query-balloon", commands::query_balloon),
    ("inhibit-discard", commands::inhibit_discard),
    ("allow-discard", commands::allow_discard),
    ("query-commands", query_commands),
    ("free-page-hint-start", commands::hint_start),
    ("free-page-hint-stop", commands::hint_stop),
    ("free-page-hint-done", commands::hint_done),
    ("free-page-hint-sync", commands::hint_sync),
    ("query-free-page-hint", commands::query_hint),
    ("query-hinted-ranges", commands::query_hinted_ranges),
    ("query-guest-memory", commands::query_guest_memory),
    ("query-virtio-status", commands::query_virtio_status),
    ("query-guest-stats", commands::query_guest_stats),
    ("query-device-state", commands::query_device_state),
    ("save-device-state", commands::save_device_state),
    ("query-version", commands::query_version),
];

fn all() -> impl Iterator<Item = &'static (&'static str, CommandHandler)> {
    COMMANDS.iter().chain(&migration_commands::COMMANDS)
}

/// Executes the command `name`.
///
/// # Errors
///
/// See [`CommandError`].
pub fn execute(
    context: &CommandContext,
    name: &str,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    match all().find(|(known, _)| *known == name) {
        Some((_, command)) => command(context, arguments),
        None => Err(CommandError::NotFound(name.chars().take(64).collect())),
    }
}

fn query_commands(_: &CommandContext, arguments: Option<&Value>) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let names = all().map(|(name, _)| *name);
    Ok(names
        .chain(["qmp_capabilities", "quit"])
        .map(|name| json!({ "name": name }))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::all;

    /// `docs/commands.md` is the reference page.
    #[test]
    fn the_reference_page_has_every_command() {
        let page = include_str!("../../../../docs/commands.md");
        let missing: Vec<_> = all()
            .map(|(name, _)| name)
            .filter(|name| !page.contains(&format!("`{name}`")))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
