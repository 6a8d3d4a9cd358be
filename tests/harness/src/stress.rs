// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory stress in a guest: processes that map, fill, compare and unmap memory, one that uses the page cache, and one
//! that forks continuously. Each process knows the expected contents of its pages.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{
    ChurnFiles, ChurnForks, ChurnMemory, ChurnProgress, ChurnStats, StopChurn,
};

use crate::guest::Guest;
use crate::MIB;

/// The maximum memory of the processes, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct StressLoad {
    /// The number of processes that map memory.
    pub processes: u64,
    /// The maximum that each of these processes maps.
    pub each: u64,
    /// The maximum size of all files together.
    pub files: u64,
    /// The memory that the forking process shares with its children.
    pub forks: u64,
    /// After each step of its work, a process sleeps for so many times the duration of the step.
    pub rest: u32,
}

impl StressLoad {
    /// Returns a load of about `bytes`. The processes that map memory get three quarters.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        const PROCESSES: u64 = 3;
        const FORKS: u64 = 2 * MIB;
        Self {
            processes: PROCESSES,
            each: bytes / 4 * 3 / PROCESSES,
            files: (bytes / 4).saturating_sub(FORKS).max(4 * MIB),
            forks: FORKS,
            rest: 0,
        }
    }

    /// Returns the same load by processes that sleep most of the time, so that together they take about half of a
    /// processor. Without rest, a guest takes all of a processor that the device and the test need as well. On a host
    /// with few processors a migration then takes ten times as long.
    #[must_use]
    pub fn with_rests(self) -> Self {
        /// The workloads are five.
        const REST: u32 = 9;
        Self { rest: REST, ..self }
    }
}

/// The workloads that run in a guest.
#[derive(Debug)]
#[must_use = "it ends only when it is told to"]
pub struct Stress {
    workloads: Vec<u32>,
}

impl Stress {
    /// Starts the workloads. The order of their operations depends only on `seed` and on the guest's scheduling.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses.
    pub fn start(guest: &mut Guest, load: StressLoad, seed: u64) -> Result<Self> {
        let mut workloads = Vec::new();
        let rest = load.rest;
        for process in 0..load.processes {
            let (bytes, seed) = (load.each, seed.wrapping_add(process));
            workloads.push(guest.call(ChurnMemory { bytes, seed, rest })?);
        }
        let (bytes, file_seed) = (load.files, seed.rotate_left(20));
        workloads.push(guest.call(ChurnFiles {
            bytes,
            seed: file_seed,
            rest,
        })?);
        let (bytes, fork_seed) = (load.forks, seed.rotate_left(40));
        workloads.push(guest.call(ChurnForks {
            bytes,
            seed: fork_seed,
            rest,
        })?);
        Ok(Self { workloads })
    }

    /// Returns the statistics of each workload so far.
    ///
    /// # Errors
    ///
    /// Fails if a workload has ended.
    pub fn progress(&self, guest: &mut Guest) -> Result<Vec<ChurnStats>> {
        self.workloads
            .iter()
            .map(|&workload| guest.call(ChurnProgress { workload }))
            .collect()
    }

    /// Waits until each workload has compared `pages` more pages than now. The guest has no event for this.
    ///
    /// # Errors
    ///
    /// Fails if a workload has ended, finds a wrong page, or has not compared enough within `timeout`.
    pub fn wait_compared(&self, guest: &mut Guest, pages: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let before = self.progress(guest)?;
        loop {
            let now = self.progress(guest)?;
            ensure!(
                now.iter().all(|one| one.wrong == 0),
                "there are wrong pages: {now:?}"
            );
            let mut pairs = now.iter().zip(&before);
            if pairs.all(|(now, before)| now.compared >= before.compared + pages) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "not every workload has compared {pages} pages in {timeout:?}: {before:?} {now:?}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Ends all workloads, which compare their remaining pages first. Returns the sum of their statistics.
    ///
    /// # Errors
    ///
    /// Fails if a workload has already ended or fails. All others are ended nevertheless.
    pub fn end(self, guest: &mut Guest) -> Result<ChurnStats> {
        let mut all = ChurnStats::default();
        let mut failed = None;
        for workload in self.workloads {
            match guest.call(StopChurn { workload }) {
                Ok(one) => all += one,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            None => Ok(all),
            Some(error) => Err(error).context("a workload failed"),
        }
    }

    /// Does the same as [`Stress::end`], and checks that no page was wrong.
    ///
    /// # Errors
    ///
    /// Fails for the reasons of [`Stress::end`], or if a page was wrong.
    pub fn end_and_verify(self, guest: &mut Guest) -> Result<ChurnStats> {
        let all = self.end(guest)?;
        ensure!(
            all.wrong == 0 && all.compared > 0,
            "the workloads found wrong pages: {all:?}"
        );
        Ok(all)
    }
}
