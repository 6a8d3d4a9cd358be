// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The content at the destination, recorded as a hash of each page.

use std::fmt;

use super::page_hashes::PageHashes;
use super::run_builder::RunBuilder;
use super::TrackingError;
use crate::digest::{ContentDigest, PageHash, PageHasher};
use crate::{Layout, Memory, PageRun, PAGE_SIZE};

/// Size of a page in bytes, as an index.
const PAGE: usize = PAGE_SIZE as usize;

/// Pages per read during a comparison: 1 MiB.
const PAGES_AT_ONCE: u64 = 256;

/// A hash of each page as sent. Each hash starts as that of a page of zeros, because the destination starts with
/// zeros.
///
/// The table takes 16 bytes per page, for pages near one that was not sent as zeros. The hash has a secret seed, so a
/// guest cannot construct two different pages with the same hash.
pub struct SentTable {
    hasher: PageHasher,
    blocks: Vec<PageHashes>,
    digest: ContentDigest,
    buffer: Vec<u8>,
    /// Whether memory was insufficient for a hash. The table is then of no use any longer.
    is_incomplete: bool,
}

impl SentTable {
    /// Returns the table of an empty destination.
    ///
    /// # Errors
    ///
    /// If memory for the read buffer is insufficient, or if the system provides no random numbers.
    pub fn new(layout: &Layout) -> Result<Self, TrackingError> {
        let hasher = PageHasher::with_random_seed().map_err(|error| {
            TrackingError::Unavailable(format!("no random seed for the page hashes: {error}"))
        })?;
        Self::with_hasher(layout, hasher)
    }

    /// Returns the table of an empty destination that uses `hasher`.
    ///
    /// # Errors
    ///
    /// If memory for the read buffer is insufficient.
    pub fn with_hasher(layout: &Layout, hasher: PageHasher) -> Result<Self, TrackingError> {
        let blocks = layout.blocks().iter();
        let blocks = blocks.map(|block| PageHashes::new(block.pages())).collect();
        let mut buffer = Vec::new();
        let length = PAGE * usize::try_from(PAGES_AT_ONCE).unwrap_or(1);
        if buffer.try_reserve_exact(length).is_err() {
            let text = "not enough memory for the read buffer of guest memory".to_owned();
            return Err(TrackingError::Unavailable(text));
        }
        buffer.resize(length, 0);
        Ok(Self {
            hasher,
            blocks,
            digest: ContentDigest::new(),
            buffer,
            is_incomplete: false,
        })
    }

    /// Returns the hasher, which has the seed of the hashes.
    pub fn hasher(&self) -> &PageHasher {
        &self.hasher
    }

    /// Returns the digest of the content at the destination.
    pub fn digest(&self) -> ContentDigest {
        self.digest
    }

    /// Records that the pages `run` were sent with the content `bytes`, [`PAGE_SIZE`] each. Ignores a run that exceeds
    /// its RAM block, and pages for which `bytes` is too short.
    pub fn record_sent(&mut self, run: PageRun, bytes: &[u8]) {
        for (page, bytes) in (run.first..run.end()).zip(bytes.chunks_exact(PAGE)) {
            let new = self.hasher.hash(bytes);
            self.record(run, page, new);
        }
    }

    /// Records that the pages `run` were sent as zeros. Ignores a run that exceeds its RAM block.
    pub fn record_sent_zeros(&mut self, run: PageRun) {
        let Some(hashes) = self.blocks.get(run.block) else {
            return;
        };
        let changed: Vec<u64> = hashes.not_zero(run.first..run.end()).collect();
        for page in changed {
            self.record(run, page, PageHash::ZERO);
        }
    }

    fn record(&mut self, run: PageRun, page: u64, new: PageHash) {
        let hashes = self.blocks.get_mut(run.block);
        let Some(hashes) = hashes.filter(|hashes| run.end() <= hashes.pages()) else {
            return;
        };
        match hashes.replace(page, new) {
            Ok(old) => self.digest.replace(run.block, page, old, new),
            Err(_) => self.is_incomplete = true,
        }
    }

    /// Compares guest memory with the recorded content, and calls `differs` with each run of pages that differ, by
    /// ascending RAM block and page. Holes count as zeros and are not read.
    ///
    /// # Errors
    ///
    /// If guest memory cannot be read, or memory was insufficient for the hash of a page that was sent.
    pub fn compare(
        &mut self,
        memory: &Memory,
        mut differs: impl FnMut(PageRun),
    ) -> Result<(), TrackingError> {
        let Self {
            hasher,
            blocks,
            buffer,
            is_incomplete,
            ..
        } = self;
        if *is_incomplete {
            let text = "not enough memory for the hashes of the pages that were sent".to_owned();
            return Err(TrackingError::Unavailable(text));
        }
        for (block, hashes) in blocks.iter().enumerate() {
            let failed = |page: u64, source| TrackingError::Read {
                block,
                offset: page.saturating_mul(PAGE_SIZE),
                source,
            };
            let mut builder = RunBuilder::new(block, &mut differs);
            let mut hole = 0;
            loop {
                let data = memory
                    .next_data(block, hole)
                    .map_err(|error| failed(hole, error))?;
                let end = data.map_or(hashes.pages(), |data| data.first);
                for page in hashes.not_zero(hole..end) {
                    builder.add(page);
                }
                let Some(data) = data else {
                    break;
                };
                for chunk in data.chunks(PAGES_AT_ONCE) {
                    let length = usize::try_from(chunk.length()).unwrap_or(usize::MAX);
                    let Some(bytes) = buffer.get_mut(..length) else {
                        continue;
                    };
                    memory
                        .read(chunk, bytes)
                        .map_err(|error| failed(chunk.first, error))?;
                    let pages = (chunk.first..).zip(hashes.starting_at(chunk.first));
                    for ((page, hash), bytes) in pages.zip(bytes.chunks_exact(PAGE)) {
                        if hasher.hash(bytes) != hash {
                            builder.add(page);
                        }
                    }
                }
                hole = data.end();
            }
            builder.end();
        }
        Ok(())
    }
}

impl fmt::Debug for SentTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages: u64 = self.blocks.iter().map(PageHashes::pages).sum();
        f.debug_struct("SentTable")
            .field("pages", &pages)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::dirty_tracking::test_memory;

    fn run(block: usize, first: u64, pages: u64) -> PageRun {
        PageRun {
            block,
            first,
            pages,
        }
    }

    fn differing(table: &mut SentTable, memory: &Memory) -> Vec<PageRun> {
        let mut runs = Vec::new();
        table.compare(memory, |run| runs.push(run)).unwrap();
        runs
    }

    #[test]
    fn what_differs_from_what_was_sent_is_found_also_in_holes() {
        let memory = test_memory(&[1000, 4]);
        let mut table = SentTable::new(memory.layout()).unwrap();
        assert_eq!(differing(&mut table, &memory), []);
        let ram = memory.file(0).unwrap();
        ram.write_all_at(&[1; 600 * PAGE], 100 * PAGE_SIZE).unwrap();
        memory
            .file(1)
            .unwrap()
            .write_all_at(&[2], 3 * PAGE_SIZE)
            .unwrap();
        // Allocated pages of zeros count as zeros.
        ram.write_all_at(&[0; PAGE], 900 * PAGE_SIZE).unwrap();
        assert_eq!(
            differing(&mut table, &memory),
            [run(0, 100, 600), run(1, 3, 1)]
        );
        table.record_sent(run(0, 100, 600), &[1; 600 * PAGE]);
        assert_eq!(differing(&mut table, &memory), [run(1, 3, 1)]);
        ram.write_all_at(&[3], 100 * PAGE_SIZE + 4095).unwrap();
        let mut bytes = [0; PAGE];
        bytes[0] = 2;
        table.record_sent(run(1, 3, 1), &bytes);
        assert_eq!(differing(&mut table, &memory), [run(0, 100, 1)]);
        // Some of the sent pages become holes.
        rustix::fs::ftruncate(ram, 650 * PAGE_SIZE).unwrap();
        rustix::fs::ftruncate(ram, 1000 * PAGE_SIZE).unwrap();
        assert_eq!(
            differing(&mut table, &memory),
            [run(0, 100, 1), run(0, 650, 50)]
        );
        table.record_sent_zeros(run(0, 640, 360));
        assert_eq!(
            differing(&mut table, &memory),
            [run(0, 100, 1), run(0, 640, 10)]
        );
    }

    #[test]
    fn comparing_fills_no_hole() {
        use std::os::unix::fs::MetadataExt;
        let memory = test_memory(&[64]);
        let file = memory.file(0).unwrap();
        file.write_all_at(&[1], 7 * PAGE_SIZE).unwrap();
        let mut table = SentTable::new(memory.layout()).unwrap();
        assert_eq!(differing(&mut table, &memory), [run(0, 7, 1)]);
        assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE_SIZE);
    }

    #[test]
    fn the_digest_is_that_of_what_was_sent() {
        let memory = test_memory(&[8]);
        let mut table = SentTable::with_hasher(memory.layout(), PageHasher::new(4)).unwrap();
        table.record_sent(run(0, 2, 2), &[5; 2 * PAGE]);
        table.record_sent_zeros(run(0, 3, 1));
        // Pages that no RAM block has.
        table.record_sent(run(0, 8, 1), &[5; PAGE]);
        table.record_sent(run(1, 0, 1), &[5; PAGE]);
        let mut wanted = ContentDigest::new();
        wanted.add(0, 2, table.hasher().hash(&[5; PAGE]));
        assert_eq!(table.digest(), wanted);
    }
}
