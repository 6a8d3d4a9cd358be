// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must hold of any guest that a test has worked on.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{DropCachesAndCompact, KernelLogRecord, ReadFile, WriteFile};

use crate::guest::Guest;
use crate::ktap::{Case, TestStatus};
use crate::{HANG_TIMEOUT, MIB};

/// By how much the kernel's use of memory may differ between two settled moments without anything being lost: its own data. Less
/// than one block of the largest order.
pub const MEMORY_TOLERANCE: u64 = 3 * MIB;

/// A guest's memory at one moment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUsage {
    /// In the free lists.
    pub free: u64,
    /// Neither free, nor on a processor's own list of free pages, nor a process's. A balloon is among them.
    ///
    /// What is missing from `free` tells less: the program in the guest keeps what its longest answers took, and a processor's
    /// list may keep huge pages for a minute.
    pub used: u64,
}

/// How often memory is looked at while it is awaited. Each look has the guest drop its caches.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What reports of the kernel's own checks hold.
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

/// What the kernel says when memory runs out; a trace is part of other things, too.
const OOM_PATTERNS: [&str; 3] = ["Out of memory", "oom-kill", "Call Trace"];

/// What the kernel says of each counter that is negative when it adds up what each processor has counted.
///
/// A counter that reaches zero in that moment is briefly negative, for a processor counts ahead by up to half its threshold.
const NEGATIVE_COUNTER: &str = "vmstat_refresh:";

/// What a module that is not of the kernel's own tree brings about when it is loaded, and what an emulated kernel says of a host
/// that had other things to do.
const ALLOWED_PATTERNS: [&str; 3] = [
    "taints kernel",
    "tainting kernel",
    "clocksource: Long readout interval",
];

/// The lines that should not be there: reports of the kernel's own checks, and anything of the level of a warning or
/// worse but the taint of a foreign module. [`Guest::check_log`] looks at negative counters.
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

/// The lines that belong to reports of the kernel's own checks: these should not be there whatever a test has done.
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
    /// A counter of `/proc/vmstat`.
    ///
    /// # Errors
    ///
    /// If the guest's kernel does not have it.
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

    /// Adds up what each processor has counted. A kernel for one processor has nothing to add, and no file for it.
    fn refresh_vmstat(&mut self) {
        let _ = self.call(WriteFile {
            path: "/proc/sys/vm/stat_refresh".to_owned(),
            text: "1".to_owned(),
        });
    }

    /// Fails if the kernel has logged a complaint since the last look at its log, or a counter that was negative stays so.
    ///
    /// # Errors
    ///
    /// With the complaints.
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

    /// The guest's memory when nothing is held that need not be: its caches are dropped, and what can be moved together is.
    ///
    /// # Errors
    ///
    /// As [`crate::agent::AgentClient::call`].
    pub fn settled_memory_usage(&mut self) -> Result<MemoryUsage> {
        self.call(DropCachesAndCompact {})?;
        self.memory_usage()
    }

    /// As [`Guest::settled_memory_usage`], but leaves caches and free memory as they are.
    ///
    /// # Errors
    ///
    /// As [`Guest::zones`].
    pub fn memory_usage(&mut self) -> Result<MemoryUsage> {
        let zones = self.zones()?;
        Ok(MemoryUsage {
            free: zones.free() * zones.page_size(),
            used: zones.used_by_kernel() * zones.page_size(),
        })
    }

    /// Waits until the guest has its memory back: its kernel has no more in use than `before`, give or take
    /// [`MEMORY_TOLERANCE`].
    ///
    /// # Errors
    ///
    /// If it has after [`HANG_TIMEOUT`].
    pub fn check_memory(&mut self, before: MemoryUsage) -> Result<()> {
        self.wait_memory(before, MEMORY_TOLERANCE, Self::settled_memory_usage)
    }

    /// As [`Guest::check_memory`], but leaves free memory in the pieces that it is in.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_memory`].
    pub fn check_memory_uncompacted(&mut self, before: MemoryUsage) -> Result<()> {
        self.wait_memory(before, MEMORY_TOLERANCE, Self::memory_usage)
    }

    /// As [`Guest::check_memory`], with another tolerance, in bytes.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_memory`].
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
        // Look before dropping caches: dropping is slow in an emulated guest.
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

    /// Fails if the guest has lost memory (see [`Guest::check_memory`]) or its kernel has complained.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_memory`] and [`Guest::check_log`].
    pub fn check_memory_and_log(&mut self, before: MemoryUsage) -> Result<()> {
        self.check_memory(before)?;
        self.check_log()
    }

    /// What a test ends with: the guest is whole, and switches off.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_memory_and_log`] and [`Guest::power_off`].
    pub fn check_and_power_off(&mut self, before: MemoryUsage) -> Result<()> {
        self.check_memory_and_log(before)?;
        self.power_off().map(drop)
    }
}

/// Fails, naming each, if a case did not pass, or if there are none.
///
/// # Errors
///
/// With the cases that failed and what they said.
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
