// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Detects that the system has removed pages from mappings.

use std::fs;

use super::TrackingError;

/// Detects that the system has removed pages from mappings.
#[derive(Debug)]
pub(super) struct Reclaim {
    /// Whether all of guest memory is on tmpfs, whose pages the system removes only by swapping.
    pub(super) tmpfs: bool,
    pub(super) count: u64,
}

impl Reclaim {
    /// Counters in `/proc/vmstat` of pages swapped out and huge pages split.
    const COUNTERS: [&'static str; 6] = [
        "pswpout",
        "zswpout",
        "swpout_zero",
        "thp_swpout",
        "thp_split_pmd",
        "thp_split_page",
    ];
    /// Prefix of the counters of reclaimed pages, which matter for files on disk.
    const FILE_COUNTER_PREFIX: &'static str = "pgsteal_";

    /// Returns whether a counter has changed since the last call.
    pub(super) fn has_changed(&mut self) -> Result<bool, TrackingError> {
        let text = fs::read_to_string("/proc/vmstat")
            .map_err(|error| TrackingError::Unavailable(format!("/proc/vmstat: {error}")))?;
        let count = Self::sum_counters(&text, self.tmpfs);
        let before = std::mem::replace(&mut self.count, count);
        Ok(before != count)
    }

    fn sum_counters(text: &str, tmpfs: bool) -> u64 {
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs
            .filter(|(name, _)| {
                Self::COUNTERS.contains(name)
                    || (!tmpfs && name.starts_with(Self::FILE_COUNTER_PREFIX))
            })
            .filter_map(|(_, number)| number.trim().parse::<u64>().ok())
            .fold(0, u64::wrapping_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_pages_out_of_mappings_is_counted() {
        let text = "pgsteal_kswapd 5\npswpin 7\npswpout 10\nthp_split_pmd 200\npgsteal_file 1000\n";
        assert_eq!(Reclaim::sum_counters(text, true), 210);
        assert_eq!(Reclaim::sum_counters(text, false), 1215);
    }
}
