// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hashes of the pages of a RAM block.

use std::collections::btree_map::{BTreeMap, Entry};
use std::collections::TryReserveError;
use std::ops::Range;

use crate::digest::PageHash;

/// Pages per chunk, 16 MiB of guest memory. Their hashes take 64 KiB.
const CHUNK: u64 = 4096;

/// A hash for each page of a RAM block. All are [`PageHash::ZERO`] at first.
///
/// Takes memory for chunks of pages with another hash only: the size of a sparse file says nothing about its content, and
/// may be that of the address space.
#[derive(Debug)]
pub(super) struct PageHashes {
    pages: u64,
    /// By the number of the chunk. A chunk that is missing has only hashes of zeros.
    chunks: BTreeMap<u64, Box<[PageHash]>>,
}

impl PageHashes {
    /// Creates hashes for `pages` pages: at most those of the largest file.
    pub(super) fn new(pages: u64) -> Self {
        Self {
            pages,
            chunks: BTreeMap::new(),
        }
    }

    /// Returns the number of pages.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Iterates over the hashes from page `first`.
    pub(super) fn starting_at(&self, first: u64) -> impl Iterator<Item = PageHash> + '_ {
        // Looked up once for each chunk.
        let mut last: Option<(u64, Option<&[PageHash]>)> = None;
        (first..self.pages).map(move |page| {
            let number = page / CHUNK;
            let hashes = match last {
                Some((chunk, hashes)) if chunk == number => hashes,
                _ => self.chunks.get(&number).map(AsRef::as_ref),
            };
            last = Some((number, hashes));
            let hash = hashes.and_then(|hashes| hashes.get(index(page)));
            hash.copied().unwrap_or(PageHash::ZERO)
        })
    }

    /// Sets the hash of a page, and returns the last one. Ignores a page that the RAM block has not.
    ///
    /// # Errors
    ///
    /// If memory for the hash is insufficient.
    pub(super) fn replace(
        &mut self,
        page: u64,
        new: PageHash,
    ) -> Result<PageHash, TryReserveError> {
        let number = page / CHUNK;
        if page >= self.pages || (new == PageHash::ZERO && !self.chunks.contains_key(&number)) {
            return Ok(PageHash::ZERO);
        }
        let hashes = match self.chunks.entry(number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(zeros()?),
        };
        let place = hashes.get_mut(index(page));
        Ok(place.map_or(PageHash::ZERO, |place| std::mem::replace(place, new)))
    }

    /// Iterates over the pages in `pages` whose hash is not [`PageHash::ZERO`], in order. Takes no time for missing chunks.
    pub(super) fn not_zero(&self, pages: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let end = pages.end.min(self.pages);
        let start = pages.start.min(end);
        let chunks = self.chunks.range(start / CHUNK..end.div_ceil(CHUNK));
        chunks.flat_map(move |(number, hashes)| {
            let hashes = (number * CHUNK..).zip(hashes.iter());
            hashes
                .filter(move |(page, hash)| (start..end).contains(page) && **hash != PageHash::ZERO)
                .map(|(page, _)| page)
        })
    }
}

/// Returns the place of the hash of a page in its chunk.
fn index(page: u64) -> usize {
    usize::try_from(page % CHUNK).unwrap_or(usize::MAX)
}

fn zeros() -> Result<Box<[PageHash]>, TryReserveError> {
    let mut hashes = Vec::new();
    let length = index(CHUNK - 1) + 1;
    hashes.try_reserve_exact(length)?;
    hashes.resize(length, PageHash::ZERO);
    Ok(hashes.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::digest::PageHasher;

    #[test]
    fn a_huge_ram_block_takes_memory_for_what_is_in_it() {
        /// Of the largest file that there can be.
        const PAGES: u64 = u64::MAX / crate::PAGE_SIZE;
        let mut hashes = PageHashes::new(PAGES);
        let one = PageHasher::new(1).hash(&[1; 4096]);
        for page in [0, 1 << 40, PAGES - 1] {
            assert_eq!(hashes.replace(page, one).unwrap(), PageHash::ZERO);
        }
        assert_eq!(hashes.chunks.len(), 3);
        assert_eq!(
            hashes.replace(1 << 50, PageHash::ZERO).unwrap(),
            PageHash::ZERO
        );
        assert_eq!(hashes.chunks.len(), 3);
        let pages: Vec<u64> = hashes.not_zero(0..PAGES).collect();
        assert_eq!(pages, [0, 1 << 40, PAGES - 1]);
    }

    proptest! {
        #[test]
        fn it_does_what_a_plain_map_does(
            pages in 1..3 * CHUNK,
            steps in prop::collection::vec((0..3 * CHUNK, 0..3u8, 0..3 * CHUNK), 0..60),
        ) {
            let hasher = PageHasher::new(7);
            let mut hashes = PageHashes::new(pages);
            let mut model = BTreeMap::new();
            for (page, byte, end) in steps {
                let new = hasher.hash(&[byte; 4096]);
                let old = hashes.replace(page, new).unwrap();
                let modelled = if page < pages { model.insert(page, new) } else { None };
                prop_assert_eq!(old, modelled.unwrap_or(PageHash::ZERO));
                let found: Vec<u64> = hashes.not_zero(page..end).collect();
                let wanted = model.iter().filter(|(_, hash)| **hash != PageHash::ZERO).map(|(page, _)| *page);
                let wanted: Vec<u64> = wanted.filter(|it| (page..end).contains(it)).collect();
                prop_assert_eq!(found, wanted);
                let all: Vec<PageHash> = hashes.starting_at(page).collect();
                let modelled = (page..pages).map(|page| model.get(&page).copied().unwrap_or(PageHash::ZERO));
                prop_assert_eq!(all, modelled.collect::<Vec<_>>());
            }
        }
    }
}
