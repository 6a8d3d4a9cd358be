// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory statistics of the guest.
//!
//! The driver gives one buffer of statistics, and the device keeps it. Returning it asks for new ones.

use std::time::SystemTime;

use shared_abi::stats::{Stat, StatTag};

/// The most bytes of statistics that are read: more than all tags take.
pub const MAX_BYTES: usize = Stat::SIZE * 64;

/// The last statistics, and the buffer that they came in.
#[derive(Debug, Default)]
pub struct Stats {
    values: Vec<(StatTag, u64)>,
    updated: Option<SystemTime>,
    generation: u64,
    /// Index of the descriptor chain that the device keeps.
    buffer_head: Option<u16>,
}

impl Stats {
    /// Takes the statistics in `bytes` and the buffer that they came in, and returns the buffer that was kept
    /// until now, if one was.
    pub fn update(&mut self, bytes: &[u8], head: u16) -> Option<u16> {
        self.values.clear();
        for chunk in bytes.chunks_exact(Stat::SIZE) {
            let Ok(chunk) = chunk.try_into() else {
                continue;
            };
            let stat = Stat::from_bytes(chunk);
            // A tag that is newer than this code is left out.
            if let Some(tag) = StatTag::from_number(stat.tag) {
                self.values.retain(|(known, _)| *known != tag);
                self.values.push((tag, stat.value));
            }
        }
        self.updated = Some(SystemTime::now());
        self.generation = self.generation.wrapping_add(1);
        self.buffer_head.replace(head)
    }

    /// The buffer to return in order to ask for new statistics.
    pub fn take_buffer(&mut self) -> Option<u16> {
        self.buffer_head.take()
    }

    /// The driver is gone, and its buffer with it. The values stay, with their age.
    pub fn reset(&mut self) {
        self.buffer_head = None;
    }

    /// The last values.
    pub fn values(&self) -> &[(StatTag, u64)] {
        &self.values
    }

    /// When they came.
    pub fn updated(&self) -> Option<SystemTime> {
        self.updated
    }

    /// Changes with every update.
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
