// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `migrate` and `migrate-cancel`.

use migration::status::Status;
use qmp_client::Client;
use serde_json::{json, Map, Value};

use super::progress;
use crate::args::{Compression, Migrate, Sending, Tracking};
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::migrate_vm::{capability, PAUSE};
use crate::output::Output;

/// What of it the daemon takes as `migrate-set-parameters`. The daemon keeps parameters from one migration to the next;
/// options that are only there or not are therefore set each time.
#[must_use]
pub fn parameters(sending: &Sending) -> Map<String, Value> {
    let compression = sending.compress.map(|how| match how {
        Compression::None => "none",
        Compression::Zstd => "zstd",
    });
    let tracking = sending.tracking.map(|how| match how {
        Tracking::Auto => "auto",
        Tracking::SoftDirty => "soft-dirty",
        Tracking::Content => "content",
    });
    let all = [
        ("max-bandwidth", sending.max_bandwidth.map(Value::from)),
        ("downtime-limit", sending.downtime_limit.map(Value::from)),
        ("multifd-channels", sending.channels.map(Value::from)),
        ("multifd-compression", compression.map(Value::from)),
        ("multifd-zstd-level", sending.zstd_level.map(Value::from)),
        ("max-rounds", sending.max_rounds.map(Value::from)),
        ("free-page-hint", Some((!sending.no_hints).into())),
        ("free-page-hint-wait", sending.hint_wait.map(Value::from)),
        ("dirty-tracking", tracking.map(Value::from)),
        ("verify", Some(sending.verify.into())),
    ];
    let given = all
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    given.collect()
}

/// Migrates, and shows how it goes.
pub fn run(
    daemon: &mut Client,
    options: &Migrate,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), Failure> {
    daemon.command(
        "migrate-set-parameters",
        parameters(&options.sending).into(),
    )?;
    // Whoever wanted to be waited for has gone, and nobody here would tell the daemon to go on.
    let pause = capability(PAUSE, false);
    daemon.command(&pause.execute, pause.arguments)?;
    let mut arguments = json!({ "uri": options.to });
    if let (Some(path), Some(all)) = (&options.vmm_qmp, arguments.as_object_mut()) {
        all.insert("vmm-qmp".into(), json!(path));
    }
    daemon.command("migrate", arguments)?;
    if options.detach {
        let status: Status = daemon.query("query-migrate")?;
        return output.result(&status, "it has begun: balloonctl status shows how it goes");
    }
    let status = progress::watch(daemon, None, interrupts, output)?;
    let verdict = progress::verdict(&status);
    if verdict.is_ok() {
        output.result(&status, &progress::report(&status))?;
    } else {
        output.say(&progress::report(&status));
    }
    verdict
}

/// Cancels the one that runs.
pub fn cancel(daemon: &mut Client, output: &mut Output) -> Result<(), Failure> {
    daemon.command("migrate-cancel", json!({}))?;
    let status = progress::watch(daemon, None, &Interrupts::default(), output)?;
    output.result(&status, &progress::line(&status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_set_and_what_is_not_is_as_at_first() {
        assert_eq!(
            Value::from(parameters(&Sending::default())),
            json!({ "free-page-hint": true, "verify": false })
        );
        let sending = Sending {
            max_bandwidth: Some(1 << 20),
            compress: Some(Compression::Zstd),
            tracking: Some(Tracking::SoftDirty),
            no_hints: true,
            ..Sending::default()
        };
        assert_eq!(
            Value::from(parameters(&sending)),
            json!({
                "max-bandwidth": 1 << 20, "multifd-compression": "zstd", "dirty-tracking": "soft-dirty",
                "free-page-hint": false, "verify": false,
            })
        );
    }
}
