// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The handlers of the balloon's commands.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{json, Map, Value};
use shared_abi::features::Features;

use super::command::{expect_no_arguments, parse, CommandError};
use super::context::CommandContext;
use crate::device::hinting::hinted_ranges;
use crate::device::{phase_name, StatsReport};
use crate::device_lock::DeviceLock;
use crate::sync::lock;

/// How long `query-guest-stats` waits for the driver.
const STATS_TIMEOUT: Duration = Duration::from_secs(1);

/// The most ranges in one answer of `query-hinted-ranges`: less than 64 KiB of text.
const MAX_RANGES: usize = 1024;

pub(super) fn balloon(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        value: u64,
    }
    let Arguments { value } = parse(arguments)?;
    lock(&context.device).set_target(value)?;
    Ok(json!({}))
}

pub(super) fn query_balloon(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let mut device = lock(&context.device);
    device.detect_driver_gone();
    let actual = device.actual_size()?;
    let discard = device.discard_status();
    Ok(json!({
        "actual": actual,
        "discard-inhibited": discard.is_inhibited,
        "discard-inhibited-by": discard.reasons,
    }))
}

pub(super) fn inhibit_discard(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    lock(&context.device).inhibit_discard(true);
    Ok(json!({}))
}

pub(super) fn allow_discard(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    lock(&context.device).inhibit_discard(false);
    Ok(json!({}))
}

pub(super) fn query_version(
    _: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    Ok(json!({ "vhost-device-balloon": env!("CARGO_PKG_VERSION"), "package": "" }))
}

pub(super) fn hint_start(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let id = context.device.start_hinting()?;
    Ok(json!({ "id": id.number() }))
}

pub(super) fn hint_sync(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let id = lock(&context.device).sync_hinting()?;
    Ok(json!({ "id": id.number() }))
}

pub(super) fn hint_stop(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let mut device = lock(&context.device);
    device.check_unclaimed()?;
    device.stop_hinting();
    Ok(json!({}))
}

pub(super) fn hint_done(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let mut device = lock(&context.device);
    device.check_unclaimed()?;
    device.finish_hinting();
    Ok(json!({}))
}

pub(super) fn query_hint(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let status = {
        let mut device = lock(&context.device);
        device.detect_driver_gone();
        device.hinting_status()
    };
    let mut answer = json!({
        "status": phase_name(status.phase),
        "blocks": status.blocks,
        "bytes": status.bytes,
        "pages-cleared": status.pages_cleared,
        "pages-total": status.pages_total,
        "pages-dirty": status.pages_dirty,
        "duration-us": u64::try_from(status.duration.as_micros()).unwrap_or(u64::MAX),
        "bytes-discarded": status.bytes_discarded,
        "ignored-blocks": status.ignored_blocks,
        "stale-commands": status.stale_commands,
    });
    if let (Some(id), Some(answer)) = (status.id, answer.as_object_mut()) {
        answer.insert("id".into(), id.number().into());
    }
    Ok(answer)
}

/// Returns the ranges of pages that hints have skipped, at most [`MAX_RANGES`] in one answer: the guest determines their
/// number. To get the rest, a client calls again with the end of the last range as `start`, until the answer is empty.
pub(super) fn query_hinted_ranges(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        #[serde(default)]
        start: u64,
    }
    let Arguments { start } = parse(arguments)?;
    let bitmap = lock(&context.device).hinting_bitmap();
    let ranges = bitmap.map(|bitmap| hinted_ranges(&bitmap, start, MAX_RANGES));
    Ok(ranges
        .unwrap_or_default()
        .into_iter()
        .map(|(start, length)| json!({ "start": start, "length": length }))
        .collect())
}

pub(super) fn query_guest_memory(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let ram = lock(&context.device).ram();
    let allocated = ram.allocated().map_err(CommandError::Memory)?;
    let regions: Vec<Value> = allocated
        .regions
        .iter()
        .map(|(start, length, bytes)| {
            json!({ "start": start, "length": length, "allocated": bytes })
        })
        .collect();
    Ok(json!({ "regions": regions, "allocated": allocated.total }))
}

pub(super) fn query_virtio_status(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let status = {
        let mut device = lock(&context.device);
        device.detect_driver_gone();
        device.virtio_status()
    };
    let names = |features: Features| features.names().collect::<Vec<_>>();
    let queues: Vec<Value> = status
        .queues
        .iter()
        .map(|queue| {
            json!({
                "name": queue.queue.name(),
                "index": queue.index,
                "notifications": queue.notifications,
                "wakeups": queue.wakeups,
                "interrupts": queue.interrupts,
                "requests": queue.requests,
            })
        })
        .collect();
    let state = match (status.is_connected, status.is_running) {
        (false, _) => "no-front-end",
        (true, false) => "no-driver",
        (true, true) => "running",
    };
    // A paused guest has a driver whose queues are stopped.
    let driver = match (status.negotiated_features, status.is_running) {
        (None, _) => "none",
        (Some(_), false) => "stopped",
        (Some(_), true) => "running",
    };
    Ok(json!({
        "connected": status.is_connected,
        "status": state,
        "driver": driver,
        "memory-shared": status.is_memory_shared,
        "offered-features": names(status.offered_features),
        "negotiated-features": names(status.negotiated_features.unwrap_or_default()),
        "poison-val": status.poison_val,
        "queues": queues,
        "config-reads": status.config_reads,
        "config-writes": status.config_writes,
        "config-changes": status.config_changes,
        "discards-hinted": status.discards_hinted,
        "pages-inflated": status.pages_inflated,
        "pages-deflated": status.pages_deflated,
        "bytes-released": status.bytes_released,
        "bytes-reported": status.bytes_reported,
        "punches": status.punches,
        "errors": status.errors,
        "last-error": status.last_error,
    }))
}

pub(super) fn query_device_state(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let state = lock(&context.device).saved_state();
    Ok(serde_json::to_value(state)?)
}

pub(super) fn save_device_state(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        filename: PathBuf,
    }
    let Arguments { filename } = parse(arguments)?;
    // Not under the device's lock: writing a file may take long.
    let state = lock(&context.device).saved_state();
    (context.save_state)(&state, &filename)?;
    Ok(json!({}))
}

/// Requests statistics from the guest, and waits for at most [`STATS_TIMEOUT`]. Without an answer, returns the
/// previous statistics; `last-update` shows their age.
pub(super) fn query_guest_stats(
    context: &CommandContext,
    arguments: Option<&Value>,
) -> Result<Value, CommandError> {
    expect_no_arguments(arguments)?;
    let (before, requested) = {
        let mut device = lock(&context.device);
        (device.stats().generation, device.request_stats())
    };
    let report = wait_for_stats(&context.device, before, requested);
    let Some(updated) = report.updated else {
        return Err(CommandError::NoStats);
    };
    let values: Map<String, Value> = report
        .values
        .iter()
        .map(|(tag, value)| (tag.qemu_name().to_owned(), (*value).into()))
        .collect();
    let updated = updated.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(json!({ "stats": values, "last-update": updated.as_secs() }))
}

fn wait_for_stats(device: &DeviceLock, before: u64, requested: bool) -> StatsReport {
    let deadline = Instant::now() + STATS_TIMEOUT;
    loop {
        let report = lock(device).stats();
        if !requested || report.generation != before || Instant::now() >= deadline {
            return report;
        }
        thread::sleep(Duration::from_millis(2));
    }
}
