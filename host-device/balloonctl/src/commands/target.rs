// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `target`: sets the amount of memory of the guest.

use std::time::{Duration, Instant};

use qmp_client::Client;
use serde::Deserialize;
use serde_json::json;

use crate::args::Target;
use crate::error::CommandError;
use crate::output::Output;
use crate::size;

/// Interval between two queries of the balloon. Events also report changes.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
struct Balloon {
    actual: u64,
}

/// Sets the target, and waits for the guest if `wait` is given.
pub fn run(daemon: &mut Client, options: &Target, output: &mut Output) -> Result<(), CommandError> {
    let wanted = options.memory;
    daemon.command("balloon", json!({ "value": wanted }))?;
    let mut actual = daemon.query::<Balloon>("query-balloon")?.actual;
    if let Some(seconds) = options.wait {
        let (begun, timeout) = (Instant::now(), Duration::from_secs(seconds));
        // The balloon consists of whole pages.
        while actual.abs_diff(wanted) >= guest_migration::PAGE_SIZE {
            let (has, shall) = (size::show(actual), size::show(wanted));
            let left = timeout.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(CommandError::TimedOut(format!(
                    "the guest has {has} after {seconds} s, and not {shall}; the target stays"
                )));
            }
            output.show_progress(&format!("the guest has {has}, and shall have {shall}"));
            daemon.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                left.min(POLL_INTERVAL),
            )?;
            actual = daemon.query::<Balloon>("query-balloon")?.actual;
        }
    }
    let (has, shall) = (size::show(actual), size::show(wanted));
    output.print_result(
        &json!({ "target": wanted, "actual": actual }),
        &format!("target {shall}, the guest has {has}"),
    )
}
