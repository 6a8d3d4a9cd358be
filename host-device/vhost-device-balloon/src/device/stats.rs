// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory statistics of the guest.
//!
//! The driver provides one buffer of statistics, and the device keeps it. Returning the
//! buffer requests new statistics.

use std::time::SystemTime;

use shared_abi::stats::{Stat, StatTag};

/// The most bytes of statistics that are accepted: more than all tags need.
pub const MAX_BYTES: usize = Stat::SIZE * 64;

/// The latest statistics, and the buffer that the device keeps.
#[derive(Debug, Default)]
pub struct Stats {
    values: Vec<(StatTag, u64)>,
    updated: Option<SystemTime>,
    generation: u64,
    /// Head of the descriptor chain that the device keeps.
    buffer_head: Option<u16>,
}

impl Stats {
    /// Stores the statistics in `bytes`, and keeps their buffer `head`. Returns the buffer that was
    /// kept before, if any.
    pub fn update(&mut self, bytes: &[u8], head: u16) -> Option<u16> {
        self.values.clear();
        for chunk in bytes.chunks_exact(Stat::SIZE) {
            let Ok(chunk) = chunk.try_into() else {
                continue;
            };
            let stat = Stat::from_bytes(chunk);
            // Tags that this version does not know are ignored.
            if let Some(tag) = StatTag::from_number(stat.tag) {
                self.values.retain(|(known, _)| *known != tag);
                self.values.push((tag, stat.value));
            }
        }
        self.updated = Some(SystemTime::now());
        self.generation = self.generation.wrapping_add(1);
        self.buffer_head.replace(head)
    }

    /// Takes the kept buffer. Returning it to the driver requests new statistics.
    pub fn take_buffer(&mut self) -> Option<u16> {
        self.buffer_head.take()
    }

    /// Drops the buffer after a reset of the driver. Keeps the values and the time of their update.
    pub fn reset(&mut self) {
        self.buffer_head = None;
    }

    /// Returns the latest values.
    pub fn values(&self) -> &[(StatTag, u64)] {
        &self.values
    }

    /// Returns the time of the last update.
    pub fn updated(&self) -> Option<SystemTime> {
        self.updated
    }

    /// Returns a counter that changes with every update.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_tag_counts_and_unknown_tags_are_left_out() {
        let mut stats = Stats::default();
        let bytes: Vec<u8> = [(4u16, 100u64), (77, 1), (4, 200), (5, 300)]
            .into_iter()
            .flat_map(|(tag, value)| Stat { tag, value }.to_bytes())
            .collect();
        assert_eq!(stats.update(&bytes, 3), None);
        assert_eq!(
            stats.values(),
            [(StatTag::FreeMemory, 200), (StatTag::TotalMemory, 300)]
        );
        assert_eq!(stats.update(&[], 4), Some(3));
        assert_eq!(stats.take_buffer(), Some(4));
        assert_eq!(stats.take_buffer(), None);
    }
}
