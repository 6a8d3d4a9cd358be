// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks for any guest at the end of a test: memory, and the kernel log.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{DropCachesAndCompact, KernelLogRecord, ReadFile, WriteFile};

use crate::guest::Guest;
use crate::ktap::{Case, TestStatus};
use crate::{HANG_TIMEOUT, MIB};

/// The tolerated change of the kernel's memory use between two settled moments, for the kernel's own data. Less than
/// one free block of the largest order (4 MiB).
pub const MEMORY_TOLERANCE: u64 = 3 * MIB;

/// A guest's memory at one moment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Memory in the free lists.
    pub free: u64,
    /// Memory that is neither free, nor on a per-CPU list, nor anonymous memory of processes. Includes the balloon and
    /// hinted blocks.
    ///
    /// This value is more precise than a decrease of `free`: the agent keeps the memory of its longest answers, and a
    /// per-CPU list may keep huge pages for a minute.
    pub used: u64,
}

/// The interval between two samples of a wait. Most waits make the guest drop its caches for each sample.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Texts in reports of the kernel's own checks.
const BUG_PATTERNS: [&str; 15] = [
    "WARNING:",
    "BUG:",
    "BUG ",
    "Oops",
    "general protection",
    "stack segment",
    "rcu: INFO",
    "blocked for more than",
    "refcount",
    "use-after-free",
    "Bad page",
    "bad page",
    "memory corruption",
    "ODEBUG",
    "DEBUG_LOCKS",
];

/// Texts in out-of-memory reports. Other reports also contain a call trace.
const OOM_PATTERNS: [&str; 3] = ["Out of memory", "oom-kill", "Call Trace"];

/// The text of the kernel's message about a counter whose sum over all processors is negative.
///
/// A counter that is reaching zero may be negative for a moment, because each processor counts ahead by up to half of
/// the counter's threshold.
const NEGATIVE_COUNTER: &str = "vmstat_refresh:";

/// Texts of allowed warnings: the taint of an out-of-tree module, and an emulated kernel's complaints about a busy host.
const ALLOWED_PATTERNS: [&str; 4] = [
    "taints kernel",
    "tainting kernel",
    "clocksource: Long readout interval",
    "hrtimer: interrupt took",
];

/// Returns the records that fail a test: reports of the kernel's own checks and out-of-memory reports, and all other
/// records of level warning or worse. Allowed warnings, such as the taint of an out-of-tree module, are left out.
/// [`Guest::check_log`] checks negative counters.
#[must_use]
pub fn kernel_warnings(log: &[KernelLogRecord]) -> Vec<&KernelLogRecord> {
    const WARNING: u8 = 4;
    let bad = |line: &&KernelLogRecord| {
        !contains_any(line, &ALLOWED_PATTERNS)
            && !contains_any(line, &[NEGATIVE_COUNTER])
            && (line.level <= WARNING
                || contains_any(line, &BUG_PATTERNS)
                || contains_any(line, &OOM_PATTERNS))
    };
    log.iter().filter(bad).collect()
}

/// Returns the records of reports of the kernel's own checks. No test may cause any.
#[must_use]
pub fn bug_reports(log: &[KernelLogRecord]) -> Vec<&KernelLogRecord> {
    log.iter()
        .filter(|line| contains_any(line, &BUG_PATTERNS))
        .collect()
}

fn negative_counters(log: &[KernelLogRecord]) -> Vec<&KernelLogRecord> {
    log.iter()
        .filter(|line| contains_any(line, &[NEGATIVE_COUNTER]))
        .collect()
}

fn contains_any(line: &KernelLogRecord, words: &[&str]) -> bool {
    words.iter().any(|words| line.text.contains(words))
}

impl Guest {
    /// Returns a counter of `/proc/vmstat`.
    ///
    /// # Errors
    ///
    /// Fails if the guest's kernel does not have the counter.
    pub fn vmstat_counter(&mut self, name: &str) -> Result<u64> {
        self.refresh_vmstat();
        let path = "/proc/vmstat".to_owned();
        let text = self.call(ReadFile { path })?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value
            .with_context(|| format!("no {name} in /proc/vmstat"))?
            .parse()
            .with_context(|| format!("{name} is no number"))
    }

    /// Folds the per-CPU counters into the global ones. A kernel for one processor has no file for this and does not
    /// need it.
    fn refresh_vmstat(&mut self) {
        let _ = self.call(WriteFile {
            path: "/proc/sys/vm/stat_refresh".to_owned(),
            text: "1".to_owned(),
        });
    }

    /// Checks that the kernel has logged no warning since the log was last read, and that no counter stays negative.
    ///
    /// # Errors
    ///
    /// Fails with the warnings, or with the counters that are still negative after [`HANG_TIMEOUT`].
    pub fn check_log(&mut self) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let log = self.kernel_log()?;
            let kernel_warnings = kernel_warnings(&log);
            ensure!(
                kernel_warnings.is_empty(),
                "the kernel complains: {kernel_warnings:#?}"
            );
            let negative = negative_counters(&log);
            if negative.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "counters stay negative: {negative:#?}"
            );
            sleep(POLL_INTERVAL);
            self.refresh_vmstat();
        }
    }

    /// Drops the guest's caches, compacts its memory, and returns its memory usage.
    ///
    /// # Errors
    ///
    /// Same as [`crate::agent::AgentClient::call`].
    pub fn settled_memory_usage(&mut self) -> Result<MemoryUsage> {
        self.call(DropCachesAndCompact {})?;
        self.memory_usage()
    }

    /// Returns the guest's memory usage. Does not drop caches or compact memory.
    ///
    /// # Errors
    ///
    /// Same as [`Guest::zones`].
    pub fn memory_usage(&mut self) -> Result<MemoryUsage> {
        let zones = self.zones()?;
        Ok(MemoryUsage {
            free: zones.free() * zones.page_size(),
            used: zones.used_by_kernel() * zones.page_size(),
        })
    }

    /// Waits until the guest has its memory back: the kernel's memory use exceeds `before` by at most
    /// [`MEMORY_TOLERANCE`].
    ///
    /// # Errors
    ///
    /// Fails if the kernel still uses more after [`HANG_TIMEOUT`].
    pub fn check_memory(&mut self, before: MemoryUsage) -> Result<()> {
        self.wait_memory(before, MEMORY_TOLERANCE, Self::settled_memory_usage)
    }

    /// Does the same as [`Guest::check_memory`], but does not drop caches or compact memory.
    ///
    /// # Errors
    ///
    /// Same as [`Guest::check_memory`].
    pub fn check_memory_uncompacted(&mut self, before: MemoryUsage) -> Result<()> {
        self.wait_memory(before, MEMORY_TOLERANCE, Self::memory_usage)
    }

    /// Does the same as [`Guest::check_memory`], with another tolerance, in bytes.
    ///
    /// # Errors
    ///
    /// Same as [`Guest::check_memory`].
    pub fn check_memory_with_tolerance(
        &mut self,
        before: MemoryUsage,
        tolerance: u64,
    ) -> Result<()> {
        self.wait_memory(before, tolerance, Self::settled_memory_usage)
    }

    fn wait_memory(
        &mut self,
        before: MemoryUsage,
        tolerance: u64,
        sample: fn(&mut Self) -> Result<MemoryUsage>,
    ) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        // Sample once before dropping caches, because dropping is slow in an emulated guest.
        let mut now = self.memory_usage()?;
        while now.used > before.used + tolerance {
            if Instant::now() > deadline {
                bail!(
                    "the kernel has more memory in use than before: {now:?}, before {before:?}; {:?}, {:?}",
                    self.zones()?,
                    self.mem_info()?
                );
            }
            sleep(POLL_INTERVAL);
            now = sample(self)?;
        }
        Ok(())
    }

    /// Checks that the guest has its memory back, and that its kernel has logged no warning.
    ///
    /// # Errors
    ///
    /// Same as [`Guest::check_memory`] and [`Guest::check_log`].
    pub fn check_memory_and_log(&mut self, before: MemoryUsage) -> Result<()> {
        self.check_memory(before)?;
        self.check_log()
    }

    /// Ends a test: checks the guest's memory and log, and switches the guest off.
    ///
    /// # Errors
    ///
    /// Same as [`Guest::check_memory_and_log`] and [`Guest::power_off`].
    pub fn check_and_power_off(&mut self, before: MemoryUsage) -> Result<()> {
        self.check_memory_and_log(before)?;
        self.power_off().map(drop)
    }
}

/// Checks that there are KUnit cases, and that none of them failed.
///
/// # Errors
///
/// Fails with the failed cases and their diagnostics.
pub fn all_passed(cases: &[Case]) -> Result<()> {
    let failed: Vec<_> = cases
        .iter()
        .filter(|case| case.status == TestStatus::Failed)
        .collect();
    ensure!(!cases.is_empty(), "no KUnit case ran");
    ensure!(
        failed.is_empty(),
        "{} of {} KUnit cases failed: {failed:#?}",
        failed.len(),
        cases.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taint_is_allowed_and_a_warning_is_not() {
        let line = |level, text: &str| KernelLogRecord {
            sequence: 0,
            level,
            time_us: 0,
            text: text.to_owned(),
        };
        let log = [
            line(4, "x: loading out-of-tree module taints kernel."),
            line(6, "virtio_balloon virtio1: fine"),
            line(4, "virtio_balloon virtio1: Out of puff!"),
            line(6, "WARNING: CPU: 0 PID: 1"),
            line(4, "vmstat_refresh: nr_balloon_pages -5"),
        ];
        let found: Vec<_> = kernel_warnings(&log)
            .into_iter()
            .map(|line| line.text.as_str())
            .collect();
        assert_eq!(
            found,
            [
                "virtio_balloon virtio1: Out of puff!",
                "WARNING: CPU: 0 PID: 1"
            ]
        );
        let negative = negative_counters(&log);
        assert_eq!(negative.len(), 1, "{negative:?}");
    }
}
