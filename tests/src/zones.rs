// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The zones of a guest's memory, as `/proc/zoneinfo` has them.

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{BuddyInfo, ReadFile, Zone as Blocks};

use crate::guest::Guest;

/// A zone that holds memory; its counts are of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zone {
    /// The node's number.
    pub node: u32,
    /// The zone's name.
    pub name: String,
    /// Pages that the allocator manages.
    pub managed: u64,
    /// Free pages.
    pub free: u64,
    /// Free pages that are set aside for contiguous allocations (CMA).
    pub free_cma: u64,
    /// The low watermark.
    pub low: u64,
}

impl Zone {
    /// Whether an allocation that cannot be moved may come from it.
    #[must_use]
    pub fn is_for_unmovable(&self) -> bool {
        self.name != MOVABLE
    }

    /// Free pages that an allocation may take that cannot be moved.
    #[must_use]
    pub fn free_for_unmovable(&self) -> u64 {
        if self.is_for_unmovable() {
            self.free.saturating_sub(self.free_cma)
        } else {
            0
        }
    }
}

const MOVABLE: &str = "Movable";

/// All zones that hold memory, with the free blocks of each.
#[derive(Clone, Debug)]
pub struct Zones {
    /// The zones.
    pub zones: Vec<Zone>,
    blocks: Vec<Blocks>,
    page_size: u64,
}

impl Zones {
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

    /// Free pages that an allocation may take that cannot be moved.
    #[must_use]
    pub fn free_for_unmovable(&self) -> u64 {
        self.zones.iter().map(Zone::free_for_unmovable).sum()
    }

    /// As [`Zones::free_for_unmovable`], of those in blocks of at least `order`.
    #[must_use]
    pub fn free_for_unmovable_from(&self, order: usize) -> u64 {
        let of = |zone: &Zone| {
            let same = |blocks: &&Blocks| blocks.node == zone.node && blocks.name == zone.name;
            let blocks = self.blocks.iter().find(same);
            let free = blocks.map_or(0, |blocks| blocks.free_from(order, self.page_size));
            (free / self.page_size).saturating_sub(zone.free_cma)
        };
        let usable = self.zones.iter().filter(|zone| zone.is_for_unmovable());
        usable.map(of).sum()
    }
}

impl Guest {
    /// The zones as they are now.
    ///
    /// # Errors
    ///
    /// As [`crate::agent::Agent::call`].
    pub fn zones(&mut self) -> Result<Zones> {
        let page_size = self.agent().hello().page_size;
        let path = "/proc/zoneinfo".to_owned();
        let text = self.call(ReadFile { path })?;
        let zones = parse(&text)?;
        ensure!(!zones.is_empty(), "no zone holds memory: {text}");
        Ok(Zones {
            zones,
            blocks: self.call(BuddyInfo {})?,
            page_size,
        })
    }
}

/// `Node 0, zone      DMA`, and then lines of a name and a number.
fn parse(text: &str) -> Result<Vec<Zone>> {
    let mut zones: Vec<Zone> = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("Node ") {
            let (node, name) = rest.split_once(", zone").context("a strange zone")?;
            zones.push(Zone {
                node: node.parse().context("a strange node")?,
                name: name.trim().to_owned(),
                ..Zone::default()
            });
            continue;
        }
        let mut words = line.split_whitespace().peekable();
        let _ = words.next_if_eq(&"pages");
        let (Some(name), Some(number), None) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let (Ok(number), Some(zone)) = (number.parse(), zones.last_mut()) else {
            continue;
        };
        match name {
            "free" => zone.free = number,
            "low" => zone.low = number,
            "managed" => zone.managed = number,
            "nr_free_cma" => zone.free_cma = number,
            _ => {}
        }
    }
    zones.retain(|zone| zone.managed > 0);
    Ok(zones)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zones_that_hold_memory_are_read() {
        let text = "Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 68
  pages free     3808
        min      66
        low      82
        high     98
        managed  3840
        cma      0
        protection: (0, 421, 421, 421)
      nr_free_pages 3808
      nr_free_cma  7
Node 1, zone  Movable
  pages free     0
        low      32
        managed  0
";
        let wanted = Zone {
            node: 0,
            name: "DMA".to_owned(),
            managed: 3840,
            free: 3808,
            free_cma: 7,
            low: 82,
        };
        assert_eq!(parse(text).unwrap(), [wanted]);
    }
}
