// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ranges of guest memory.

use serde::{Deserialize, Serialize};

use crate::pattern::PAGE;

/// A contiguous range of guest physical memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PhysicalRange {
    /// The guest physical address of the first byte.
    pub start: u64,
    /// The size in bytes; never 0.
    pub length: u64,
}

impl PhysicalRange {
    /// Returns the address after the last byte, saturated at the end of the address space.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }
}

/// A set of bytes of guest memory: sorted ranges that do not overlap or touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<PhysicalRange>", into = "Vec<PhysicalRange>")]
pub struct RangeSet(Vec<PhysicalRange>);

impl From<Vec<PhysicalRange>> for RangeSet {
    fn from(mut ranges: Vec<PhysicalRange>) -> Self {
        ranges.retain(|range| range.length > 0);
        ranges.sort_unstable();
        let mut merged: Vec<PhysicalRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end() => {
                    last.length = last.end().max(range.end()) - last.start;
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }
}

impl From<RangeSet> for Vec<PhysicalRange> {
    fn from(set: RangeSet) -> Self {
        set.0
    }
}

impl FromIterator<PhysicalRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = PhysicalRange>>(ranges: I) -> Self {
        ranges.into_iter().collect::<Vec<_>>().into()
    }
}

impl RangeSet {
    /// Returns the ranges, in ascending order.
    #[must_use]
    pub fn ranges(&self) -> &[PhysicalRange] {
        &self.0
    }

    /// Returns the size of the set, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.length).sum()
    }

    /// Returns the whole pages in the set.
    pub fn pages(&self) -> impl Iterator<Item = PhysicalRange> + '_ {
        let length = PAGE as u64;
        self.0.iter().flat_map(move |range| {
            let first = range.start.next_multiple_of(length);
            let starts = (first..range.end()).step_by(PAGE);
            let whole = starts.take_while(move |start| range.end() - start >= length);
            whole.map(move |start| PhysicalRange { start, length })
        })
    }

    /// Returns the bytes that are in this set and not in the other.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut rest = Vec::new();
        let mut others = other.0.iter().peekable();
        for range in &self.0 {
            let mut start = range.start;
            while others.next_if(|other| other.end() <= start).is_some() {}
            let mut ahead = others.clone();
            while let Some(other) = ahead.next_if(|other| other.start < range.end()) {
                if start < other.start {
                    rest.push(PhysicalRange {
                        start,
                        length: other.start - start,
                    });
                }
                start = start.max(other.end());
            }
            if start < range.end() {
                rest.push(PhysicalRange {
                    start,
                    length: range.end() - start,
                });
            }
        }
        Self(rest)
    }

    /// Returns the bytes that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut mine, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut common = Vec::new();
        while let (Some(a), Some(b)) = (mine.peek(), theirs.peek()) {
            let (start, end) = (a.start.max(b.start), a.end().min(b.end()));
            if start < end {
                common.push(PhysicalRange {
                    start,
                    length: end - start,
                });
            }
            if a.end() <= b.end() {
                mine.next();
            } else {
                theirs.next();
            }
        }
        Self(common)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[(u64, u64)]) -> RangeSet {
        ranges
            .iter()
            .map(|&(start, length)| PhysicalRange { start, length })
            .collect()
    }

    #[test]
    fn overlapping_and_touching_ranges_are_merged() {
        assert_eq!(
            set(&[(8, 4), (0, 4), (4, 2), (9, 1), (20, 0)]),
            set(&[(0, 6), (8, 4)])
        );
        assert_eq!(set(&[(8, 4), (0, 4), (4, 2)]).bytes(), 10);
    }

    #[test]
    fn pages_are_whole() {
        let starts = |set: RangeSet| set.pages().map(|page| page.start).collect::<Vec<_>>();
        assert_eq!(starts(set(&[(0, 8192), (12287, 4098)])), [0, 4096, 12288]);
        assert_eq!(starts(set(&[(1, 8190)])), [0_u64; 0]);
    }

    #[test]
    fn a_difference_holds_only_what_the_other_lacks() {
        let a = set(&[(0, 10), (20, 10), (40, 1)]);
        let b = set(&[(2, 2), (5, 20), (29, 20)]);
        assert_eq!(a.difference(&b), set(&[(0, 2), (4, 1), (25, 4)]));
        assert_eq!(a.difference(&set(&[])), a);
        assert_eq!(a.difference(&a), set(&[]));
    }

    #[test]
    fn an_intersection_holds_only_what_both_hold() {
        let a = set(&[(0, 10), (20, 10), (40, 1)]);
        let b = set(&[(5, 20), (29, 20)]);
        assert_eq!(
            a.intersection(&b),
            set(&[(5, 5), (20, 5), (29, 1), (40, 1)])
        );
        assert_eq!(a.intersection(&set(&[])), set(&[]));
    }
}
