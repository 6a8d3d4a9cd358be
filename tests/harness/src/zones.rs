// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's zones (`/proc/zoneinfo`), and its counts of events (`/proc/vmstat`).

use std::collections::BTreeMap;

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{BuddyInfo, BuddyInfoZone, ReadFile};

use crate::guest::Guest;

/// A zone that has memory. All in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneInfo {
    /// The node's number.
    pub node: u32,
    /// The zone's name.
    pub name: String,
    /// Free pages, those of CMA included.
    pub free: u64,
    /// Free pages of CMA.
    pub free_cma: u64,
    /// The minimum watermark.
    pub min: u64,
    /// The low watermark.
    pub low: u64,
    /// The high watermark.
    pub high: u64,
    /// Pages that the allocator has, free or not.
    pub managed: u64,
    /// Pages on the processors' own lists of free pages: they are not among the free ones.
    pub pcp_pages: u64,
    /// What is kept from allocations that could have come from a higher zone, by that zone.
    pub lowmem_reserve: Vec<u64>,
    /// What of it is kept from the kernel's ordinary allocations.
    pub kernel_reserve: u64,
}

impl ZoneInfo {
    /// Whether hinting takes blocks of it: the kernel uses it for itself.
    #[must_use]
    pub fn is_hintable(&self) -> bool {
        ["DMA", "DMA32", "Normal"].contains(&self.name.as_str())
    }

    /// What hinting leaves of the zone in any case: half-way between the minimum and the low watermark, beyond what is kept
    /// from the kernel's ordinary allocations.
    #[must_use]
    pub fn hint_floor(&self) -> u64 {
        (self.min + self.low) / 2 + self.kernel_reserve
    }

    /// Free pages that the kernel can use for itself.
    #[must_use]
    pub fn free_for_kernel(&self) -> u64 {
        self.free.saturating_sub(self.free_cma)
    }
}

/// All zones that have memory, with the free blocks of each.
#[derive(Clone, Debug)]
pub struct Zones {
    /// The zones.
    pub zones: Vec<ZoneInfo>,
    anonymous: u64,
    buddy_info: Vec<BuddyInfoZone>,
    page_size: u64,
}

impl Zones {
    /// Bytes of a page.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Pages that are neither free nor a process's own.
    #[must_use]
    pub fn used_by_kernel(&self) -> u64 {
        let taken = |zone: &ZoneInfo| zone.managed.saturating_sub(zone.free + zone.pcp_pages);
        let taken: u64 = self.zones.iter().map(taken).sum();
        taken.saturating_sub(self.anonymous)
    }

    /// Pages on the processors' own lists of free pages.
    #[must_use]
    pub fn pcp_pages(&self) -> u64 {
        self.zones.iter().map(|zone| zone.pcp_pages).sum()
    }

    /// Free pages.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.zones.iter().map(|zone| zone.free).sum()
    }

    /// Free pages that are set aside for contiguous allocations.
    #[must_use]
    pub fn free_cma(&self) -> u64 {
        self.zones.iter().map(|zone| zone.free_cma).sum()
    }

    fn usable(&self) -> impl Iterator<Item = &ZoneInfo> {
        self.zones.iter().filter(|zone| zone.is_hintable())
    }

    /// Free pages that the kernel can use for itself.
    #[must_use]
    pub fn free_for_kernel(&self) -> u64 {
        self.usable().map(ZoneInfo::free_for_kernel).sum()
    }

    /// As [`Zones::free_for_kernel`], of those in blocks of at least `order`.
    #[must_use]
    pub fn free_for_kernel_from_order(&self, order: usize) -> u64 {
        let of = |zone: &ZoneInfo| {
            let same = |buddy_info: &&BuddyInfoZone| {
                buddy_info.node == zone.node && buddy_info.name == zone.name
            };
            let buddy_info = self.buddy_info.iter().find(same);
            let free = buddy_info.map_or(0, |buddy_info| {
                buddy_info.free_bytes_from_order(order, self.page_size)
            });
            (free / self.page_size).saturating_sub(zone.free_cma)
        };
        self.usable().map(of).sum()
    }
}

impl Guest {
    /// The zones as they are now.
    ///
    /// # Errors
    ///
    /// If `/proc/zoneinfo` is not what it should be.
    pub fn zones(&mut self) -> Result<Zones> {
        let page_size = self.agent().hello().page_size;
        let path = "/proc/zoneinfo".to_owned();
        let text = self.call(ReadFile { path })?;
        let (zones, anonymous) = parse(&text)?;
        ensure!(!zones.is_empty(), "no zone holds memory: {text}");
        Ok(Zones {
            zones,
            anonymous,
            buddy_info: self.call(BuddyInfo {})?,
            page_size,
        })
    }

    /// The counts of `/proc/vmstat`.
    ///
    /// # Errors
    ///
    /// If it is not what it should be.
    pub fn vmstat_counters(&mut self) -> Result<BTreeMap<String, u64>> {
        let text = self.call(ReadFile {
            path: "/proc/vmstat".to_owned(),
        })?;
        let line = |line: &str| {
            let (name, count) = line.split_once(' ')?;
            Some((name.to_owned(), count.trim().parse().ok()?))
        };
        let all: Option<_> = text.lines().map(line).collect();
        all.context("/proc/vmstat has a line that is no name and number")
    }
}

/// The zones that have memory, and the pages that are processes' own.
fn parse(text: &str) -> Result<(Vec<ZoneInfo>, u64)> {
    let mut zones: Vec<ZoneInfo> = Vec::new();
    let mut anonymous = 0;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("Node ") {
            let (node, name) = rest.split_once(", zone").context("a zone without a name")?;
            zones.push(ZoneInfo {
                node: node.trim().parse()?,
                name: name.trim().to_owned(),
                free: 0,
                free_cma: 0,
                min: 0,
                low: 0,
                high: 0,
                managed: 0,
                pcp_pages: 0,
                lowmem_reserve: Vec::new(),
                kernel_reserve: 0,
            });
            continue;
        }
        let Some(zone) = zones.last_mut() else {
            continue;
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["pages", "free", number] => zone.free = number.parse()?,
            ["nr_free_cma", number] => zone.free_cma = number.parse()?,
            ["min", number] => zone.min = number.parse()?,
            ["low", number] => zone.low = number.parse()?,
            // A processor's own list has a line `high: N`, which is another thing.
            ["high", number] => zone.high = number.parse()?,
            // The node's, told with its first zone.
            ["nr_anon_pages", number] => anonymous += number.parse::<u64>()?,
            ["count:", number] => zone.pcp_pages += number.parse::<u64>()?,
            ["managed", number] => zone.managed = number.parse()?,
            ["protection:", ..] => {
                let (_, list) = line
                    .split_once('(')
                    .context("a protection without a list")?;
                let numbers = list.trim_end_matches(')').split(',');
                let numbers = numbers.map(|number| number.trim().parse());
                zone.lowmem_reserve = numbers.collect::<Result<_, _>>()?;
            }
            _ => {}
        }
    }
    let of_one_node = zones.iter().take_while(|zone| zone.node == 0);
    let normal = of_one_node
        .map(|zone| zone.name.as_str())
        .position(|name| name == "Normal");
    let normal = normal.context("there is no zone for the kernel")?;
    for zone in &mut zones {
        zone.kernel_reserve = zone.lowmem_reserve.get(normal).copied().unwrap_or_default();
    }
    zones.retain(|zone| zone.managed > 0);
    Ok((zones, anonymous))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_read() {
        let text = "Node 0, zone      DMA\n  per-node stats\n      nr_anon_pages  4\n      nr_free_cma  7\n  pages free     3\n        boost    0\n        \
                    min      1\n        low      2\n        high     4\n        managed  10\n        protection: (0, 20, 30)\n      \
                    nr_free_cma  0\n  pagesets\n    cpu: 0\n              count:    2\n              high:     9\n    \
                    cpu: 1\n              count:    3\n\
                    Node 0, zone   Normal\n  pages free     0\n        managed  0\n\
                    Node 1, zone  Movable\n  pages free     0\n        managed  0\n";
        let (zones, anonymous) = parse(text).unwrap();
        assert_eq!(anonymous, 4);
        assert_eq!(zones.len(), 1);
        let zone = zones.first().unwrap();
        assert_eq!((zone.node, zone.name.as_str(), zone.free), (0, "DMA", 3));
        assert_eq!((zone.min, zone.low, zone.high), (1, 2, 4));
        assert_eq!(zone.lowmem_reserve, [0, 20, 30]);
        assert_eq!((zone.managed, zone.pcp_pages, zone.free_cma), (10, 5, 0));
        assert!(zone.is_hintable());
        assert_eq!((zone.kernel_reserve, zone.hint_floor()), (20, 21));
    }
}
