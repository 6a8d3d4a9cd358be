// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A workload that continuously maps, fills, compares and unmaps memory.

use anyhow::{Context, Result};
use guest_agent::calls::{ChurnMemory, ChurnStats};
use guest_agent::pattern::{self, PAGE};
use memmap2::MmapMut;

use crate::job::{Job, Rng};

/// The size range of a piece, in pages: from less than a per-CPU list holds to the largest order of the page allocator.
const PAGES_MIN: usize = 4;
const PAGES_MAX: usize = 1024;

struct FilledMapping {
    map: MmapMut,
    seed: u64,
}

/// The mapped pieces of the workload.
pub struct MemoryChurn {
    pieces: Vec<FilledMapping>,
    mapped: usize,
    max_bytes: usize,
    random: Rng,
    stats: ChurnStats,
}

impl MemoryChurn {
    /// Creates the workload. Nothing is mapped yet.
    pub fn new(churn: &ChurnMemory) -> Result<Self> {
        Ok(Self {
            pieces: Vec::new(),
            mapped: 0,
            max_bytes: usize::try_from(churn.bytes)?,
            random: Rng(churn.seed),
            stats: ChurnStats::default(),
        })
    }

    /// Compares and unmaps a piece. Returns `false` if there is no piece.
    fn drop_one(&mut self) -> bool {
        if self.pieces.is_empty() {
            return false;
        }
        let index = self.random.below(self.pieces.len());
        let piece = self.pieces.swap_remove(index);
        for (page, number) in piece.map.chunks_exact(PAGE).zip(0..) {
            self.stats.compared += 1;
            if !pattern::holds(page, piece.seed, number) {
                self.stats.wrong += 1;
            }
        }
        self.mapped -= piece.map.len();
        true
    }
}

impl Job for MemoryChurn {
    /// Maps a piece if the limit allows it. Unmaps some pieces otherwise.
    fn step(&mut self) -> Result<()> {
        let pages = PAGES_MIN + self.random.below(PAGES_MAX - PAGES_MIN + 1);
        let bytes = pages * PAGE;
        if self.mapped + bytes > self.max_bytes {
            // Unmap more pieces than the next one needs, so that large free blocks form now and then.
            for _ in 0..=self.random.below(self.pieces.len()) {
                self.drop_one();
            }
            return Ok(());
        }
        let mut map = MmapMut::map_anon(bytes).context("cannot map memory")?;
        let seed = self.random.next();
        for (page, number) in map.chunks_exact_mut(PAGE).zip(0..) {
            pattern::write(page, seed, number);
        }
        self.mapped += bytes;
        self.stats.pieces += 1;
        self.stats.bytes += bytes as u64;
        self.pieces.push(FilledMapping { map, seed });
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        while self.drop_one() {}
        Ok(())
    }

    fn stats(&self) -> &ChurnStats {
        &self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_filled_is_compared() {
        let churn = ChurnMemory {
            bytes: 16 << 20,
            seed: 1,
            rest: 0,
        };
        let mut state = MemoryChurn::new(&churn).unwrap();
        for _ in 0..50 {
            state.step().unwrap();
            assert!(state.mapped <= state.max_bytes);
        }
        while state.drop_one() {}
        assert_eq!(state.mapped, 0);
        assert_eq!(state.stats.compared * PAGE as u64, state.stats.bytes);
        assert!(state.stats.pieces > 10 && state.stats.wrong == 0);
    }

    #[test]
    fn a_lost_page_is_seen() {
        let churn = ChurnMemory {
            bytes: 16 << 20,
            seed: 2,
            rest: 0,
        };
        let mut state = MemoryChurn::new(&churn).unwrap();
        state.step().unwrap();
        state.pieces[0].map[PAGE..2 * PAGE].fill(0);
        state.drop_one();
        assert_eq!(state.stats.wrong, 1);
    }
}
