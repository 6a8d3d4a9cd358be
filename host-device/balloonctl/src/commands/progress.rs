// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows a migration: as a line while it runs, as tables when it has ended.

use std::time::Duration;

use guest_migration::status::{MigrationInfo, MigrationStatus};
use guest_migration::PAGE_SIZE;
use qmp_client::Client;
use serde_json::json;

use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::output::{fields, table, Output};
use crate::size;

/// Interval between two queries of the status.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Shows the daemon's migration until it has ended or is in the state `wanted`, and returns its status. The first
/// interrupt cancels the migration. The second one returns without waiting for the cancellation.
///
/// # Errors
///
/// If the connection to the daemon fails, or at the second interrupt.
pub fn wait_for_migration(
    daemon: &mut Client,
    wanted: Option<MigrationStatus>,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<MigrationInfo, CommandError> {
    let mut cancelled = false;
    loop {
        let status: MigrationInfo = daemon.query("query-migrate")?;
        if status.status.is_over() || Some(status.status) == wanted {
            output.clear_progress();
            return Ok(status);
        }
        output.show_progress(&line(&status));
        match interrupts.count() {
            0 => {}
            1 if cancelled => {}
            1 => {
                cancelled = true;
                output.say("cancelling the migration; press Ctrl-C again to exit without waiting");
                match daemon.command("migrate-cancel", json!({})) {
                    Err(error) if error.is_fatal() => return Err(error.into()),
                    // The migration may have ended just now. There is then nothing to cancel.
                    _ => {}
                }
            }
            _ => {
                return Err(CommandError::Cancelled(
                    "exited before the cancellation completed: 'balloonctl status' shows the result"
                        .into(),
                ));
            }
        }
        daemon.wait_event(|event| event.name == "MIGRATION", POLL_INTERVAL)?;
    }
}

/// Returns the result of a migration that has ended.
///
/// # Errors
///
/// If the migration has not completed.
pub fn outcome(status: &MigrationInfo) -> Result<(), CommandError> {
    let why = status.error_desc.as_deref();
    let why = why.unwrap_or("daemon gave no reason");
    // The guest may have been paused before, so only this much is known.
    let guest = match (status.guest_paused, status.downtime) {
        (true, _) => "the guest is still paused, resume it with 'cont' at its VMM",
        (false, Some(_)) => "the guest was paused for it and is resumed",
        (false, None) => "it has not paused the guest",
    };
    match status.status {
        MigrationStatus::Completed => Ok(()),
        MigrationStatus::Cancelled => Err(CommandError::Cancelled(format!(
            "migration was cancelled; {guest}"
        ))),
        MigrationStatus::Failed => Err(CommandError::Failed(format!(
            "migration failed: {why}; {guest}"
        ))),
        other => Err(CommandError::Failed(format!(
            "migration is {}: {why}",
            other.name()
        ))),
    }
}

/// Returns the status of a migration as one line.
#[must_use]
pub fn line(status: &MigrationInfo) -> String {
    let ram = &status.ram;
    let mut parts = vec![status.status.name().to_owned()];
    if ram.dirty_sync_count > 0 || ram.transferred > 0 {
        parts.push(format!("iteration {}", ram.dirty_sync_count.max(1)));
        parts.push(format!("{} sent", size::show(ram.transferred)));
        parts.push(format!("{} remaining", size::show(ram.remaining)));
        if ram.skipped > 0 {
            let bytes = ram.skipped.saturating_mul(PAGE_SIZE);
            parts.push(format!("{} skipped", size::show(bytes)));
        }
        parts.push(format!("{:.0} Mbit/s", ram.mbps));
        if let Some(expected) = status.expected_downtime {
            parts.push(format!("expected downtime {expected} ms"));
        }
    }
    parts.join(", ")
}

/// Returns the status of a migration that has ended, as tables.
#[must_use]
pub fn report(status: &MigrationInfo) -> String {
    let ram = &status.ram;
    let pages = |count: u64| {
        let bytes = count.saturating_mul(PAGE_SIZE);
        format!("{count} ({})", size::show(bytes))
    };
    let downtime = status.downtime.map(|time| format!("{time} ms"));
    let mut lines = vec![
        ("status", status.status.name().to_owned()),
        ("total time", format!("{} ms", status.total_time)),
        ("downtime", downtime.unwrap_or_else(|| "none".into())),
        ("transferred", size::show(ram.transferred)),
        ("total memory", size::show(ram.total)),
        ("pages with content", pages(ram.normal)),
        ("zero pages", pages(ram.duplicate)),
        ("pages resent", pages(ram.resent)),
        ("pages skipped by hints", pages(ram.skipped)),
    ];
    if ram.missed > 0 {
        lines.push(("pages missed by tracking", pages(ram.missed)));
    }
    if let Some(tracking) = &status.tracking {
        lines.push((
            "tracking",
            format!("{}: {}", tracking.mode, tracking.reason),
        ));
    }
    if let Some(error) = &status.error_desc {
        lines.push(("error", error.clone()));
    }
    let mut text = fields(&lines);
    if !status.rounds.is_empty() {
        text.push('\n');
        text.push_str(&iteration_table(status));
    }
    text
}

fn iteration_table(status: &MigrationInfo) -> String {
    let head = [
        "iteration",
        "dirty",
        "hinted",
        "content",
        "zeros",
        "sent",
        "hint wait ms",
        "send ms",
        "sync ms",
        "stopped ms",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let ms = |us: u64| format!("{:.1}", Duration::from_micros(us).as_secs_f64() * 1000.0);
    for (iteration, number) in status.rounds.iter().zip(1u64..) {
        let paused = if iteration.paused { " paused" } else { "" };
        rows.push(vec![
            format!("{number}{paused}"),
            iteration.dirty.to_string(),
            iteration.hinted.to_string(),
            iteration.normal.to_string(),
            iteration.duplicate.to_string(),
            size::show(iteration.transferred),
            ms(iteration.hint_wait_us),
            ms(iteration.send_us),
            ms(iteration.sync_us),
            ms(iteration.stopped_us),
        ]);
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use guest_migration::status::{Iteration, RamStats};

    use super::*;

    fn status() -> MigrationInfo {
        let iteration = |dirty, paused| Iteration {
            dirty,
            paused,
            normal: dirty,
            transferred: dirty * PAGE_SIZE,
            send_us: 1500,
            ..Iteration::default()
        };
        MigrationInfo {
            status: MigrationStatus::Completed,
            downtime: Some(12),
            ram: RamStats {
                transferred: 411 << 20,
                remaining: 1 << 20,
                skipped: 2048,
                dirty_sync_count: 2,
                mbps: 812.3,
                ..RamStats::default()
            },
            rounds: vec![iteration(1000, false), iteration(7, true)],
            ..MigrationInfo::default()
        }
    }

    #[test]
    fn the_line_says_what_is_left_and_what_was_spared() {
        assert_eq!(
            line(&status()),
            "completed, iteration 2, 411 MiB sent, 1.00 MiB remaining, 8.00 MiB skipped, 812 Mbit/s"
        );
        let begun = MigrationInfo {
            status: MigrationStatus::Setup,
            ..MigrationInfo::default()
        };
        assert_eq!(line(&begun), "setup");
    }

    #[test]
    fn the_table_has_a_row_for_each_iteration() {
        let text = report(&status());
        assert!(
            text.contains("pages skipped by hints  2048 (8.00 MiB)"),
            "{text}"
        );
        let rows: Vec<&str> = text.lines().rev().take(2).collect();
        assert!(rows[1].starts_with("1           1000"), "{text}");
        assert!(rows[0].starts_with("2 paused       7"), "{text}");
        assert!(!text.contains("missed"), "{text}");
    }

    #[test]
    fn each_end_has_its_exit_status() {
        let end = |state, why: Option<&str>| {
            outcome(&MigrationInfo {
                status: state,
                error_desc: why.map(str::to_owned),
                ..MigrationInfo::default()
            })
        };
        end(MigrationStatus::Completed, None).unwrap();
        assert_eq!(
            end(MigrationStatus::Cancelled, None)
                .unwrap_err()
                .exit_status(),
            4
        );
        let failed = end(MigrationStatus::Failed, Some("receiver has disconnected")).unwrap_err();
        assert_eq!(failed.exit_status(), 1);
        assert_eq!(
            failed.to_string(),
            "migration failed: receiver has disconnected; it has not paused the guest"
        );
    }

    #[test]
    fn a_guest_that_does_not_run_is_not_said_to_run() {
        let message = |guest_paused, downtime| {
            let status = MigrationInfo {
                status: MigrationStatus::Failed,
                error_desc: Some("no space left".into()),
                guest_paused,
                downtime,
                ..MigrationInfo::default()
            };
            outcome(&status).unwrap_err().to_string()
        };
        assert!(message(true, Some(7)).ends_with("still paused, resume it with 'cont' at its VMM"));
        assert!(message(false, Some(7)).ends_with("paused for it and is resumed"));
        assert!(message(false, None).ends_with("has not paused the guest"));
    }
}
