// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A workload that forks continuously: pages are shared until one process writes to them, and page tables and kernel
//! stacks are allocated and freed.

use anyhow::{bail, Context, Result};
use guest_agent::calls::{ChurnForks, ChurnStats};
use guest_agent::pattern::{self, PAGE};
use memmap2::MmapMut;
use nix::sys::wait::{waitpid, WaitStatus};

use crate::job::{Job, Rng};
use crate::sys;

/// The maximum number of children at a time.
const MAX_CHILDREN: usize = 4;
/// A child writes to one page in this many. Its parent does the same meanwhile.
const WRITE_EVERY: usize = 4;

/// Memory that the process shares with its children.
pub struct ForkChurn {
    map: MmapMut,
    /// The seed of each page.
    seeds: Vec<u64>,
    random: Rng,
    stats: ChurnStats,
}

impl ForkChurn {
    /// Maps and fills the memory.
    pub fn new(churn: &ChurnForks) -> Result<Self> {
        let pages = usize::try_from(churn.bytes)? / PAGE;
        let mut map = MmapMut::map_anon(pages.max(1) * PAGE).context("cannot map memory")?;
        let mut random = Rng(churn.seed);
        let seeds = map
            .chunks_exact_mut(PAGE)
            .map(|page| {
                let seed = random.next();
                pattern::write(page, seed, 0);
                seed
            })
            .collect();
        Ok(Self {
            map,
            seeds,
            random,
            stats: ChurnStats::default(),
        })
    }

    /// Returns the number of pages that do not hold their pattern.
    fn wrong(&self) -> usize {
        let pages = self.map.chunks_exact(PAGE).zip(&self.seeds);
        pages
            .filter(|(page, seed)| !pattern::holds(page, **seed, 0))
            .count()
    }

    /// Runs in the child: compares all pages, writes some, and compares all again. Returns whether all pages were
    /// right. Does not allocate or take a lock.
    fn child(&mut self, turn: usize, salt: u64) -> bool {
        if self.wrong() != 0 {
            return false;
        }
        self.write(turn, salt);
        self.wrong() == 0
    }

    fn write(&mut self, turn: usize, salt: u64) {
        let pages = self.map.chunks_exact_mut(PAGE).zip(&mut self.seeds);
        for (page, seed) in pages.skip(turn % WRITE_EVERY).step_by(WRITE_EVERY) {
            *seed ^= salt;
            pattern::write(page, *seed, 0);
        }
    }
}

impl Job for ForkChurn {
    fn step(&mut self) -> Result<()> {
        let mut children = Vec::with_capacity(MAX_CHILDREN);
        for turn in 0..=self.random.below(MAX_CHILDREN) {
            let salt = self.random.next();
            children.push(sys::fork(|| self.child(turn, salt)).context("cannot fork")?);
            self.stats.pieces += 1;
            // The child shares these pages now.
            let salt = self.random.next();
            self.write(turn + 1, salt);
        }
        let pages = self.seeds.len();
        for child in children {
            match waitpid(child, None).context("cannot wait for a child")? {
                WaitStatus::Exited(_, 0) => {}
                WaitStatus::Exited(_, 1) => self.stats.wrong += 1,
                other => bail!("a child ended by other means: {other:?}"),
            }
            self.stats.compared += 2 * pages as u64;
            self.stats.bytes += (pages / WRITE_EVERY * PAGE) as u64;
        }
        self.finish()
    }

    fn finish(&mut self) -> Result<()> {
        self.stats.wrong += self.wrong() as u64;
        self.stats.compared += self.seeds.len() as u64;
        Ok(())
    }

    fn stats(&self) -> &ChurnStats {
        &self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHURN: ChurnForks = ChurnForks {
        bytes: 1 << 20,
        seed: 4,
        rest: 0,
    };

    #[test]
    fn children_and_parent_each_keep_their_own() {
        let mut forks = ForkChurn::new(&CHURN).unwrap();
        for _ in 0..5 {
            forks.step().unwrap();
        }
        assert!(forks.stats.pieces >= 5 && forks.stats.compared > 5 * 256);
        assert_eq!(forks.stats.wrong, 0);
    }

    #[test]
    fn a_child_sees_a_page_that_was_lost() {
        let mut forks = ForkChurn::new(&CHURN).unwrap();
        forks.map[5 * PAGE..6 * PAGE].fill(0);
        assert!(!forks.child(0, 1));
        assert_eq!(forks.wrong(), 1);
    }
}
