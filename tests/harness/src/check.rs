// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must hold of any guest that a test has worked on.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{DropMemoryCaches, KernelLine, ReadFile, WriteFile};

use crate::guest::Guest;
use crate::ktap::{Case, Outcome};
use crate::{HANG_LIMIT, MIB};

/// By how much the kernel's use of memory may differ between two settled moments without anything being lost: its own data. Less
/// than one block of the largest order.
pub const USE_TOLERANCE: u64 = 3 * MIB;

/// A guest's memory at one moment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// In the free lists.
    pub free: u64,
    /// Neither free, nor on a processor's own list of free pages, nor a process's. A balloon is among them.
    ///
    /// What is missing from `free` tells less: the program in the guest keeps what its longest answers took, and a processor's
    /// list may keep huge pages for a minute.
    pub used: u64,
}

/// How often memory is looked at while it is awaited. Each look has the guest drop its caches.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What reports of the kernel's own checks hold.
const REPORTS: [&str; 15] = [
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
const NO_MEMORY: [&str; 3] = ["Out of memory", "oom-kill", "Call Trace"];

/// What the kernel says of each counter that is negative when it adds up what each processor has counted.
///
/// A counter that reaches zero in that moment is briefly negative, for a processor counts ahead by up to half its threshold.
const NEGATIVE_COUNTER: &str = "vmstat_refresh:";

/// What a module that is not of the kernel's own tree brings about when it is loaded, and what an emulated kernel says of a host
/// that had other things to do.
const ALLOWED: [&str; 3] = [
    "taints kernel",
    "tainting kernel",
    "clocksource: Long readout interval",
];

/// The lines that should not be there: reports of the kernel's own checks, and anything of the level of a warning or
/// worse but the taint of a foreign module. [`Guest::check_log`] looks at negative counters.
#[must_use]
pub fn complaints(log: &[KernelLine]) -> Vec<&KernelLine> {
    const WARNING: u8 = 4;
    let bad = |line: &&KernelLine| {
        !holds(line, &ALLOWED)
            && !holds(line, &[NEGATIVE_COUNTER])
            && (line.level <= WARNING || holds(line, &REPORTS) || holds(line, &NO_MEMORY))
    };
    log.iter().filter(bad).collect()
}

/// The lines that belong to reports of the kernel's own checks: these should not be there whatever a test has done.
#[must_use]
pub fn reports(log: &[KernelLine]) -> Vec<&KernelLine> {
    log.iter().filter(|line| holds(line, &REPORTS)).collect()
}

fn negative_counters(log: &[KernelLine]) -> Vec<&KernelLine> {
    log.iter()
        .filter(|line| holds(line, &[NEGATIVE_COUNTER]))
        .collect()
}

fn holds(line: &KernelLine, words: &[&str]) -> bool {
    words.iter().any(|words| line.text.contains(words))
}

impl Guest {
    /// A counter of `/proc/vmstat`.
    ///
    /// # Errors
    ///
    /// If the guest's kernel does not have it.
    pub fn vm_event(&mut self, name: &str) -> Result<u64> {
        self.refresh_counters();
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
    fn refresh_counters(&mut self) {
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
        let deadline = Instant::now() + HANG_LIMIT;
        loop {
            let log = self.kernel_log()?;
            let complaints = complaints(&log);
            ensure!(
                complaints.is_empty(),
                "the kernel complains: {complaints:#?}"
            );
            let negative = negative_counters(&log);
            if negative.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "counters stay negative: {negative:#?}"
            );
            sleep(LOOK_EVERY);
            self.refresh_counters();
        }
    }

    /// The guest's memory when nothing is held that need not be: its caches are dropped, and what can be moved together is.
    ///
    /// # Errors
    ///
    /// As [`crate::agent::Agent::call`].
    pub fn settled(&mut self) -> Result<Settled> {
        self.call(DropMemoryCaches {})?;
        self.unsettled()
    }

    /// As [`Guest::settled`], but leaves caches and free memory as they are.
    ///
    /// # Errors
    ///
    /// As [`Guest::zones`].
    pub fn unsettled(&mut self) -> Result<Settled> {
        let zones = self.zones()?;
        Ok(Settled {
            free: zones.free() * zones.page_size(),
            used: zones.used_by_kernel() * zones.page_size(),
        })
    }

    /// Waits until the guest has its memory back: its kernel has no more in use than `before`, give or take
    /// [`USE_TOLERANCE`].
    ///
    /// # Errors
    ///
    /// If it has after [`HANG_LIMIT`].
    pub fn check_memory(&mut self, before: Settled) -> Result<()> {
        self.wait_memory(before, USE_TOLERANCE, Self::settled)
    }

    /// As [`Guest::check_memory`], but leaves free memory in the pieces that it is in.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_memory`].
    pub fn check_memory_as_it_is(&mut self, before: Settled) -> Result<()> {
        self.wait_memory(before, USE_TOLERANCE, Self::unsettled)
    }

    /// As [`Guest::check_memory`], with another tolerance, in bytes.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_memory`].
    pub fn check_memory_within(&mut self, before: Settled, tolerance: u64) -> Result<()> {
        self.wait_memory(before, tolerance, Self::settled)
    }

    fn wait_memory(
        &mut self,
        before: Settled,
        tolerance: u64,
        look: fn(&mut Self) -> Result<Settled>,
    ) -> Result<()> {
        let deadline = Instant::now() + HANG_LIMIT;
        // Look before dropping caches: dropping is slow in an emulated guest.
        let mut now = self.unsettled()?;
        while now.used > before.used + tolerance {
            if Instant::now() > deadline {
                bail!(
                    "the kernel has more memory in use than before: {now:?}, before {before:?}; {:?}, {:?}",
                    self.zones()?,
                    self.mem_info()?
                );
            }
            sleep(LOOK_EVERY);
            now = look(self)?;
        }
        Ok(())
    }

    /// Fails if the guest has lost memory (see [`Guest::check_memory`]) or its kernel has complained.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_memory`] and [`Guest::check_log`].
    pub fn check_whole(&mut self, before: Settled) -> Result<()> {
        self.check_memory(before)?;
        self.check_log()
    }

    /// What a test ends with: the guest is whole, and switches off.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_whole`] and [`Guest::power_off`].
    pub fn farewell(&mut self, before: Settled) -> Result<()> {
        self.check_whole(before)?;
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
        .filter(|case| case.outcome == Outcome::Failed)
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
    fn a_taint_is_no_complaint_and_a_warning_is() {
        let line = |level, text: &str| KernelLine {
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
        let found: Vec<_> = complaints(&log)
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
