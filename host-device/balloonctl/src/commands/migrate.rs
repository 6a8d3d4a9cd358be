// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `migrate` and `migrate-cancel`.

use guest_migration::status::MigrationInfo;
use qmp_client::Client;
use serde_json::json;

use super::progress;
use crate::args::Migrate;
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::migration_parameters::migrate_arguments;
use crate::output::Output;
use crate::paths::{absolute, absolute_uri};

/// Migrates memory, and shows the progress.
pub fn run(
    daemon: &mut Client,
    options: &Migrate,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), CommandError> {
    let uri = absolute_uri(&options.to)?;
    let mut arguments = migrate_arguments(&uri, &options.migration_parameters, false);
    if let Some(path) = &options.vmm_qmp {
        arguments.insert("vmm-qmp".into(), json!(absolute(path)?));
    }
    daemon.command("migrate", arguments.into())?;
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
pub fn cancel(
    daemon: &mut Client,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), CommandError> {
    daemon.command("migrate-cancel", json!({}))?;
    let status = progress::wait_for_migration(daemon, None, interrupts, output)?;
    output.print_result(&status, &progress::line(&status))
}
