// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The parameters and the capability of the daemon's migration.

use serde_json::{Map, Value};

use crate::args::{Compression, MigrationParameters, Tracking};

/// The capability of the daemon to wait before the last iteration.
pub const PAUSE_BEFORE_SWITCHOVER: &str = "pause-before-switchover";

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

#[cfg(test)]
mod tests {
    use serde_json::json;

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
