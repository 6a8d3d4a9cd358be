// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a driver's work costs, in things that can be counted: our device counts them, whatever driver it is.

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

/// How the device asks a driver to leave out notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotificationSuppression {
    /// By event index, as is usual.
    EventIdx,
    /// By the ring's flag, as where there is no event index.
    Flag,
    /// Not at all: what is counted is what the driver does of its own accord.
    Never,
}

impl NotificationSuppression {
    /// The options of the daemon for it.
    #[must_use]
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::EventIdx => &[],
            Self::Flag => &["--no-event-idx"],
            Self::Never => &["--every-notification"],
        }
    }
}

/// How crossings are counted: [`ExitCounts::read`] or [`ExitCounts::read_when_drained`].
type CountFn = fn(&mut Daemon) -> Result<ExitCounts>;

/// Crossings between guest and host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitCounts {
    /// Requests on all queues.
    pub requests: u64,
    /// The driver notified the device.
    pub notifications: u64,
    /// The device interrupted the driver: for used buffers, or for a change of configuration space.
    pub interrupts: u64,
    /// The driver read or wrote configuration space.
    pub config: u64,
}

impl ExitCounts {
    /// All crossings so far.
    ///
    /// # Errors
    ///
    /// As [`Daemon::virtio_status`].
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

    /// As [`ExitCounts::read`], of a driver that notifies for each request: waits until the device has read all notifications. It may
    /// serve a request before it reads what notifies of it.
    ///
    /// # Errors
    ///
    /// If it has not read them after [`HANG_TIMEOUT`], or as [`Daemon::virtio_status`].
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

    /// Exits of the guest: of a notification, of an access to configuration space, and for an interrupt.
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

/// What some work moved, and what it cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkCost {
    /// Bytes hinted, inflated or deflated.
    pub bytes: u64,
    /// Crossings.
    pub counts: ExitCounts,
    /// Time, from the operator's wish to its fulfilment.
    pub time: Duration,
}

impl WorkCost {
    /// A count for so much work as moves 1 GiB.
    #[must_use]
    pub fn per_gib(&self, count: u64) -> u64 {
        (count << 30).div_ceil(self.bytes.max(1))
    }

    /// The work with the median of exits.
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

/// A driver's three kinds of work.
#[derive(Clone, Copy, Debug, Default)]
pub struct DriverCosts {
    /// One round of hinting, up to the driver's stop.
    pub hint: WorkCost,
    /// Inflating.
    pub inflate: WorkCost,
    /// Deflating by as much.
    pub deflate: WorkCost,
}

/// Boots user-mode Linux with `memory`, and measures `repeats` times what `driver` does to hint all that is free and to
/// inflate and deflate by `size`. Each number is a median.
///
/// # Errors
///
/// If anything does not work.
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
    // The C driver notifies for each request if it is not asked to leave out any.
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

/// One round, up to the driver's stop. The blocks are held afterwards.
///
/// # Errors
///
/// If it does not finish.
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

/// Free memory by the size of its blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeBlocks {
    page_size: u64,
    zones: Vec<BuddyInfoZone>,
}

impl FreeBlocks {
    /// Bytes that are free in blocks of `2^order` pages or more.
    #[must_use]
    pub fn free_bytes_from_order(&self, order: usize) -> u64 {
        let zones = self.zones.iter();
        zones
            .map(|zone| zone.free_bytes_from_order(order, self.page_size))
            .sum()
    }
}

/// Guests whose free memory is in pieces.
impl Guest {
    /// The free memory, as `/proc/buddyinfo` says.
    ///
    /// # Errors
    ///
    /// As [`crate::agent::AgentClient::call`].
    pub fn free_blocks(&mut self) -> Result<FreeBlocks> {
        let page_size = self.agent().hello().page_size;
        let zones = self.call(BuddyInfo {})?;
        Ok(FreeBlocks { page_size, zones })
    }

    /// Fills all free memory but `spare` bytes, and frees it again but for one page in `keep_every`. Returns the workloads
    /// that keep those.
    ///
    /// # Errors
    ///
    /// As [`crate::agent::AgentClient::call`].
    pub fn fragment(&mut self, keep_every: u64, spare: u64, seed: u64) -> Result<Vec<u32>> {
        /// In user-mode Linux each piece of a process's memory is a mapping on the host, which has a limit for them: two
        /// pieces for each page that is kept, and some to spare.
        const KEPT_PAGES: u64 = 20_000;
        // Else the kernel mends by and by what this breaks. One that does not do so has no such file.
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
