// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hint rounds, with our device and with QEMU's own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use guest_agent::calls::{WaitMemFree, WaitMemSettled};
use guest_agent::ranges::{PhysicalRange, RangeSet};
use serde::Deserialize;
use serde_json::{json, Value};
use shared_abi::features::Features;

use crate::check::MEMORY_TOLERANCE;
use crate::exercise::REPORTING_CAPACITY_BYTES;
use crate::guest::Guest;
use crate::qmp::Qmp;
use crate::zones::Zones;
use crate::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};

/// The answer to `query-free-page-hint`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HintStatus {
    /// `stopped`, `requested`, `started`, `finished` or `done`.
    pub status: String,
    /// The command id of the last hint round.
    pub id: Option<u32>,
    /// The number of free blocks that counted in the hint round.
    pub blocks: u64,
    /// The size of these blocks, in bytes.
    pub bytes: u64,
    /// The number of bits in the dirty bitmap that these blocks cleared.
    pub pages_cleared: u64,
    /// The number of bits in the dirty bitmap.
    pub pages_total: u64,
    /// The number of bits that are set.
    pub pages_dirty: u64,
    /// The time from the request to the driver's STOP, in microseconds.
    pub duration_us: u64,
    /// The number of free blocks that did not count, in all hint rounds.
    #[serde(default)]
    pub ignored_blocks: u64,
}

/// Commands of our daemon.
impl Qmp {
    /// Starts a hint round and returns its command id. Cancels a running hint round.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn hint_start(&mut self) -> Result<u32> {
        let answer = self.command("free-page-hint-start", json!({}))?;
        let id = answer
            .get("id")
            .and_then(Value::as_u64)
            .with_context(|| format!("no id in {answer}"))?;
        u32::try_from(id).context("a command id has 32 bits")
    }

    /// Closes the hint window and asks the driver to stop.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn hint_stop(&mut self) -> Result<()> {
        self.command("free-page-hint-stop", json!({})).map(drop)
    }

    /// Ends the hint round: the driver may free its hinted blocks.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn hint_done(&mut self) -> Result<()> {
        self.command("free-page-hint-done", json!({})).map(drop)
    }

    /// Closes the hint window and opens the next one, as a dirty sync of a migration does.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn hint_sync(&mut self) -> Result<()> {
        self.command("free-page-hint-sync", json!({})).map(drop)
    }

    /// Returns the status of the hint round.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn hint_status(&mut self) -> Result<HintStatus> {
        self.query("query-free-page-hint")
    }

    /// Returns the memory that a migration need not send: the runs of clear bits in the dirty bitmap.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses.
    pub fn hinted_ranges(&mut self) -> Result<RangeSet> {
        let (mut ranges, mut start) = (Vec::new(), 0);
        loop {
            // An answer has a limited number of ranges.
            let answer = self.command("query-hinted-ranges", json!({ "start": start }))?;
            let next: Vec<PhysicalRange> = serde_json::from_value(answer)?;
            match next.last() {
                Some(last) => start = last.end(),
                None => return Ok(ranges.into_iter().collect()),
            }
            ranges.extend(next);
        }
    }

    /// Waits until the hint round has reached `status`.
    ///
    /// # Errors
    ///
    /// Fails if the hint round does not reach it within [`HANG_TIMEOUT`].
    pub fn wait_hint_status(&mut self, status: &str) -> Result<HintStatus> {
        self.wait_hint(status, |now| now.status == status)
    }

    /// Waits until the hint round satisfies `wanted`. `what` describes the condition in error messages.
    ///
    /// # Errors
    ///
    /// Fails if the hint round does not satisfy it within [`HANG_TIMEOUT`].
    pub fn wait_hint(
        &mut self,
        what: &str,
        wanted: impl Fn(&HintStatus) -> bool,
    ) -> Result<HintStatus> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let now = self.hint_status()?;
            if wanted(&now) {
                return Ok(now);
            }
            if Instant::now() > deadline {
                bail!("the round did not come to {what:?} within {HANG_TIMEOUT:?}: {now:?}");
            }
            // The daemon sends events for changes of the status, but not for each block.
            self.wait_event(
                |event| event.name == "FREE_PAGE_HINT",
                Duration::from_millis(20),
            )?;
        }
    }
}

/// Hint rounds with our device.
impl Guest {
    /// Starts a hint round and waits for the driver's STOP. The driver keeps its hinted blocks until DONE.
    ///
    /// # Errors
    ///
    /// Fails if the daemon refuses, or the hint round does not finish.
    pub fn hint_all(&mut self) -> Result<HintStatus> {
        let balloon = self.daemon()?.qmp();
        balloon.hint_start()?;
        balloon.wait_hint_status("finished")
    }

    /// Waits until the kernel's memory use exceeds `before` by `hinted` bytes, and returns the zones. The tolerance is
    /// `reported` plus [`MEMORY_TOLERANCE`].
    ///
    /// The shrinker may reclaim hinted blocks meanwhile. Our driver counts reclaimed pages: `reclaimed_before` is its
    /// count before the hint round. The C driver does not count them (`None`): half of `hinted` is enough.
    ///
    /// # Errors
    ///
    /// Fails if the kernel's memory use does not reach this range within [`HANG_TIMEOUT`].
    pub fn wait_hinted_memory_use(
        &mut self,
        before: u64,
        hinted: u64,
        reclaimed_before: Option<u64>,
        reported: u64,
    ) -> Result<Zones> {
        let tolerance = reported + MEMORY_TOLERANCE;
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let zones_while_hinted = self.zones()?;
            let used = zones_while_hinted.used_by_kernel() * zones_while_hinted.page_size();
            let hinted_use = used.saturating_sub(before);
            // Read the counter after the zones. Pages that the shrinker reclaims in between cause another sample.
            let back = match reclaimed_before {
                Some(earlier) => {
                    let now = self.counters()?.get("returned_pages")?;
                    Some((now - earlier) * zones_while_hinted.page_size())
                }
                None => None,
            };
            let is_expected = match back {
                Some(back) => (hinted_use + back).abs_diff(hinted) < tolerance,
                None => hinted_use < hinted + tolerance && hinted_use + reported >= hinted / 2,
            };
            if is_expected {
                return Ok(zones_while_hinted);
            }
            ensure!(
                Instant::now() < deadline,
                "{hinted} bytes were hinted, and the kernel uses {hinted_use} more than {before}; {back:?} went back: {zones_while_hinted:?}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Runs a complete hint round over at least nine tenths of the free memory, and checks that the guest has its
    /// memory back.
    ///
    /// # Errors
    ///
    /// Fails if the hint round covers less, or memory is missing afterwards.
    pub fn full_hint_round(&mut self) -> Result<HintStatus> {
        let before = self.settled_memory_usage()?;
        let hint_round = self.hint_all()?;
        ensure!(
            hint_round.bytes >= before.free / 10 * 9,
            "{} bytes were hinted of {before:?} that were free: {hint_round:?}",
            hint_round.bytes
        );
        self.daemon()?.qmp().hint_done()?;
        self.check_memory(before)?;
        Ok(hint_round)
    }
}

/// The result of a migration by QEMU.
#[derive(Clone, Copy, Debug)]
pub struct QemuMigration {
    /// The size of the guest's memory, in bytes.
    pub total: u64,
    /// The size of the pages that QEMU has processed, as pages with contents or as zero pages, in bytes. A page that
    /// QEMU processed twice counts twice.
    pub processed: u64,
    /// The number of bytes on the wire.
    pub transferred: u64,
}

impl QemuMigration {
    /// Returns the size of the memory that QEMU never processed, in bytes. At least this much was hinted.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.total.saturating_sub(self.processed)
    }
}

/// Hint rounds with QEMU's own device, while QEMU migrates to a command that discards the stream.
impl Guest {
    /// Starts a migration with low bandwidth, so that the guest's hints arrive before QEMU sends the pages. Waits until
    /// the guest has hinted.
    ///
    /// Our driver counts finished hint rounds. With the C driver, this function waits until the guest has nearly no
    /// free memory.
    ///
    /// # Errors
    ///
    /// Fails if QEMU refuses, or the guest does not hint.
    pub fn start_qemu_migration(&mut self) -> Result<()> {
        let mut free = self.mem_info()?.free();
        if self.features()?.contains(Features::REPORTING) {
            // Pages in a report become free again later.
            free += REPORTING_CAPACITY_BYTES;
        }
        // Only our driver counts its hint rounds.
        let hint_rounds = if self.devices_with_counters()?.is_empty() {
            None
        } else {
            Some(self.counters()?.get("rounds_finished")?)
        };
        let monitor = self.monitor()?;
        let parameters = json!({ "max-bandwidth": MIB });
        monitor.command("migrate-set-parameters", parameters)?;
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        monitor.command("migrate-set-capabilities", events)?;
        monitor.command("migrate", json!({ "uri": "exec:cat >/dev/null" }))?;
        if let Some(hint_rounds) = hint_rounds {
            self.wait_counter("rounds_finished", hint_rounds + 1, HANG_TIMEOUT)?;
            return Ok(());
        }
        self.call(WaitMemFree {
            at_least: 0,
            at_most: free / 10,
            timeout_ms: HANG_TIMEOUT_MS,
        })
        .context("the driver did not take its free memory to hint it")?;
        self.call(WaitMemSettled {
            tolerance: MIB,
            stable_samples: 30,
            timeout_ms: HANG_TIMEOUT_MS,
        })?;
        Ok(())
    }

    /// Raises the bandwidth, waits until the migration has completed, and resumes the guest.
    ///
    /// # Errors
    ///
    /// Fails if the migration fails.
    pub fn finish_qemu_migration(&mut self) -> Result<QemuMigration> {
        #[derive(Deserialize)]
        struct Answer {
            status: String,
            ram: Option<Ram>,
        }
        #[derive(Deserialize)]
        struct RunState {
            status: String,
        }
        #[derive(Deserialize)]
        struct Ram {
            total: u64,
            normal: u64,
            duplicate: u64,
            transferred: u64,
            #[serde(rename = "page-size")]
            page_size: u64,
        }
        let monitor = self.monitor()?;
        monitor.command(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 1024 * MIB }),
        )?;
        let deadline = Instant::now() + HANG_TIMEOUT;
        let ram = loop {
            let answer: Answer = monitor.query("query-migrate")?;
            match answer.status.as_str() {
                "completed" => break answer.ram.context("a migration without memory")?,
                "failed" | "cancelled" => bail!("the migration {}", answer.status),
                status => ensure!(
                    Instant::now() < deadline,
                    "the migration is still {status} after {HANG_TIMEOUT:?}"
                ),
            }
            monitor.wait_event(
                |event| event.name == "MIGRATION",
                Duration::from_millis(100),
            )?;
        };
        loop {
            let state: RunState = monitor.query("query-status")?;
            if state.status == "postmigrate" {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "QEMU is still {} after its migration",
                state.status
            );
            monitor.wait_event(|_| true, Duration::from_millis(20))?;
        }
        monitor.command("cont", json!({}))?;
        let processed = (ram.normal + ram.duplicate) * ram.page_size;
        Ok(QemuMigration {
            total: ram.total,
            processed,
            transferred: ram.transferred,
        })
    }

    /// Cancels the migration.
    ///
    /// # Errors
    ///
    /// Fails if QEMU refuses.
    pub fn cancel_qemu_migration(&mut self) -> Result<()> {
        self.monitor()?
            .command("migrate_cancel", json!({}))
            .map(drop)
    }
}

/// Hint rounds during other work.
impl Guest {
    /// Runs `work`, and at the same time runs hint rounds on another connection, one after the other. Each hint round
    /// finishes, keeps its hinted blocks for `hold`, and is done. `work` gets the number of completed hint rounds.
    /// Returns the result of `work` and the number of hint rounds.
    ///
    /// # Errors
    ///
    /// Fails if `work` or a hint round fails.
    pub fn with_hint_rounds<T>(
        &mut self,
        hold: Duration,
        work: impl FnOnce(&mut Self, &AtomicU64) -> Result<T>,
    ) -> Result<(T, u64)> {
        let mut client = self.daemon()?.connect()?;
        let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let hint_rounds = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::Relaxed) {
                    client.hint_start()?;
                    client.wait_hint_status("finished")?;
                    thread::sleep(hold);
                    client.hint_done()?;
                    count.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            let done = work(self, &count);
            stop.store(true, Ordering::Relaxed);
            hint_rounds
                .join()
                .map_err(|_| anyhow!("the rounds panicked"))??;
            Ok((done?, count.load(Ordering::Relaxed)))
        })
    }
}
