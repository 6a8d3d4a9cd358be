// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that one turn of a queue releases.
//!
//! A system call costs more than the pages that it frees. So the ranges of all requests in a turn are collected, and the
//! system calls follow the ranges that adjoin, in whatever order the driver sent their pages. The driver gets its buffers
//! back after that: a page must not be in use while it is released.
//!
//! The work is limited: a range spends the budget of the turn when it is collected, as if it needed a system call of its
//! own.

use std::ops::Range;

use shared_abi::features::Features;
use shared_abi::queue::Queue;

use super::request::RequestError;
use super::Device;

/// The ranges that a turn of a queue releases together, and the buffers of their requests.
#[derive(Debug, Default)]
pub(super) struct Releases {
    inflated: Vec<Range<u64>>,
    reported: Vec<Range<u64>>,
    heads: Vec<u16>,
}

impl Releases {
    /// Adds a range of guest physical addresses that has come into the balloon.
    pub(super) fn add_inflated(&mut self, range: Range<u64>) {
        self.inflated.push(range);
    }

    /// Adds a range of guest physical addresses that the driver has reported as free.
    pub(super) fn add_reported(&mut self, range: Range<u64>) {
        self.reported.push(range);
    }

    /// Adds a buffer to return after the release.
    pub(super) fn add_buffer(&mut self, head: u16) {
        self.heads.push(head);
    }

    /// Takes the buffers, in the order of their requests.
    pub(super) fn take_buffers(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.heads)
    }
}

/// Merges ranges: in ascending order, as long as possible, each address once.
fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges.into_iter().filter(|range| range.start < range.end) {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

impl Device {
    /// Releases the collected memory to the host, and records an error of the host. The buffers stay in `releases`, unless
    /// guest memory has failed: then no buffer may be returned.
    pub(super) fn release_collected(&mut self, queue: Queue, releases: &mut Releases) {
        // Zeros that replaced a page of a truncated file look like requests for page 0, and like empty ones.
        if self.memory_fault().is_some() {
            *releases = Releases::default();
            return;
        }
        let inflated = merge(std::mem::take(&mut releases.inflated));
        let reported = merge(std::mem::take(&mut releases.reported));
        if inflated.is_empty() && reported.is_empty() {
            return;
        }
        self.poll_pinning();
        let inflated = match self.remembers_partial_pages() {
            true => self.partial_pages.inflate(&self.ram, inflated),
            false => inflated,
        };
        let bytes = self.release_ranges(queue, inflated);
        self.bytes_released = self.bytes_released.saturating_add(bytes);
        let bytes = self.release_ranges(queue, reported);
        self.bytes_reported = self.bytes_reported.saturating_add(bytes);
    }

    /// Releases memory to the host, and returns the number of bytes released.
    fn release_ranges(&mut self, queue: Queue, ranges: Vec<Range<u64>>) -> u64 {
        let (mut released, mut result) = (0u64, Ok(()));
        for range in ranges {
            match self.ram.release(range) {
                Ok(bytes) => released = released.saturating_add(bytes),
                Err(error) => result = result.and(Err(RequestError::from(error))),
            }
        }
        if let Err(error) = result {
            self.guest_errors.record(queue, &error);
        }
        released
    }

    /// Returns whether pages stay known between requests until they are whole pages of the memory file. The driver must
    /// not use a page again before it has told the device.
    pub(super) fn remembers_partial_pages(&self) -> bool {
        let tells = self
            .negotiated_features
            .is_some_and(|features| features.contains(Features::MUST_TELL_HOST));
        tells && !self.is_discard_inhibited()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_adjoin_or_overlap_become_one() {
        let ranges = [8..9, 3..5, 5..6, 2..3, 7..7, 4..6, 20..30, 21..22];
        assert_eq!(merge(ranges.to_vec()), [2..6, 8..9, 20..30]);
        assert_eq!(merge(Vec::new()), []);
        let mut releases = Releases::default();
        releases.add_buffer(7);
        assert_eq!(releases.take_buffers(), [7]);
    }
}
