// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's zones (`/proc/zoneinfo`) and event counters (`/proc/vmstat`).

use std::collections::BTreeMap;

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{BuddyInfo, BuddyInfoZone, ReadFile};

use crate::guest::Guest;

/// A zone that has memory. Sizes are in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneInfo {
    /// The number of the NUMA node.
    pub node: u32,
    /// The zone's name.
    pub name: String,
    /// Free pages, including CMA pages.
    pub free: u64,
    /// Free CMA pages.
    pub free_cma: u64,
    /// The minimum watermark.
    pub min: u64,
    /// The low watermark.
    pub low: u64,
    /// The high watermark.
    pub high: u64,
    /// Pages that the allocator manages, free or in use.
    pub managed: u64,
    /// Pages on per-CPU lists. They do not count as free.
    pub pcp_pages: u64,
    /// The lowmem reserve: pages that are kept from allocations that could use a higher zone, by that zone.
    pub lowmem_reserve: Vec<u64>,
    /// The part of the lowmem reserve that is kept from the kernel's ordinary allocations.
    pub kernel_reserve: u64,
}

impl ZoneInfo {
    /// Returns whether the kernel uses the zone for itself. Only such zones are hinted.
    #[must_use]
    pub fn is_hintable(&self) -> bool {
        ["DMA", "DMA32", "Normal"].contains(&self.name.as_str())
    }

    /// Returns the number of pages that hinting always leaves in the zone: the mean of the minimum and low watermarks,
    /// plus the reserve against the kernel's ordinary allocations.
    #[must_use]
    pub fn hint_floor(&self) -> u64 {
        (self.min + self.low) / 2 + self.kernel_reserve
    }

    /// Returns the free pages that the kernel can use for itself.
    #[must_use]
    pub fn free_for_kernel(&self) -> u64 {
        self.free.saturating_sub(self.free_cma)
    }
}

/// All zones that have memory, with their free blocks.
#[derive(Clone, Debug)]
pub struct Zones {
    /// The zones.
    pub zones: Vec<ZoneInfo>,
    anonymous: u64,
    buddy_info: Vec<BuddyInfoZone>,
    page_size: u64,
}

impl Zones {
    /// Returns the page size, in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Returns the number of pages that are neither free nor anonymous memory of processes.
    #[must_use]
    pub fn used_by_kernel(&self) -> u64 {
        let taken = |zone: &ZoneInfo| zone.managed.saturating_sub(zone.free + zone.pcp_pages);
        let taken: u64 = self.zones.iter().map(taken).sum();
        taken.saturating_sub(self.anonymous)
    }

    /// Returns the number of pages on per-CPU lists.
    #[must_use]
    pub fn pcp_pages(&self) -> u64 {
        self.zones.iter().map(|zone| zone.pcp_pages).sum()
    }

    /// Returns the number of free pages.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.zones.iter().map(|zone| zone.free).sum()
    }

    /// Returns the number of free CMA pages.
    #[must_use]
    pub fn free_cma(&self) -> u64 {
        self.zones.iter().map(|zone| zone.free_cma).sum()
    }

    fn usable(&self) -> impl Iterator<Item = &ZoneInfo> {
        self.zones.iter().filter(|zone| zone.is_hintable())
    }

    /// Returns the number of free pages that the kernel can use for itself.
    #[must_use]
    pub fn free_for_kernel(&self) -> u64 {
        self.usable().map(ZoneInfo::free_for_kernel).sum()
    }

    /// Does the same as [`Zones::free_for_kernel`], but counts only free blocks of at least `order`.
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
    /// Returns the current zones.
    ///
    /// # Errors
    ///
    /// Fails if `/proc/zoneinfo` has another format.
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

    /// Returns the counters of `/proc/vmstat`.
    ///
    /// # Errors
    ///
    /// Fails if `/proc/vmstat` has another format.
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

/// Parses `/proc/zoneinfo`. Returns the zones that have memory, and the number of anonymous pages of processes.
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
            // The line `high: N` of a per-CPU list has another meaning.
            ["high", number] => zone.high = number.parse()?,
            // The value belongs to the node. `/proc/zoneinfo` prints it with the node's first zone.
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
