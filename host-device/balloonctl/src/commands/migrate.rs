// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `migrate` and `migrate-cancel`.

use guest_migration::status::MigrationInfo;
use qmp_client::Client;
use serde_json::json;

use super::progress;
use crate::args::Migrate;
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::migrate_vm::set_capability;
use crate::migration_parameters::{parameters, PAUSE_BEFORE_SWITCHOVER};
use crate::output::Output;

/// Migrates memory, and shows the progress.
pub fn run(
    daemon: &mut Client,
    options: &Migrate,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), CommandError> {
    daemon.command(
        "migrate-set-parameters",
        parameters(&options.migration_parameters).into(),
    )?;
    // An earlier `migrate-vm` may have set this capability. Nothing here would continue a migration that waits.
    let pause = set_capability(PAUSE_BEFORE_SWITCHOVER, false);
    daemon.command(&pause.execute, pause.arguments)?;
    let mut arguments = json!({ "uri": options.to });
    if let (Some(path), Some(all)) = (&options.vmm_qmp, arguments.as_object_mut()) {
        all.insert("vmm-qmp".into(), json!(path));
    }
    daemon.command("migrate", arguments)?;
    if options.detach {
        let status: MigrationInfo = daemon.query("query-migrate")?;
        return output.print_result(
            &status,
            "migration started: 'balloonctl status' shows its progress",
        );
    }
    let status = progress::wait_for_migration(daemon, None, interrupts, output)?;
    let outcome = progress::outcome(&status);
    if outcome.is_ok() {
        output.print_result(&status, &progress::report(&status))?;
    } else {
        output.say(&progress::report(&status));
    }
    outcome
}

/// Cancels the current migration.
pub fn cancel(daemon: &mut Client, output: &mut Output) -> Result<(), CommandError> {
    daemon.command("migrate-cancel", json!({}))?;
    let status = progress::wait_for_migration(daemon, None, &Interrupts::default(), output)?;
    output.print_result(&status, &progress::line(&status))
}
