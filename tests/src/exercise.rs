// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that our driver and a device have agreed on, tried once.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::WriteFile;
use serde::Deserialize;
use serde_json::{json, Map, Value};
use shared_abi::features::Features;

use crate::guest::Guest;
use crate::qmp::Refusal;
use crate::vmm::qemu::BALLOON_ID;
use crate::{HANG_LIMIT, MIB};

/// How much goes into the balloon and comes out again.
const RESIZE_BY: u64 = 24 * MIB;

impl Guest {
    /// What the driver and the device have agreed on, as the guest's kernel says.
    ///
    /// # Errors
    ///
    /// If there is not one device, or no driver for it.
    pub fn features(&mut self) -> Result<Features> {
        let balloon = self.balloon_device()?;
        ensure!(balloon.driver.is_some(), "{balloon:?} has no driver");
        Ok(Features::from_bits(balloon.features))
    }

    /// Inflates and deflates; asks for statistics, a round of hints and reports of free pages if these were agreed on,
    /// and sees them refused if not. Returns what was agreed on. The guest has all its memory back at the end.
    ///
    /// # Errors
    ///
    /// If anything of this fails.
    pub fn exercise(&mut self) -> Result<Features> {
        let features = self.features()?;
        let free = self.settled_free()?;
        self.resize().context("inflating and deflating")?;
        self.try_statistics(features.contains(Features::STATS_VQ))
            .context("statistics")?;
        // First, and to its end: what is being reported cannot be hinted.
        self.try_reporting(features.contains(Features::REPORTING))
            .context("reporting")?;
        self.try_hinting(features.contains(Features::FREE_PAGE_HINT))
            .context("hinting")?;
        self.check_free(free)?;
        Ok(features)
    }

    fn resize(&mut self) -> Result<()> {
        let balloon = self.balloon()?;
        let whole = balloon.balloon_actual()?;
        for target in [whole - RESIZE_BY, whole] {
            balloon.balloon(target)?;
            balloon.wait_balloon(target, HANG_LIMIT)?;
        }
        Ok(())
    }

    fn try_statistics(&mut self, agreed: bool) -> Result<()> {
        if self.daemon.is_none() {
            return if agreed {
                self.qemu_statistics()
            } else {
                Ok(())
            };
        }
        if !agreed {
            return match self.statistics() {
                Ok(statistics) => bail!("there are statistics: {statistics:?}"),
                Err(error) => refused(&error),
            };
        }
        // The device answers with what it has, if anything, while the guest takes its time.
        let deadline = Instant::now() + HANG_LIMIT;
        loop {
            let statistics = self.statistics();
            let total = statistics.as_ref().ok().and_then(|statistics| {
                let total = statistics.get("stat-total-memory")?;
                total.as_u64()
            });
            if total.is_some_and(|total| total > self.memory() / 2) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{statistics:?}");
            sleep(Duration::from_millis(20));
        }
    }

    /// The statistics of our device, for which it asks the guest.
    ///
    /// # Errors
    ///
    /// If it refuses.
    pub fn statistics(&mut self) -> Result<Map<String, Value>> {
        #[derive(Deserialize)]
        struct Answer {
            stats: Map<String, Value>,
        }
        let answer: Answer = self.daemon()?.qmp().query("query-guest-stats")?;
        Ok(answer.stats)
    }

    /// Has QEMU's device ask for statistics, and waits for new ones.
    fn qemu_statistics(&mut self) -> Result<()> {
        const INTERVAL_SECONDS: u64 = 1;
        let path = format!("/machine/peripheral/{BALLOON_ID}");
        let set = |property: &str, value: u64| json!({ "path": path, "property": property, "value": value });
        let get = json!({ "path": path, "property": "guest-stats" });
        let monitor = self.monitor()?;
        let updated = |answer: &Value| answer.get("last-update").and_then(Value::as_u64);
        let interval = "guest-stats-polling-interval";
        monitor.command("qom-set", set(interval, INTERVAL_SECONDS))?;
        let deadline = Instant::now() + HANG_LIMIT;
        let before = updated(&monitor.command("qom-get", get.clone())?);
        loop {
            let answer = monitor.command("qom-get", get.clone())?;
            if updated(&answer) > before {
                let total = answer.pointer("/stats/stat-total-memory");
                let total = total.and_then(Value::as_u64).unwrap_or_default();
                monitor.command("qom-set", set(interval, 0))?;
                ensure!(total > self.memory() / 2, "{answer}");
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no new statistics: {answer}");
            sleep(Duration::from_millis(20));
        }
    }

    fn try_hinting(&mut self, agreed: bool) -> Result<()> {
        match (self.daemon.is_some(), agreed) {
            (true, true) => self.whole_round_in_the_end(),
            (true, false) => match self.daemon()?.qmp().hint_start() {
                Ok(id) => bail!("the round {id:#x} was not refused"),
                Err(error) => refused(&error),
            },
            (false, true) => {
                self.start_qemu_migration()?;
                let migration = self.finish_qemu_migration()?;
                let all = migration.total;
                ensure!(migration.spared() > all / 4, "{migration:?}");
                Ok(())
            }
            // A migration without hints shows nothing.
            (false, false) => Ok(()),
        }
    }

    /// A round of nearly all that is free. What the kernel is reporting at the moment cannot be hinted; that comes to an end, and the
    /// kernel does not say when.
    fn whole_round_in_the_end(&mut self) -> Result<()> {
        let deadline = Instant::now() + HANG_LIMIT;
        loop {
            match self.whole_round() {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => self.daemon()?.qmp().hint_done()?,
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the kernel has reported pages.
    fn try_reporting(&mut self, agreed: bool) -> Result<()> {
        if !agreed {
            let pages = self.counters()?.get("reported_pages")?;
            ensure!(pages == 0, "{pages} pages were reported");
            return Ok(());
        }
        self.wait_counter("reported_pages", 1, HANG_LIMIT)?;
        if let Some(daemon) = &mut self.daemon {
            let status = daemon.virtio_status()?;
            ensure!(status.bytes_reported > 0, "nothing came: {status:?}");
        }
        Ok(())
    }

    /// Has the kernel report free pages at short intervals: it waits two seconds otherwise.
    ///
    /// # Errors
    ///
    /// If it does not have this control.
    pub fn hurry_reporting(&mut self) -> Result<()> {
        self.call(WriteFile {
            path: "/sys/module/page_reporting/parameters/page_reporting_delay_ms".into(),
            text: "20".into(),
        })
    }
}

/// Whether an error is the device's refusal.
fn refused(error: &anyhow::Error) -> Result<()> {
    match error.downcast_ref::<Refusal>() {
        Some(_) => Ok(()),
        None => bail!("not refused: {error:#}"),
    }
}
