// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that is never done with memory: processes that map, fill, compare and unmap it, one that uses the page cache, one
//! that forks without end. Each knows what every page of its own must hold.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{
    ChurnFiles, ChurnForks, ChurnMemory, ChurnProgress, ChurnStats, StopChurn,
};

use crate::guest::Guest;
use crate::MIB;

/// How much each process has at most, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct StressLoad {
    /// How many processes map memory.
    pub processes: u64,
    /// What each of these has.
    pub each: u64,
    /// What the files have together.
    pub files: u64,
    /// What is shared with children that are forked.
    pub forks: u64,
}

impl StressLoad {
    /// A load of about `bytes`, of which the processes that map memory have three quarters.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        const PROCESSES: u64 = 3;
        const FORKS: u64 = 2 * MIB;
        Self {
            processes: PROCESSES,
            each: bytes / 4 * 3 / PROCESSES,
            files: (bytes / 4).saturating_sub(FORKS).max(4 * MIB),
            forks: FORKS,
        }
    }
}

/// Workloads that run in a guest.
#[derive(Debug)]
#[must_use = "it ends only when it is told to"]
pub struct Stress {
    workloads: Vec<u32>,
}

impl Stress {
    /// Starts them. The order of what they do depends only on `seed` and on how the guest shares its processors out.
    ///
    /// # Errors
    ///
    /// If the guest refuses.
    pub fn start(guest: &mut Guest, load: StressLoad, seed: u64) -> Result<Self> {
        let mut workloads = Vec::new();
        for process in 0..load.processes {
            let (bytes, seed) = (load.each, seed.wrapping_add(process));
            workloads.push(guest.call(ChurnMemory { bytes, seed })?);
        }
        let (bytes, file_seed) = (load.files, seed.rotate_left(20));
        workloads.push(guest.call(ChurnFiles {
            bytes,
            seed: file_seed,
        })?);
        let (bytes, fork_seed) = (load.forks, seed.rotate_left(40));
        workloads.push(guest.call(ChurnForks {
            bytes,
            seed: fork_seed,
        })?);
        Ok(Self { workloads })
    }

    /// What each of them has done so far.
    ///
    /// # Errors
    ///
    /// If one of them is no more.
    pub fn progress(&self, guest: &mut Guest) -> Result<Vec<ChurnStats>> {
        self.workloads
            .iter()
            .map(|&workload| guest.call(ChurnProgress { workload }))
            .collect()
    }

    /// Waits until each of them has compared `pages` more than by now. The guest has no event for this.
    ///
    /// # Errors
    ///
    /// If one is no more, finds a wrong page, or does not get so far by the limit.
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

    /// Ends them all, and returns what they have done together; each has compared all that it had left.
    ///
    /// # Errors
    ///
    /// If one of them is no more. The others are ended all the same.
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

    /// Ends them all as [`Stress::end`] does, and fails if any page was wrong.
    ///
    /// # Errors
    ///
    /// As [`Stress::end`], and then.
    pub fn end_and_verify(self, guest: &mut Guest) -> Result<ChurnStats> {
        let all = self.end(guest)?;
        ensure!(
            all.wrong == 0 && all.compared > 0,
            "the workloads found wrong pages: {all:?}"
        );
        Ok(all)
    }
}
