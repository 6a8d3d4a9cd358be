// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel says about its memory.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{
    BuddyInfo, DropMemoryCaches, Lowest, LowestMemFree, MemInfo, Memory, WaitMemFree,
    WaitMemSettled, Zone,
};

use crate::serve::Answer;

const LOOK_EVERY: Duration = Duration::from_millis(10);

impl Answer for MemInfo {
    fn answer(self) -> Result<Memory> {
        let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        Ok(parse_meminfo(&text))
    }
}

impl Answer for BuddyInfo {
    fn answer(self) -> Result<Vec<Zone>> {
        let text = fs::read_to_string("/proc/buddyinfo").context("cannot read /proc/buddyinfo")?;
        text.lines()
            .map(|line| {
                parse_zone(line).with_context(|| format!("strange buddyinfo line {line:?}"))
            })
            .collect()
    }
}

impl Answer for WaitMemFree {
    fn answer(self) -> Result<Memory> {
        let deadline = Instant::now() + Duration::from_millis(self.limit_ms);
        loop {
            let memory = MemInfo {}.answer()?;
            if (self.at_least..=self.at_most).contains(&memory.free()) {
                return Ok(memory);
            }
            if Instant::now() > deadline {
                bail!(
                    "MemFree is {} bytes; it did not come between {} and {} within {} ms",
                    memory.free(),
                    self.at_least,
                    self.at_most,
                    self.limit_ms
                );
            }
            sleep(LOOK_EVERY);
        }
    }
}

impl Answer for WaitMemSettled {
    fn answer(self) -> Result<Memory> {
        let deadline = Instant::now() + Duration::from_millis(self.limit_ms);
        let (mut quiet, mut at) = (0, MemInfo {}.answer()?.free());
        loop {
            let memory = MemInfo {}.answer()?;
            if memory.free().abs_diff(at) >= self.tolerance {
                (quiet, at) = (0, memory.free());
            } else if quiet >= self.quiet_looks {
                return Ok(memory);
            }
            quiet += 1;
            if Instant::now() > deadline {
                bail!(
                    "MemFree, now {} bytes, was still moving after {} ms",
                    memory.free(),
                    self.limit_ms
                );
            }
            sleep(LOOK_EVERY);
        }
    }
}

impl Answer for LowestMemFree {
    fn answer(self) -> Result<Lowest> {
        let deadline = Instant::now() + Duration::from_millis(self.for_ms);
        let mut lowest = Lowest {
            free: u64::MAX,
            samples: 0,
        };
        while Instant::now() < deadline {
            lowest.free = lowest.free.min(MemInfo {}.answer()?.free());
            lowest.samples += 1;
        }
        Ok(lowest)
    }
}

impl Answer for DropMemoryCaches {
    fn answer(self) -> Result<()> {
        // The first has the second not be logged each time; the last has each processor add what it has counted to the whole.
        for (control, value) in [
            ("drop_caches", "4"),
            ("drop_caches", "3"),
            ("compact_memory", "1"),
            ("stat_refresh", "1"),
        ] {
            let path = Path::new("/proc/sys/vm").join(control);
            // A kernel without the control has nothing to drop.
            if path.exists() {
                fs::write(&path, value)
                    .with_context(|| format!("cannot write {value} to {}", path.display()))?;
            }
        }
        Ok(())
    }
}

fn parse_meminfo(text: &str) -> Memory {
    let field = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let mut words = rest.split_whitespace();
        let number: u64 = words.next()?.parse().ok()?;
        let unit = if words.next() == Some("kB") { 1024 } else { 1 };
        Some((name.to_owned(), number.saturating_mul(unit)))
    };
    Memory(text.lines().filter_map(field).collect())
}

/// `Node 0, zone      DMA      1      0 ...`
fn parse_zone(line: &str) -> Option<Zone> {
    let rest = line.strip_prefix("Node ")?;
    let (node, rest) = rest.split_once(',')?;
    let mut words = rest.split_whitespace();
    (words.next()? == "zone").then_some(())?;
    let name = words.next()?.to_owned();
    let blocks = words.map(str::parse).collect::<Result<_, _>>().ok()?;
    Some(Zone {
        node: node.parse().ok()?,
        name,
        blocks,
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
        assert_eq!(zone.free_from(0, 4096), 9 * 4096);
        assert_eq!(zone.free_from(1, 4096), 8 * 4096);
        assert_eq!(parse_zone("nonsense"), None);
    }
}
