// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must hold of any guest that a test has worked on.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{KernelLine, ReadFile, WaitMemFree, WriteFile};

use crate::guest::Guest;
use crate::ktap::{Case, Outcome};
use crate::{HANG_LIMIT, HANG_LIMIT_MS, MIB};

/// By how much `MemFree` may differ between two settled moments without anything being lost. Less than one block of the
/// largest order.
pub const FREE_TOLERANCE: u64 = 3 * MIB;

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

/// What a module that is not of the kernel's own tree brings about when it is loaded, and what an emulated kernel says of a host
/// that had other things to do.
const ALLOWED: [&str; 3] = [
    "taints kernel",
    "tainting kernel",
    "clocksource: Long readout interval",
];

/// The lines that should not be there: reports of the kernel's own checks, and anything of the level of a warning or
/// worse but the taint of a foreign module.
#[must_use]
pub fn complaints(log: &[KernelLine]) -> Vec<&KernelLine> {
    const WARNING: u8 = 4;
    let bad = |line: &&KernelLine| {
        !holds(line, &ALLOWED)
            && (line.level <= WARNING || holds(line, &REPORTS) || holds(line, &NO_MEMORY))
    };
    log.iter().filter(bad).collect()
}

/// The lines that belong to reports of the kernel's own checks: these should not be there whatever a test has done.
#[must_use]
pub fn reports(log: &[KernelLine]) -> Vec<&KernelLine> {
    log.iter().filter(|line| holds(line, &REPORTS)).collect()
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
        // Adds up what each processor has counted. A kernel for one processor has nothing to add.
        let path = "/proc/sys/vm/stat_refresh".to_owned();
        let _ = self.call(WriteFile {
            path,
            text: "1".to_owned(),
        });
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

    /// Fails if the kernel has logged a complaint since the last look at its log.
    ///
    /// # Errors
    ///
    /// With the complaints.
    pub fn check_log(&mut self) -> Result<()> {
        let log = self.kernel_log()?;
        let complaints = complaints(&log);
        ensure!(
            complaints.is_empty(),
            "the kernel complains: {complaints:#?}"
        );
        Ok(())
    }

    /// Waits until the guest has its memory back: as much is free as `before`, give or take [`FREE_TOLERANCE`].
    ///
    /// # Errors
    ///
    /// If it has not by [`HANG_LIMIT`].
    pub fn check_free(&mut self, before: u64) -> Result<()> {
        let at_least = before.saturating_sub(FREE_TOLERANCE);
        let deadline = Instant::now() + HANG_LIMIT;
        loop {
            let free = self.settled_free()?;
            if free >= at_least {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{free} bytes are free of {before} that were"
            );
            sleep(LOOK_EVERY);
        }
    }

    /// As [`Guest::check_free`], but leaves free memory in the pieces that it is in.
    ///
    /// # Errors
    ///
    /// If it has not by [`HANG_LIMIT`].
    pub fn check_free_as_it_is(&mut self, before: u64) -> Result<()> {
        self.call(WaitMemFree {
            at_least: before.saturating_sub(FREE_TOLERANCE),
            at_most: u64::MAX,
            limit_ms: HANG_LIMIT_MS,
        })?;
        Ok(())
    }

    /// Bytes that are neither free nor a process's, once caches are dropped. A balloon is among them. Unlike `MemFree` it does not
    /// hold what the program in the guest has grown by, which keeps what its longest answers took.
    ///
    /// # Errors
    ///
    /// As [`crate::agent::Agent::call`].
    pub fn used_by_kernel(&mut self) -> Result<u64> {
        self.settled_free()?;
        let memory = self.mem_info()?;
        Ok(memory.total() - memory.free() - memory.field("AnonPages"))
    }

    /// Waits until the kernel has no more memory in use than `before` ([`Guest::used_by_kernel`]), give or take
    /// [`FREE_TOLERANCE`].
    ///
    /// # Errors
    ///
    /// If it has after [`HANG_LIMIT`].
    pub fn check_used_by_kernel(&mut self, before: u64) -> Result<()> {
        let deadline = Instant::now() + HANG_LIMIT;
        loop {
            let now = self.used_by_kernel()?;
            if now <= before + FREE_TOLERANCE {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the kernel had {before} bytes in use, and has {now}"
            );
            sleep(LOOK_EVERY);
        }
    }

    /// Fails if the guest has lost memory (see [`Guest::check_free`]) or its kernel has complained.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_free`] and [`Guest::check_log`].
    pub fn check_whole(&mut self, before: u64) -> Result<()> {
        self.check_free(before)?;
        self.check_log()
    }

    /// What a test ends with: the guest is whole, and switches off.
    ///
    /// # Errors
    ///
    /// As [`Guest::check_whole`] and [`Guest::power_off`].
    pub fn farewell(&mut self, before: u64) -> Result<()> {
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
    }
}
