// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of a driver's work, in counted events. Our device counts them, so the driver may be any.

use std::ops::Sub;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use guest_agent::calls::{BuddyInfo, BuddyInfoZone, Fill, Release, WriteFile};

use crate::artifacts::Artifacts;
use crate::daemon::Daemon;
use crate::guest::{Builder, Driver, Guest};
use crate::vmm::Vmm;
use crate::HANG_TIMEOUT;

/// The method by which the device asks a driver to leave out notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotificationSuppression {
    /// The event index (`VIRTIO_F_EVENT_IDX`), as usual.
    EventIdx,
    /// The flag in the used ring, as without an event index.
    Flag,
    /// The device does not ask. The counts show which notifications the driver leaves out without being asked.
    Never,
}

impl NotificationSuppression {
    /// Returns the daemon's options for this method.
    #[must_use]
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::EventIdx => &[],
            Self::Flag => &["--no-event-idx"],
            Self::Never => &["--every-notification"],
        }
    }
}

/// A function that reads the counts: [`ExitCounts::read`] or [`ExitCounts::read_when_drained`].
type CountFn = fn(&mut Daemon) -> Result<ExitCounts>;

/// Counts of requests, and of exits of the guest by their reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitCounts {
    /// Requests on all queues.
    pub requests: u64,
    /// Notifications by the driver.
    pub notifications: u64,
    /// Interrupts to the driver, for used buffers or for a change of the config space.
    pub interrupts: u64,
    /// Reads and writes of the config space by the driver.
    pub config: u64,
}

impl ExitCounts {
    /// Returns all counts so far.
    ///
    /// # Errors
    ///
    /// Same as [`Daemon::virtio_status`].
    pub fn read(daemon: &mut Daemon) -> Result<Self> {
        let status = daemon.virtio_status()?;
        let sum =
            |of: &dyn Fn(&crate::daemon::QueueStatus) -> u64| status.queues.iter().map(of).sum();
        let used: u64 = sum(&|queue| queue.interrupts);
        Ok(Self {
            requests: sum(&|queue| queue.requests),
            notifications: sum(&|queue| queue.notifications),
            interrupts: used + status.config_changes,
            config: status.config_reads + status.config_writes,
        })
    }

    /// Does the same as [`ExitCounts::read`], for a driver that notifies for each request: waits until the device has
    /// read all notifications. The device may serve a request before it reads the notification.
    ///
    /// # Errors
    ///
    /// Fails if the device has not read them within [`HANG_TIMEOUT`], or for the reasons of [`Daemon::virtio_status`].
    pub fn read_when_drained(daemon: &mut Daemon) -> Result<Self> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let now = Self::read(daemon)?;
            if now.notifications == now.requests {
                return Ok(now);
            }
            ensure!(
                Instant::now() < deadline,
                "not a notification for each request: {now:?}"
            );
            sleep(Duration::from_millis(10));
        }
    }

    /// Returns the number of exits of the guest: for notifications, for interrupts, and for accesses to the config
    /// space.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.notifications + self.interrupts + self.config
    }
}

impl Sub for ExitCounts {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            requests: self.requests - other.requests,
            notifications: self.notifications - other.notifications,
            interrupts: self.interrupts - other.interrupts,
            config: self.config - other.config,
        }
    }
}

/// The size and the cost of some work.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkCost {
    /// Bytes hinted, inflated or deflated.
    pub bytes: u64,
    /// The requests and exits of the work.
    pub counts: ExitCounts,
    /// The time from the command to its completion.
    pub time: Duration,
}

impl WorkCost {
    /// Scales a count to 1 GiB of this work.
    #[must_use]
    pub fn per_gib(&self, count: u64) -> u64 {
        (count << 30).div_ceil(self.bytes.max(1))
    }

    /// Returns the work with the median number of exits, with the median of all times.
    #[must_use]
    pub fn median(mut all: Vec<Self>) -> Self {
        all.sort_by_key(|work| (work.counts.exits(), work.time));
        let times = {
            let mut times: Vec<_> = all.iter().map(|work| work.time).collect();
            times.sort();
            times
        };
        let middle = all.len() / 2;
        Self {
            time: times.get(middle).copied().unwrap_or_default(),
            ..all.get(middle).copied().unwrap_or_default()
        }
    }
}

/// The costs of a driver's three kinds of work.
#[derive(Clone, Copy, Debug, Default)]
pub struct DriverCosts {
    /// A hint round, up to the driver's STOP.
    pub hint: WorkCost,
    /// Inflating.
    pub inflate: WorkCost,
    /// Deflating by the same size.
    pub deflate: WorkCost,
}

/// Boots user-mode Linux with `memory` bytes, and measures `driver` `repeats` times: a hint round over all free memory,
/// inflating by `size` bytes and deflating by `size` bytes. Returns medians.
///
/// # Errors
///
/// Fails if a step fails.
pub fn measure_driver(
    artifacts: &Artifacts,
    driver: Driver,
    suppression: NotificationSuppression,
    memory: u64,
    size: u64,
    repeats: usize,
) -> Result<DriverCosts> {
    let mut guest = Builder::new(artifacts, Vmm::Uml)
        .memory(memory)
        .device_options(suppression.options())
        .boot()?;
    guest.load(driver)?;
    let (mut hints, mut inflations, mut deflations) = (Vec::new(), Vec::new(), Vec::new());
    // The C driver notifies for each request unless the device asks it to leave notifications out.
    let count = match (driver, suppression) {
        (Driver::C, NotificationSuppression::Never) => ExitCounts::read_when_drained,
        _ => ExitCounts::read,
    };
    let before = guest.settled_memory_usage()?;
    for _ in 0..repeats {
        hints.push(hint_counted(&mut guest, count)?);
        guest.daemon()?.qmp().hint_done()?;
        guest.check_memory(before)?;
        let whole = guest.balloon_qmp()?.balloon_actual()?;
        inflations.push(resize(&mut guest, whole - size, size, count)?);
        deflations.push(resize(&mut guest, whole, size, count)?);
        guest.check_memory(before)?;
    }
    guest.power_off()?;
    Ok(DriverCosts {
        hint: WorkCost::median(hints),
        inflate: WorkCost::median(inflations),
        deflate: WorkCost::median(deflations),
    })
}

/// Runs a hint round up to the driver's STOP, and returns its cost. The hinted blocks stay out of use until DONE.
///
/// # Errors
///
/// Fails if the hint round does not finish.
pub fn measure_hint_round(guest: &mut Guest) -> Result<WorkCost> {
    hint_counted(guest, ExitCounts::read)
}

fn hint_counted(guest: &mut Guest, count: CountFn) -> Result<WorkCost> {
    let daemon = guest.daemon()?;
    let before = count(daemon)?;
    daemon.qmp().hint_start()?;
    let hint_round = daemon.qmp().wait_hint_status("finished")?;
    Ok(WorkCost {
        bytes: hint_round.bytes,
        counts: count(daemon)? - before,
        time: Duration::from_micros(hint_round.duration_us),
    })
}

/// Free memory by the order of the free blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeBlocks {
    page_size: u64,
    zones: Vec<BuddyInfoZone>,
}

impl FreeBlocks {
    /// Returns the free bytes in free blocks of at least `order`.
    #[must_use]
    pub fn free_bytes_from_order(&self, order: usize) -> u64 {
        let zones = self.zones.iter();
        zones
            .map(|zone| zone.free_bytes_from_order(order, self.page_size))
            .sum()
    }
}

/// Guests with fragmented free memory.
impl Guest {
    /// Returns the free blocks, from `/proc/buddyinfo`.
    ///
    /// # Errors
    ///
    /// Same as [`crate::agent::AgentClient::call`].
    pub fn free_blocks(&mut self) -> Result<FreeBlocks> {
        let page_size = self.agent().hello().page_size;
        let zones = self.call(BuddyInfo {})?;
        Ok(FreeBlocks { page_size, zones })
    }

    /// Fills all free memory except `spare` bytes, and frees it again except one page in `keep_every`. Returns the
    /// workloads that keep these pages.
    ///
    /// # Errors
    ///
    /// Same as [`crate::agent::AgentClient::call`].
    pub fn fragment(&mut self, keep_every: u64, spare: u64, seed: u64) -> Result<Vec<u32>> {
        /// The maximum number of kept pages in a workload. In user-mode Linux, each contiguous piece of a process's
        /// memory is a mapping on the host. A kept page needs two mappings, and the host limits the mappings of a
        /// process.
        const KEPT_PAGES: u64 = 20_000;
        // Proactive compaction would undo the fragmentation. A kernel without it does not have this file.
        let _ = self.call(WriteFile {
            path: "/proc/sys/vm/compaction_proactiveness".to_owned(),
            text: "0".to_owned(),
        });
        let bytes = self.settled_memory_usage()?.free.saturating_sub(spare);
        let pages = bytes / 4096;
        let parts = (pages / keep_every).div_ceil(KEPT_PAGES).max(1);
        let mut workloads = Vec::new();
        for part in 0..parts {
            let filled = self.call(Fill {
                bytes: pages / parts * 4096,
                keep_every,
                seed: seed + part,
            })?;
            workloads.push(filled.workload);
        }
        for &workload in &workloads {
            self.call(Release { workload })?;
        }
        Ok(workloads)
    }
}

fn resize(guest: &mut Guest, target: u64, bytes: u64, count: CountFn) -> Result<WorkCost> {
    let daemon = guest.daemon()?;
    let before = count(daemon)?;
    let start = Instant::now();
    daemon.qmp().set_balloon(target)?;
    daemon.qmp().wait_balloon(target, HANG_TIMEOUT)?;
    let time = start.elapsed();
    Ok(WorkCost {
        bytes,
        counts: count(daemon)? - before,
        time,
    })
}
