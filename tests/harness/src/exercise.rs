// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Uses every feature that driver and device have negotiated, once.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{Fill, Free, KeptPages, Release, Verify, WriteFile};
use serde::Deserialize;
use serde_json::{json, Map, Value};
use shared_abi::features::Features;

use crate::check::{MemoryUsage, MEMORY_TOLERANCE};
use crate::guest::{Driver, Guest};
use crate::qmp::QmpError;
use crate::vmm::qemu::BALLOON_ID;
use crate::{HANG_TIMEOUT, MIB};

/// The size by which [`Guest::exercise`] inflates and deflates, in bytes.
const RESIZE_BY: u64 = 24 * MIB;
/// The memory that the guest's own programs and per-CPU lists may take during a hint round, in bytes.
const OWN_USE: u64 = 2 * MIB;
const PAGE: u64 = 4096;
/// The maximum that a process fills to keep a part of it, in bytes.
const MOST_FILLED: u64 = 128 * MIB;
/// The maximum that the kernel may be reporting at a time: 32 free blocks of the largest order. This memory is neither
/// in the free lists nor hinted.
pub(crate) const REPORTING_CAPACITY_BYTES: u64 = 32 * 4 * MIB;

/// Requests on the inflate and deflate queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RequestCounts {
    inflate: u64,
    deflate: u64,
}

impl Guest {
    /// Returns the negotiated features, as the guest's kernel shows them.
    ///
    /// # Errors
    ///
    /// Fails if the guest has not exactly one balloon device, or the device has no driver.
    pub fn features(&mut self) -> Result<Features> {
        let balloon = self.balloon_device()?;
        ensure!(balloon.driver.is_some(), "{balloon:?} has no driver");
        Ok(Features::from_bits(balloon.features))
    }

    /// Inflates and deflates, and uses statistics, hinting and reporting if they are negotiated. Otherwise checks that
    /// our device refuses them or gets no reports. Returns the negotiated features. At the end, the guest has its
    /// memory back.
    ///
    /// # Errors
    ///
    /// Fails if any of this fails.
    pub fn exercise(&mut self) -> Result<Features> {
        let features = self.features()?;
        let before = self.settled_memory_usage_without_reports(features)?;
        self.resize().context("inflating and deflating")?;
        self.try_statistics(features.contains(Features::STATS_VQ))
            .context("statistics")?;
        // Reporting comes before hinting, and must end first: pages in a report cannot be hinted.
        self.try_reporting(features.contains(Features::REPORTING))
            .context("reporting")?;
        self.try_hinting(features.contains(Features::FREE_PAGE_HINT), before)
            .context("hinting")?;
        self.check_memory(before)?;
        Ok(features)
    }

    /// Does the same as [`Guest::exercise`], on any machine and with any driver, and does more:
    ///
    /// - Half of the free memory goes into the balloon, with a change of the target on the way.
    /// - A hint round runs around pages that a process keeps.
    /// - The watermarks of the zones and the counters of our driver are checked.
    ///
    /// If the device takes free page reports, the driver must be its first one.
    ///
    /// # Errors
    ///
    /// Fails if any of this fails.
    pub fn exercise_fully(&mut self) -> Result<Features> {
        let driver = self.driver()?;
        let features = self.features()?;
        let before = self.settled_memory_usage_without_reports(features)?;
        let whole = self.balloon_qmp()?.balloon_actual()?;
        let earlier = match driver {
            Driver::Ours => self.requests_before_load()?,
            Driver::C => RequestCounts::default(),
        };
        let half = before.free / 2 / MIB * MIB;
        self.inflate_with_retarget(whole, half)
            .context("inflating")?;
        if driver == Driver::Ours {
            let counters = self.counters()?;
            let pages = (
                counters.get("balloon_pages")?,
                counters.get("target_pages")?,
            );
            ensure!(pages == (half / PAGE, half / PAGE), "{half}: {counters:?}");
        }
        self.try_statistics(features.contains(Features::STATS_VQ))
            .context("statistics")?;
        self.try_reporting(features.contains(Features::REPORTING))
            .context("reporting")?;
        let hints = features.contains(Features::FREE_PAGE_HINT);
        if self.daemon.is_some() && hints {
            self.check_kept_pages_not_hinted(driver, features)
                .context("hinting")?;
        }
        self.balloon_qmp()?.set_balloon(whole)?;
        self.balloon_qmp()?
            .wait_balloon_with_progress(whole, HANG_TIMEOUT)
            .context("deflating")?;
        self.check_memory(before).context("once deflated")?;
        if self.daemon.is_none() {
            // With an empty balloon, the migration can skip more.
            self.try_hinting(hints, before).context("hinting")?;
            self.check_memory(before).context("once hinted")?;
        }
        if driver == Driver::Ours {
            self.check_counters(earlier).context("counters")?;
        }
        Ok(features)
    }

    /// Does the same as [`Guest::settled_memory_usage`]. If free page reporting is negotiated, returns the lowest use
    /// of several samples, because pages in a report count as used. Differences within the tolerance are ignored.
    fn settled_memory_usage_without_reports(&mut self, features: Features) -> Result<MemoryUsage> {
        const SAMPLES: u32 = 8;
        let mut least = self.settled_memory_usage()?;
        if features.contains(Features::REPORTING) {
            for _ in 0..SAMPLES {
                sleep(Duration::from_millis(20));
                let now = self.memory_usage()?;
                if now.used + MEMORY_TOLERANCE < least.used {
                    least = now;
                }
            }
        }
        Ok(least)
    }

    /// Returns the driver of the guest's only balloon.
    ///
    /// # Errors
    ///
    /// Fails if the guest has not exactly one balloon, or neither driver is bound to it.
    pub fn driver(&mut self) -> Result<Driver> {
        let balloon = self.balloon_device()?;
        let names = [Driver::Ours, Driver::C].into_iter();
        let mut of = names.filter(|driver| balloon.driver.as_deref() == Some(driver.module_name()));
        of.next()
            .with_context(|| format!("{balloon:?} has neither driver"))
    }

    fn inflate_with_retarget(&mut self, whole: u64, by: u64) -> Result<()> {
        let balloon = self.balloon_qmp()?;
        balloon.set_balloon(whole - by)?;
        // The driver is inflating now. The targets below change its direction.
        balloon.wait_balloon_below(whole, HANG_TIMEOUT)?;
        for target in [whole - by / 2, whole - by] {
            balloon.set_balloon(target)?;
            balloon.wait_balloon_with_progress(target, HANG_TIMEOUT)?;
        }
        Ok(())
    }

    /// Runs a hint round while a process keeps one page in 64 of a part of memory. Checks that none of these pages is
    /// hinted, that the hint round leaves the memory that it must leave, and that the pages keep their contents.
    fn check_kept_pages_not_hinted(&mut self, driver: Driver, features: Features) -> Result<()> {
        // The order of the smallest free blocks that the driver hints.
        let order = match driver {
            Driver::Ours => 4,
            Driver::C => 10,
        };
        let bytes = (self.settled_memory_usage()?.free / 4).min(MOST_FILLED);
        let filled = self.call(Fill {
            bytes,
            keep_every: 64,
            seed: 31,
        })?;
        let workload = filled.workload;
        self.call(Release { workload })?;
        let settled_memory_usage = self.settled_memory_usage()?;
        let counted = match driver {
            Driver::Ours => Some(self.counters()?),
            Driver::C => None,
        };
        let before = self.zones()?;
        let hint_round = self.hint_all()?;

        let hinted = self.daemon()?.qmp().hinted_ranges()?;
        ensure!(
            hinted.bytes() == hint_round.pages_cleared * PAGE && hinted.bytes() == hint_round.bytes,
            "{} bytes of clear bits, {hint_round:?}",
            hinted.bytes()
        );
        let kept = self.call(KeptPages { workload })?;
        let wrong = hinted.intersection(&kept);
        ensure!(
            wrong.ranges().is_empty() && kept.bytes() > 0,
            "kept pages were hinted: {wrong:x?}"
        );
        let reported = if features.contains(Features::REPORTING) {
            REPORTING_CAPACITY_BYTES
        } else {
            0
        };
        let used = before.used_by_kernel() * PAGE;
        let reclaimed_before = match &counted {
            Some(counted) => Some(counted.get("returned_pages")?),
            None => None,
        };
        let zones_while_hinted = self
            .wait_hinted_memory_use(used, hinted.bytes(), reclaimed_before, reported)
            .with_context(|| format!("{hint_round:?}, before {before:?}"))?;
        ensure!(
            zones_while_hinted.free_cma() * PAGE + OWN_USE >= before.free_cma() * PAGE,
            "of {} pages that were free for contiguous allocations {} are left",
            before.free_cma(),
            zones_while_hinted.free_cma()
        );
        let mut hintable = before.free_for_kernel_from_order(order);
        if let Some(counted) = counted {
            // The driver counts a hint round after it has sent STOP.
            let hint_rounds = counted.get("rounds_finished")? + 1;
            let now = self.wait_counter("rounds_finished", hint_rounds, HANG_TIMEOUT)?;
            let more = |key| Ok::<_, anyhow::Error>(now.get(key)? - counted.get(key)?);
            let sums = (
                more("rounds_started")?,
                more("rounds_finished")?,
                more("hinted_blocks")?,
                more("hinted_bytes")?,
            );
            ensure!(
                sums == (1, 1, hint_round.blocks, hint_round.bytes),
                "counted {sums:?} of {hint_round:?}"
            );
            let reserve = now.get("hint_reserve_pages")?;
            ensure!(
                zones_while_hinted.free_for_kernel() + OWN_USE / PAGE >= reserve,
                "the reserve is {reserve} pages, and {} are free that hinting can use: {zones_while_hinted:?}",
                zones_while_hinted.free_for_kernel()
            );
            for (zone, before) in zones_while_hinted.zones.iter().zip(&before.zones) {
                ensure!(
                    zone.free + OWN_USE / PAGE >= zone.low.min(before.free),
                    "a zone was emptied: {zone:?}, {before:?}"
                );
            }
            hintable = hintable.saturating_sub(reserve);
        }
        hintable = hintable.saturating_sub(reported / PAGE);
        ensure!(
            hinted.bytes() >= hintable * PAGE / 2 && hinted.bytes() > 0,
            "{} bytes were hinted, and {} could have been: {before:?}",
            hinted.bytes(),
            hintable * PAGE
        );

        self.daemon()?.qmp().hint_done()?;
        self.check_memory_uncompacted(settled_memory_usage)?;
        let found = self.call(Verify { workload })?;
        ensure!(found.wrong == 0 && found.pages == filled.kept, "{found:?}");
        self.call(Free { workload })
    }

    /// Checks that the counts of our driver since it was loaded agree with the counts of the device. The balloon must
    /// be empty.
    fn check_counters(&mut self, earlier: RequestCounts) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let counters = self.counters()?;
            let empty = [
                "balloon_pages",
                "target_pages",
                "shortages",
                "failed_reports",
            ];
            for key in empty {
                ensure!(counters.get(key)? == 0, "{key}: {counters:?}");
            }
            ensure!(counters.get("inflate_requests")? > 0, "{counters:?}");
            if self.daemon.is_none() {
                return Ok(());
            }
            ensure!(
                self.requests_before_load()? == earlier,
                "{counters:?}, {earlier:?}"
            );
            let status = self.daemon()?.virtio_status()?;
            // The kernel may be reporting at this moment.
            if counters.get("reported_pages")? * PAGE == status.bytes_reported {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "reports: {counters:?}, {status:?}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Returns the requests on the inflate and deflate queues that the device has taken and our driver has not counted:
    /// those from before the driver was loaded. The driver must not be resizing.
    fn requests_before_load(&mut self) -> Result<RequestCounts> {
        let counters = self.counters()?;
        let Some(daemon) = &mut self.daemon else {
            return Ok(RequestCounts::default());
        };
        let status = daemon.virtio_status()?;
        let earlier = |queue: &str, key: &str| {
            let taken = status.queues.iter().find(|it| it.name == queue);
            let taken = taken.map_or(0, |queue| queue.requests);
            // A page migration is a request on each of the two queues, and has its own counter.
            let sent = counters.get(key)? + counters.get("migrated_pages")?;
            let earlier = taken.checked_sub(sent);
            earlier.with_context(|| format!("{key}: {counters:?}, {status:?}"))
        };
        Ok(RequestCounts {
            inflate: earlier("inflate", "inflate_requests")?,
            deflate: earlier("deflate", "deflate_requests")?,
        })
    }

    fn resize(&mut self) -> Result<()> {
        let balloon = self.balloon_qmp()?;
        let whole = balloon.balloon_actual()?;
        for target in [whole - RESIZE_BY, whole] {
            balloon.set_balloon(target)?;
            balloon.wait_balloon(target, HANG_TIMEOUT)?;
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
                Err(error) => check_refused(&error),
            };
        }
        // Until the guest answers, the device returns the statistics that it has, if any.
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let statistics = self.statistics();
            let total = statistics.as_ref().ok().and_then(|statistics| {
                let total = statistics.get("stat-total-memory")?;
                total.as_u64()
            });
            if self.check_total(total).is_ok() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{statistics:?}");
            sleep(Duration::from_millis(20));
        }
    }

    /// Checks that a statistic is the memory that the guest's kernel manages now.
    fn check_total(&mut self, total: Option<u64>) -> Result<()> {
        let now = self.mem_info()?.total();
        ensure!(
            total.is_some_and(|total| total.abs_diff(now) < MIB),
            "the guest has {now} bytes of memory"
        );
        Ok(())
    }

    /// Requests statistics from the guest through our device.
    ///
    /// # Errors
    ///
    /// Fails if the device refuses.
    pub fn statistics(&mut self) -> Result<Map<String, Value>> {
        #[derive(Deserialize)]
        struct Answer {
            stats: Map<String, Value>,
        }
        let answer: Answer = self.daemon()?.qmp().query("query-guest-stats")?;
        Ok(answer.stats)
    }

    /// Makes QEMU's device request statistics, and waits for new ones.
    fn qemu_statistics(&mut self) -> Result<()> {
        const INTERVAL_SECONDS: u64 = 1;
        let path = format!("/machine/peripheral/{BALLOON_ID}");
        let set = |property: &str, value: u64| json!({ "path": path, "property": property, "value": value });
        let get = json!({ "path": path, "property": "guest-stats" });
        let monitor = self.monitor()?;
        let updated = |answer: &Value| answer.get("last-update").and_then(Value::as_u64);
        let interval = "guest-stats-polling-interval";
        monitor.command("qom-set", set(interval, INTERVAL_SECONDS))?;
        let deadline = Instant::now() + HANG_TIMEOUT;
        let before = updated(&monitor.command("qom-get", get.clone())?);
        loop {
            let answer = monitor.command("qom-get", get.clone())?;
            if updated(&answer) > before {
                let total = answer.pointer("/stats/stat-total-memory");
                let total = total.and_then(Value::as_u64);
                monitor.command("qom-set", set(interval, 0))?;
                return self.check_total(total).with_context(|| answer.to_string());
            }
            ensure!(Instant::now() < deadline, "no new statistics: {answer}");
            sleep(Duration::from_millis(20));
        }
    }

    fn try_hinting(&mut self, agreed: bool, before: MemoryUsage) -> Result<()> {
        match (self.daemon.is_some(), agreed) {
            (true, true) => self.retry_full_hint_round(before),
            (true, false) => match self.daemon()?.qmp().hint_start() {
                Ok(id) => bail!("the round {id:#x} was not refused"),
                Err(error) => check_refused(&error),
            },
            (false, true) => {
                self.start_qemu_migration()?;
                let migration = self.finish_qemu_migration()?;
                let all = migration.total;
                ensure!(migration.skipped() > all / 4, "{migration:?}");
                Ok(())
            }
            // A migration without hints shows nothing.
            (false, false) => Ok(()),
        }
    }

    /// Repeats hint rounds until one of them covers nearly all free memory. `before` is the memory usage of the guest
    /// without a hint round.
    ///
    /// Pages in a report cannot be hinted. The kernel does not show when a report ends, so this function retries.
    ///
    /// # Errors
    ///
    /// Fails if no hint round succeeds within [`HANG_TIMEOUT`].
    pub fn retry_full_hint_round(&mut self, before: MemoryUsage) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            match self.full_hint_round() {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                // The next hint round needs the free blocks of this one.
                Err(_) => {
                    self.daemon()?.qmp().hint_done()?;
                    self.check_memory(before)?;
                }
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the kernel has reported pages. If reporting is not negotiated, checks that there are no reports.
    fn try_reporting(&mut self, agreed: bool) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let pages = match (self.driver()?, &mut self.daemon) {
                (Driver::Ours, _) => self.counters()?.get("reported_pages")?,
                (Driver::C, Some(daemon)) => daemon.virtio_status()?.bytes_reported / PAGE,
                // QEMU's device and the C driver have no counter.
                (Driver::C, None) => return Ok(()),
            };
            if !agreed {
                ensure!(pages == 0, "{pages} pages were reported");
                return Ok(());
            }
            if pages > 0 {
                break;
            }
            ensure!(Instant::now() < deadline, "nothing is reported");
            sleep(Duration::from_millis(20));
        }
        if let Some(daemon) = &mut self.daemon {
            let status = daemon.virtio_status()?;
            ensure!(status.bytes_reported > 0, "nothing came: {status:?}");
        }
        Ok(())
    }

    /// Makes the kernel report free pages every 20 ms instead of every two seconds.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not have this control.
    pub fn set_short_reporting_delay(&mut self) -> Result<()> {
        self.call(WriteFile {
            path: "/sys/module/page_reporting/parameters/page_reporting_delay_ms".into(),
            text: "20".into(),
        })
    }
}

/// Checks that an error is a refusal by the device.
fn check_refused(error: &anyhow::Error) -> Result<()> {
    match error.downcast_ref::<QmpError>() {
        Some(_) => Ok(()),
        None => bail!("not refused: {error:#}"),
    }
}
