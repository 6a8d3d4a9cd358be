// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One processor for a program whose processes take turns.
//!
//! In user-mode Linux the kernel is one process and each process of the guest another, and only one of them ever has something to
//! do. On two processors each turn has to wake the other one. Where the host is a virtual machine itself and has little else to do,
//! that takes ten times as long as the turn.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

/// How many seats are taken, by processor.
static TAKEN: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());

/// A place on a processor, free again when this is dropped.
#[derive(Debug)]
pub struct Seat(usize);

impl Seat {
    /// Takes one on the processor with the fewest taken, of those that this process may use.
    ///
    /// # Errors
    ///
    /// If the system does not say which these are.
    pub fn take() -> Result<Self> {
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

    /// Keeps a process there, and all that it will start.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn keep(&self, process: Pid) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(self.0)?;
        sched_setaffinity(process, &set)
            .with_context(|| format!("cannot keep {process} on processor {}", self.0))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(taken) = lock().get_mut(&self.0) {
            *taken = taken.saturating_sub(1);
        }
    }
}

fn lock() -> MutexGuard<'static, BTreeMap<usize, u32>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_spread_over_the_processors() {
        let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let count = (0..CpuSet::count())
            .filter(|cpu| all.is_set(*cpu).unwrap())
            .count();
        let seats: Vec<_> = (0..count).map(|_| Seat::take().unwrap()).collect();
        let mut processors: Vec<_> = seats.iter().map(|seat| seat.0).collect();
        processors.sort_unstable();
        processors.dedup();
        assert_eq!(processors.len(), count);
        drop(seats);
        assert!(lock().values().all(|taken| *taken == 0));
    }
}
