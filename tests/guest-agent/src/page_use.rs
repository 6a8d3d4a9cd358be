// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls about the use of the guest's pages, from `/proc/kpageflags`.

use std::fs;

use anyhow::{Context, Result};
use guest_agent::calls::{FreePages, PageUse, PagesByUse};
use guest_agent::pattern::PAGE;
use guest_agent::ranges::{PhysicalRange, RangeSet};

use crate::serve::HandleCall;

/// The bits of an entry, as in the kernel's `kernel-page-flags.h`.
mod flags {
    pub const BUDDY: u64 = 1 << 10;
    pub const OFFLINE: u64 = 1 << 23;
    /// `LOCKED`, `REFERENCED`, `UPTODATE`, `DIRTY`, `LRU`, `ACTIVE`, `SLAB`, `WRITEBACK`, `MMAP`, `ANON`, `SWAPCACHE`,
    /// `SWAPBACKED`, `HUGE`, `UNEVICTABLE`, `KSM`, `ZERO_PAGE`, `PGTABLE`, `RESERVED`, `MLOCKED`, `PRIVATE`. A free
    /// page or a page of a hinted block has none of them.
    pub const USED: u64 = 0b1111_1101
        | (1 << 8)
        | (0b1111 << 11)
        | (0b11 << 17)
        | (1 << 21)
        | (1 << 24)
        | (1 << 26)
        | (0b11 << 32)
        | (1 << 35);
}

impl HandleCall for FreePages {
    fn handle(self) -> Result<RangeSet> {
        let all = read()?;
        Ok(pages_with_flags(&all, |flags| flags & flags::BUDDY != 0))
    }
}

impl HandleCall for PageUse {
    fn handle(self) -> Result<PagesByUse> {
        let all = read()?;
        Ok(PagesByUse {
            free: pages_with_flags(&all, |flags| flags & flags::BUDDY != 0),
            ballooned: pages_with_flags(&all, |flags| flags & flags::OFFLINE != 0),
            used: pages_with_flags(&all, |flags| {
                flags & (flags::BUDDY | flags::OFFLINE) == 0 && flags & flags::USED != 0
            }),
        })
    }
}

/// Reads the flags: one entry for each page, from physical address 0.
fn read() -> Result<Vec<u8>> {
    fs::read("/proc/kpageflags").context("cannot read /proc/kpageflags")
}

fn pages_with_flags(entries: &[u8], wanted: impl Fn(u64) -> bool) -> RangeSet {
    let entries = entries
        .chunks_exact(size_of::<u64>())
        .filter_map(|bytes| bytes.try_into().ok())
        .map(u64::from_ne_bytes);
    (0..)
        .zip(entries)
        .filter(|(_, flags)| wanted(*flags))
        .map(|(frame, _): (u64, _)| PhysicalRange {
            start: frame * PAGE as u64,
            length: PAGE as u64,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_use_are_one_range() {
        let entries: Vec<u8> = [0, flags::BUDDY, flags::BUDDY, 1 << 12, flags::BUDDY]
            .into_iter()
            .flat_map(u64::to_ne_bytes)
            .collect();
        let page = PAGE as u64;
        assert_eq!(
            pages_with_flags(&entries, |flags| flags & flags::BUDDY != 0).ranges(),
            [(1, 2), (4, 1)].map(|(first, pages)| PhysicalRange {
                start: first * page,
                length: pages * page
            })
        );
        assert_eq!(
            pages_with_flags(&entries, |bits| bits & flags::USED != 0).bytes(),
            page
        );
    }
}
