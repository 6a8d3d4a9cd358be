// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `status`: the state of the balloon, as the daemon reports it.

use guest_migration::status::{MigrationInfo, MigrationStatus};
use qmp_client::{Client, Error};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::{discard, hint, progress};
use crate::error::CommandError;
use crate::output::{fields, Output};
use crate::size;

/// The answers to all queries. A refused query has the reason in its place.
#[derive(Debug, Serialize)]
struct Overview {
    balloon: Answer,
    virtio: Answer,
    memory: Answer,
    hinting: Answer,
    migration: Answer,
}

/// The answer to a query, or the daemon's reason for refusing it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answer {
    Given(Value),
    Refused { unavailable: String },
}

impl Answer {
    /// Sends a query. A refusal is an answer and not an error.
    fn get(daemon: &mut Client, command: &str) -> Result<Self, CommandError> {
        match daemon.command(command, json!({})) {
            Ok(value) => Ok(Self::Given(value)),
            Err(Error::Refused { qmp_error, .. }) => Ok(Self::Refused {
                unavailable: qmp_error.desc,
            }),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the text that `show` makes of the answer, or the reason of the refusal.
    fn show(&self, show: impl Fn(&Value) -> String) -> String {
        match self {
            Self::Given(value) => show(value),
            Self::Refused { unavailable } => format!("unavailable: {unavailable}"),
        }
    }
}

/// Shows the state of the balloon.
pub fn run(daemon: &mut Client, output: &mut Output) -> Result<(), CommandError> {
    let overview = Overview {
        balloon: Answer::get(daemon, "query-balloon")?,
        virtio: Answer::get(daemon, "query-virtio-status")?,
        memory: Answer::get(daemon, "query-guest-memory")?,
        hinting: Answer::get(daemon, "query-free-page-hint")?,
        migration: Answer::get(daemon, "query-migrate")?,
    };
    output.print_result(&overview, &describe(&overview))
}

fn describe(overview: &Overview) -> String {
    let virtio = &overview.virtio;
    fields(&[
        ("device", virtio.show(device)),
        ("features", virtio.show(features)),
        (
            "guest memory",
            overview.balloon.show(|it| size::show(number(it, "actual"))),
        ),
        ("host memory", overview.memory.show(memory)),
        ("discarding", overview.balloon.show(discard::line)),
        ("hinting", overview.hinting.show(hint::line)),
        ("migration", overview.migration.show(migration)),
    ])
}

/// Returns the state of the device. The first word is that of the daemon, unless there is a better one.
fn device(virtio: &Value) -> String {
    let (status, driver) = (text(virtio, "status"), text(virtio, "driver"));
    let shared = virtio.get("memory-shared") != Some(&Value::Bool(false));
    match (status, driver) {
        ("no-front-end", _) => "no-front-end: start the VMM with the daemon's socket",
        ("no-driver", "none") => "no-driver: load the driver in the guest",
        ("no-driver", "stopped" | "running") if !shared => {
            "no-shared-memory: start the VMM with shared memory (QEMU: share=on)"
        }
        ("no-driver", "stopped") => "stopped: the guest is paused, or its driver was unloaded",
        _ => status,
    }
    .to_owned()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    let text = value.get(name).and_then(Value::as_str);
    text.unwrap_or_default()
}

fn number(value: &Value, name: &str) -> u64 {
    let number = value.get(name).and_then(Value::as_u64);
    number.unwrap_or_default()
}

fn list<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    let list = value.get(name).and_then(Value::as_array);
    list.into_iter().flatten()
}

fn features(virtio: &Value) -> String {
    let names: Vec<&str> = list(virtio, "negotiated-features")
        .filter_map(Value::as_str)
        .collect();
    names.join(", ")
}

fn memory(memory: &Value) -> String {
    let total = list(memory, "regions").fold(0u64, |sum, region| {
        sum.saturating_add(number(region, "length"))
    });
    let allocated = size::show(number(memory, "allocated"));
    format!("{allocated} of {}", size::show(total))
}

fn migration(migration: &Value) -> String {
    match MigrationInfo::deserialize(migration) {
        Ok(status) if status.status == MigrationStatus::None => "none".to_owned(),
        Ok(status) => progress::line(&status),
        Err(_) => text(migration, "status").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_said() {
        let refused = || Answer::Refused {
            unavailable: "no driver".into(),
        };
        let overview = Overview {
            balloon: refused(),
            virtio: Answer::Given(json!({
                "status": "no-driver", "negotiated-features": ["stats", "free-page-hint"],
            })),
            memory: Answer::Given(json!({
                "allocated": 1 << 20, "regions": [{ "length": 3 << 20 }, { "length": 1 << 20 }],
            })),
            hinting: refused(),
            migration: Answer::Given(json!({ "status": "none" })),
        };
        let text = describe(&overview);
        for line in [
            "device        no-driver",
            "features      stats, free-page-hint",
            "guest memory  unavailable: no driver",
            "discarding    unavailable: no driver",
            "host memory   1.00 MiB of 4.00 MiB",
            "migration     none",
        ] {
            assert!(text.lines().any(|got| got == line), "{text}");
        }
        for (status, driver, shared, expected) in [
            ("no-front-end", "none", false, "no-front-end: "),
            ("no-driver", "none", false, "no-driver: load the driver"),
            ("no-driver", "stopped", false, "no-shared-memory: "),
            ("no-driver", "stopped", true, "stopped: the guest is paused"),
            ("running", "running", true, "running"),
        ] {
            let virtio = json!({ "status": status, "driver": driver, "memory-shared": shared });
            assert!(device(&virtio).starts_with(expected), "{virtio}");
        }
        let value = serde_json::to_value(&overview).unwrap();
        assert_eq!(value["balloon"]["unavailable"], "no driver");
    }
}
