// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The parameters and the capability of the daemon's migration.

use serde_json::{json, Map, Value};

use crate::args::{Compression, MigrationParameters, Tracking};

/// The capability of the daemon to wait before the last iteration.
pub const PAUSE_BEFORE_SWITCHOVER: &str = "pause-before-switchover";

/// Returns the arguments of `migrate`, which sends memory to `uri`. Options of the command line apply to this migration
/// only, so they are a part of this command. `waits` states whether the migration waits before the last iteration.
#[must_use]
pub fn migrate_arguments(
    uri: &str,
    migration_parameters: &MigrationParameters,
    waits: bool,
) -> Map<String, Value> {
    let mut arguments = Map::new();
    arguments.insert("uri".into(), uri.into());
    let parameters = parameters(migration_parameters);
    if !parameters.is_empty() {
        arguments.insert("parameters".into(), parameters.into());
    }
    // Always given: a client may have set this capability, and `migrate` continues no migration that waits.
    let waits = json!([{ "capability": PAUSE_BEFORE_SWITCHOVER, "state": waits }]);
    arguments.insert("capabilities".into(), waits);
    arguments
}

/// Returns the parameters that are given on the command line.
fn parameters(migration_parameters: &MigrationParameters) -> Map<String, Value> {
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
            migration_parameters.no_hints.then(|| false.into()),
        ),
        (
            "free-page-hint-wait",
            migration_parameters.hint_wait.map(Value::from),
        ),
        ("dirty-tracking", tracking.map(Value::from)),
        ("verify", migration_parameters.verify.then(|| true.into())),
    ];
    let given = all
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    given.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A migration starts from what a QMP client has set in the daemon, and only the options that are given differ.
    #[test]
    fn only_what_is_given_is_passed() {
        let waits = json!([{ "capability": "pause-before-switchover", "state": false }]);
        assert_eq!(
            Value::from(migrate_arguments(
                "unix:/s",
                &MigrationParameters::default(),
                false
            )),
            json!({ "uri": "unix:/s", "capabilities": waits })
        );
        let migration_parameters = MigrationParameters {
            max_bandwidth: Some(1 << 20),
            compress: Some(Compression::Zstd),
            tracking: Some(Tracking::SoftDirty),
            no_hints: true,
            ..MigrationParameters::default()
        };
        let arguments = migrate_arguments("unix:/s", &migration_parameters, true);
        assert_eq!(
            arguments["parameters"],
            json!({
                "max-bandwidth": 1 << 20, "multifd-compression": "zstd", "dirty-tracking": "soft-dirty",
                "free-page-hint": false,
            })
        );
        assert_eq!(arguments["capabilities"][0]["state"], true);
    }
}
