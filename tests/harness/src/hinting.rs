// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rounds of free page hinting, with either device.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use guest_agent::calls::{WaitMemFree, WaitMemSettled};
use guest_agent::ranges::RangeSet;
use serde::Deserialize;
use serde_json::{json, Value};
use shared_abi::features::Features;

use crate::check::MEMORY_TOLERANCE;
use crate::exercise::REPORTING_CAPACITY_BYTES;
use crate::guest::Guest;
use crate::qmp::Qmp;
use crate::zones::Zones;
use crate::{HANG_TIMEOUT, HANG_TIMEOUT_MS, MIB};

/// What `query-free-page-hint` says.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HintStatus {
    /// `stopped`, `requested`, `started`, `finished` or `done`.
    pub status: String,
    /// The command id of the current round.
    pub id: Option<u32>,
    /// Blocks that counted.
    pub blocks: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Bits of the dirty bitmap that they cleared.
    pub pages_cleared: u64,
    /// Bits of the bitmap.
    pub pages_total: u64,
    /// Bits that are set.
    pub pages_dirty: u64,
    /// From the request to the driver's stop, in microseconds.
    pub duration_us: u64,
    /// Blocks that came outside their window.
    #[serde(default)]
    pub ignored_blocks: u64,
}

/// Commands to our daemon.
impl Qmp {
    /// Starts a round (cancelling one that runs) and returns its command id.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn hint_start(&mut self) -> Result<u32> {
        let answer = self.command("free-page-hint-start", json!({}))?;
        let id = answer
            .get("id")
            .and_then(Value::as_u64)
            .with_context(|| format!("no id in {answer}"))?;
        u32::try_from(id).context("a command id has 32 bits")
    }

    /// Closes the window and tells the guest to stop.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn hint_stop(&mut self) -> Result<()> {
        self.command("free-page-hint-stop", json!({})).map(drop)
    }

    /// Lets the guest take its pages back.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn hint_done(&mut self) -> Result<()> {
        self.command("free-page-hint-done", json!({})).map(drop)
    }

    /// Ends one window and opens the next, as a migration does between its rounds.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn hint_sync(&mut self) -> Result<()> {
        self.command("free-page-hint-sync", json!({})).map(drop)
    }

    /// How the round stands.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn hint_status(&mut self) -> Result<HintStatus> {
        self.query("query-free-page-hint")
    }

    /// The memory that need not be sent: runs of clear bits.
    ///
    /// # Errors
    ///
    /// If it is refused.
    pub fn hinted_ranges(&mut self) -> Result<RangeSet> {
        self.query("query-hinted-ranges")
    }

    /// Waits until the round has come to `status`.
    ///
    /// # Errors
    ///
    /// If it has not by [`HANG_TIMEOUT`].
    pub fn wait_hint_status(&mut self, status: &str) -> Result<HintStatus> {
        self.wait_hint(status, |now| now.status == status)
    }

    /// Waits until the round satisfies `wanted`, which `what` describes.
    ///
    /// # Errors
    ///
    /// If it does not by [`HANG_TIMEOUT`].
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
            // Changes of status are events; blocks that come one after the other are not.
            self.wait_event(
                |event| event.name == "FREE_PAGE_HINT",
                Duration::from_millis(20),
            )?;
        }
    }
}

/// Rounds with our device.
impl Guest {
    /// Starts a round and waits until the driver has nothing more to hint; it then holds what it hinted.
    ///
    /// # Errors
    ///
    /// If it is refused, or does not finish.
    pub fn hint_all(&mut self) -> Result<HintStatus> {
        let balloon = self.daemon()?.qmp();
        balloon.hint_start()?;
        balloon.wait_hint_status("finished")
    }

    /// Waits until the kernel's memory use exceeds `before` by `hinted` bytes, and returns the zones. The tolerance is `reported` plus
    /// [`MEMORY_TOLERANCE`].
    ///
    /// The shrinker may reclaim hinted blocks meanwhile. Our driver counts these pages: `reclaimed_before` is its count before the hint round.
    /// The C driver does not count them (`None`): half of `hinted` is enough.
    ///
    /// # Errors
    ///
    /// If it does not by [`HANG_TIMEOUT`].
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
            // Read after the zones. Pages that are reclaimed in between cause another iteration.
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

    /// A whole round, of at least nine tenths of the memory that is free, which the guest has back at its end.
    ///
    /// # Errors
    ///
    /// If it is none.
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

/// What a migration of QEMU's own spared.
#[derive(Clone, Copy, Debug)]
pub struct QemuMigration {
    /// Bytes of memory that it had to consider.
    pub total: u64,
    /// Bytes that it took up, as pages with contents or as zero pages; a page that was taken up twice counts twice.
    pub processed: u64,
    /// Bytes on the wire.
    pub transferred: u64,
}

impl QemuMigration {
    /// Bytes that it never took up: at least so many were hinted.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.total.saturating_sub(self.processed)
    }
}

/// QEMU's own device hints while QEMU migrates; the stream goes nowhere.
impl Guest {
    /// Starts a migration with so little bandwidth that the guest's hints come before its pages are sent, and waits until
    /// the guest has hinted: it then has nearly no free memory.
    ///
    /// # Errors
    ///
    /// If QEMU refuses, or the guest does not hint.
    pub fn start_qemu_migration(&mut self) -> Result<()> {
        let mut free = self.mem_info()?.free();
        if self.features()?.contains(Features::REPORTING) {
            // Pages in a report are free again later.
            free += REPORTING_CAPACITY_BYTES;
        }
        // Only our driver counts its rounds.
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

    /// Lets the migration end, and the guest go on.
    ///
    /// # Errors
    ///
    /// If it fails.
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
    /// If QEMU refuses.
    pub fn cancel_qemu_migration(&mut self) -> Result<()> {
        self.monitor()?
            .command("migrate_cancel", json!({}))
            .map(drop)
    }
}

/// Rounds while the guest does something else.
impl Guest {
    /// Does `work`, and meanwhile from another connection one round after the other: each finishes, holds its blocks for
    /// `hold`, and is done. The work can see how many rounds have been done. Returns what it did and how many rounds there were.
    ///
    /// # Errors
    ///
    /// If the work or a round fails.
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
