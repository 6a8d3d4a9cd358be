// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `target`: sets the amount of memory of the guest.

use std::time::{Duration, Instant};

use qmp_client::Client;
use serde::Deserialize;
use serde_json::json;

use crate::args::Target;
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::output::Output;
use crate::size;

/// Interval between two queries of the balloon. Events also report changes.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
struct Balloon {
    actual: u64,
}

/// Sets the target, and waits for the guest if `wait` is given.
pub fn run(
    daemon: &mut Client,
    options: &Target,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), CommandError> {
    let wanted = options.memory;
    daemon.command("balloon", json!({ "value": wanted }))?;
    let mut actual = daemon.query::<Balloon>("query-balloon")?.actual;
    if let Some(seconds) = options.wait {
        let (begun, timeout) = (Instant::now(), Duration::from_secs(seconds));
        // The balloon consists of whole pages.
        while actual.abs_diff(wanted) >= guest_migration::PAGE_SIZE {
            let (has, target) = (size::show(actual), size::show(wanted));
            let left = timeout.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(CommandError::TimedOut(format!(
                    "guest has {has} after {seconds} s, the target is {target}; the target remains set"
                )));
            }
            if interrupts.count() > 0 {
                return Err(CommandError::Cancelled(format!(
                    "interrupted: guest has {has}, the target {target} remains set"
                )));
            }
            output.show_progress(&format!("guest has {has}, target {target}"));
            daemon.wait_event(
                |event| event.name == "BALLOON_CHANGE",
                left.min(POLL_INTERVAL),
            )?;
            actual = daemon.query::<Balloon>("query-balloon")?.actual;
        }
    }
    let (has, target) = (size::show(actual), size::show(wanted));
    output.print_result(
        &json!({ "target": wanted, "actual": actual }),
        &format!("target {target}, guest has {has}"),
    )
}
