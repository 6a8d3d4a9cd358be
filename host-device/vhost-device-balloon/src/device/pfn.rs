// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Page frame numbers in inflate and deflate requests.

use std::ops::Range;

use shared_abi::page::{Pfn, BALLOON_PAGE_SIZE};

/// Bytes per page frame number.
pub const PFN_BYTES: usize = 4;

/// The most page frame numbers in one request: 256 MiB of memory. Linux sends 256.
pub const MAX_PFNS: usize = 1 << 16;

/// Returns the page frame numbers in `bytes`. Ignores an incomplete number at the end.
pub fn pfns(bytes: &[u8]) -> impl Iterator<Item = Pfn> + '_ {
    bytes
        .chunks_exact(PFN_BYTES)
        .filter_map(|chunk| chunk.try_into().ok())
        .map(Pfn::from_le_bytes)
}

/// Returns the pages in `bytes` as address ranges: in ascending order, as long as possible, each page once.
pub fn ranges(bytes: &[u8]) -> Vec<Range<u64>> {
    let mut pages: Vec<Pfn> = pfns(bytes).collect();
    pages.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for page in pages {
        let (start, end) = (page.address(), page.address() + BALLOON_PAGE_SIZE);
        match ranges.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => ranges.push(start..end),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_hold_exactly_the_pages_and_are_maximal(
            numbers in prop::collection::vec(prop_oneof![0u32..300, any::<u32>()], 0..300),
        ) {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            let ranges = ranges(&bytes);
            let pages: BTreeSet<u64> = ranges
                .iter()
                .flat_map(|range| range.start / BALLOON_PAGE_SIZE..range.end / BALLOON_PAGE_SIZE)
                .collect();
            let expected: BTreeSet<u64> = numbers.into_iter().map(u64::from).collect();
            prop_assert_eq!(pages, expected);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
