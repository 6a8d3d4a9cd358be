// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls about the kernel's memory statistics.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{
    BuddyInfo, BuddyInfoZone, DropCachesAndCompact, LowestMemFree, MemFreeMinimum, MemInfo,
    MemInfoFields, WaitMemFree, WaitMemSettled,
};

use crate::serve::HandleCall;

const POLL_INTERVAL: Duration = Duration::from_millis(10);

impl HandleCall for MemInfo {
    fn handle(self) -> Result<MemInfoFields> {
        let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        Ok(parse_meminfo(&text))
    }
}

impl HandleCall for BuddyInfo {
    fn handle(self) -> Result<Vec<BuddyInfoZone>> {
        let text = fs::read_to_string("/proc/buddyinfo").context("cannot read /proc/buddyinfo")?;
        text.lines()
            .map(|line| {
                parse_zone(line).with_context(|| format!("strange buddyinfo line {line:?}"))
            })
            .collect()
    }
}

impl HandleCall for WaitMemFree {
    fn handle(self) -> Result<MemInfoFields> {
        let deadline = Instant::now() + Duration::from_millis(self.timeout_ms);
        loop {
            let memory = MemInfo {}.handle()?;
            if (self.at_least..=self.at_most).contains(&memory.free()) {
                return Ok(memory);
            }
            if Instant::now() > deadline {
                bail!(
                    "MemFree is {} bytes; it did not come between {} and {} within {} ms",
                    memory.free(),
                    self.at_least,
                    self.at_most,
                    self.timeout_ms
                );
            }
            sleep(POLL_INTERVAL);
        }
    }
}

impl HandleCall for WaitMemSettled {
    fn handle(self) -> Result<MemInfoFields> {
        let deadline = Instant::now() + Duration::from_millis(self.timeout_ms);
        let (mut stable, mut at) = (0, MemInfo {}.handle()?.free());
        loop {
            let memory = MemInfo {}.handle()?;
            if memory.free().abs_diff(at) >= self.tolerance {
                (stable, at) = (0, memory.free());
            } else if stable >= self.stable_samples {
                return Ok(memory);
            }
            stable += 1;
            if Instant::now() > deadline {
                bail!(
                    "MemFree, now {} bytes, was still moving after {} ms",
                    memory.free(),
                    self.timeout_ms
                );
            }
            sleep(POLL_INTERVAL);
        }
    }
}

impl HandleCall for LowestMemFree {
    fn handle(self) -> Result<MemFreeMinimum> {
        let deadline = Instant::now() + Duration::from_millis(self.duration_ms);
        let mut lowest = MemFreeMinimum {
            free: u64::MAX,
            samples: 0,
        };
        while Instant::now() < deadline {
            lowest.free = lowest.free.min(MemInfo {}.handle()?.free());
            lowest.samples += 1;
        }
        Ok(lowest)
    }
}

impl HandleCall for DropCachesAndCompact {
    fn handle(self) -> Result<()> {
        // drop_caches 4 disables the log message for drop_caches 3. stat_refresh folds the per-CPU counters into the
        // global ones.
        for (control, value) in [
            ("drop_caches", "4"),
            ("drop_caches", "3"),
            ("compact_memory", "1"),
            ("stat_refresh", "1"),
        ] {
            let path = Path::new("/proc/sys/vm").join(control);
            // A control that the kernel lacks is skipped.
            if path.exists() {
                fs::write(&path, value)
                    .with_context(|| format!("cannot write {value} to {}", path.display()))?;
            }
        }
        Ok(())
    }
}

fn parse_meminfo(text: &str) -> MemInfoFields {
    let field = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let mut words = rest.split_whitespace();
        let number: u64 = words.next()?.parse().ok()?;
        let unit = if words.next() == Some("kB") { 1024 } else { 1 };
        Some((name.to_owned(), number.saturating_mul(unit)))
    };
    MemInfoFields(text.lines().filter_map(field).collect())
}

/// Parses a line such as `Node 0, zone      DMA      1      0 ...`.
fn parse_zone(line: &str) -> Option<BuddyInfoZone> {
    let rest = line.strip_prefix("Node ")?;
    let (node, rest) = rest.split_once(',')?;
    let mut words = rest.split_whitespace();
    (words.next()? == "zone").then_some(())?;
    let name = words.next()?.to_owned();
    let free_blocks = words.map(str::parse).collect::<Result<_, _>>().ok()?;
    Some(BuddyInfoZone {
        node: node.parse().ok()?,
        name,
        free_blocks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_bytes() {
        let memory = parse_meminfo(
            "MemTotal:         509540 kB\nMemFree:          504708 kB\nHugePages_Total:       3\n",
        );
        assert_eq!(
            (memory.total(), memory.free()),
            (509_540 << 10, 504_708 << 10)
        );
        assert_eq!(memory.field("HugePages_Total"), 3);
        assert_eq!(memory.field("none"), 0);
    }

    #[test]
    fn a_zone_counts_its_free_bytes() {
        let zone = parse_zone("Node 0, zone    DMA32      1      0      2").unwrap();
        assert_eq!((zone.node, zone.name.as_str()), (0, "DMA32"));
        assert_eq!(zone.free_bytes_from_order(0, 4096), 9 * 4096);
        assert_eq!(zone.free_bytes_from_order(1, 4096), 8 * 4096);
        assert_eq!(parse_zone("nonsense"), None);
    }
}
