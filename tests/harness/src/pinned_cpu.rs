// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pins a program to one host processor.
//!
//! User-mode Linux runs its kernel and each guest process as separate host processes, and only one of them is runnable
//! at a time. On two processors each switch wakes an idle processor. On a host that is itself a virtual machine, the
//! wake-up takes ten times as long as the work between two switches.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

/// The number of reservations, by processor.
static RESERVED: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());

/// A reservation of a host processor, released on drop.
#[derive(Debug)]
pub struct PinnedCpu(usize);

impl PinnedCpu {
    /// Reserves the allowed processor with the fewest reservations.
    ///
    /// # Errors
    ///
    /// Fails if the affinity of this process cannot be read, or allows no processor.
    pub fn reserve() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("which processors are there?")?;
        let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
        let mut taken = lock();
        let processors = (0..CpuSet::count()).filter(is_allowed);
        let cpu = processors
            .min_by_key(|cpu| taken.get(cpu).copied().unwrap_or_default())
            .context("no processor is allowed")?;
        *taken.entry(cpu).or_default() += 1;
        Ok(Self(cpu))
    }

    /// Pins a process to the processor. Processes and threads that it starts later inherit the affinity.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn pin(&self, process: Pid) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(self.0)?;
        sched_setaffinity(process, &set)
            .with_context(|| format!("cannot pin {process} to processor {}", self.0))
    }
}

impl Drop for PinnedCpu {
    fn drop(&mut self) {
        if let Some(taken) = lock().get_mut(&self.0) {
            *taken = taken.saturating_sub(1);
        }
    }
}

fn lock() -> MutexGuard<'static, BTreeMap<usize, u32>> {
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_programs_are_spread_over_the_processors() {
        let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let count = (0..CpuSet::count())
            .filter(|cpu| all.is_set(*cpu).unwrap())
            .count();
        let pinned: Vec<_> = (0..count).map(|_| PinnedCpu::reserve().unwrap()).collect();
        let mut processors: Vec<_> = pinned.iter().map(|pinned_cpu| pinned_cpu.0).collect();
        processors.sort_unstable();
        processors.dedup();
        assert_eq!(processors.len(), count);
        drop(pinned);
        assert!(lock().values().all(|taken| *taken == 0));
    }
}
