// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `migrate` and `migrate-cancel`.

use guest_migration::status::MigrationInfo;
use qmp_client::Client;
use serde_json::{json, Map, Value};

use super::progress;
use crate::args::{Compression, Migrate, MigrationParameters, Tracking};
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::migrate_vm::{set_capability, PAUSE_BEFORE_SWITCHOVER};
use crate::output::Output;

/// Returns the arguments of `migrate-set-parameters`. The daemon keeps parameters from one migration to the next.
/// Flags, which are options without a value, are therefore always included.
#[must_use]
pub fn parameters(migration_parameters: &MigrationParameters) -> Map<String, Value> {
    let compression = migration_parameters.compress.map(|how| match how {
        Compression::None => "none",
        Compression::Zstd => "zstd",
    });
    let tracking = migration_parameters.tracking.map(|how| match how {
        Tracking::Auto => "auto",
        Tracking::SoftDirty => "soft-dirty",
        Tracking::Content => "content",
    });
    let all = [
        (
            "max-bandwidth",
            migration_parameters.max_bandwidth.map(Value::from),
        ),
        (
            "downtime-limit",
            migration_parameters.downtime_limit.map(Value::from),
        ),
        (
            "multifd-channels",
            migration_parameters.channels.map(Value::from),
        ),
        ("multifd-compression", compression.map(Value::from)),
        (
            "multifd-zstd-level",
            migration_parameters.zstd_level.map(Value::from),
        ),
        (
            "max-rounds",
            migration_parameters.max_rounds.map(Value::from),
        ),
        (
            "free-page-hint",
            Some((!migration_parameters.no_hints).into()),
        ),
        (
            "free-page-hint-wait",
            migration_parameters.hint_wait.map(Value::from),
        ),
        ("dirty-tracking", tracking.map(Value::from)),
        ("verify", Some(migration_parameters.verify.into())),
    ];
    let given = all
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    given.collect()
}

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
        return output.print_result(&status, "it has begun: balloonctl status shows how it goes");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_set_and_what_is_not_is_as_at_first() {
        assert_eq!(
            Value::from(parameters(&MigrationParameters::default())),
            json!({ "free-page-hint": true, "verify": false })
        );
        let migration_parameters = MigrationParameters {
            max_bandwidth: Some(1 << 20),
            compress: Some(Compression::Zstd),
            tracking: Some(Tracking::SoftDirty),
            no_hints: true,
            ..MigrationParameters::default()
        };
        assert_eq!(
            Value::from(parameters(&migration_parameters)),
            json!({
                "max-bandwidth": 1 << 20, "multifd-compression": "zstd", "dirty-tracking": "soft-dirty",
                "free-page-hint": false, "verify": false,
            })
        );
    }
}
