// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The open memory files of a stream.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::digest_chunk::DigestChunk;
use super::ram_block_file::{RamBlockFile, PAGE};
use crate::digest::{ContentDigest, PageHasher};
use crate::stream::destination_error::DestinationError;
use crate::PageRun;

/// Number of pages that a thread hashes between two calls of `keep_going`.
const DIGEST_BUFFER_PAGES: usize = 64;
/// Number of pages in a chunk, which one thread hashes: 64 MiB.
const DIGEST_CHUNK_PAGES: u64 = 16384;
/// The maximum number of hashing threads.
const DIGEST_THREADS_MAX: usize = 4;

/// The open memory files of a stream. Several threads can write to them.
#[derive(Debug)]
pub(in crate::stream) struct OpenFiles {
    pub(super) slots: Vec<RamBlockFile>,
}

impl OpenFiles {
    /// Writes whole pages into a RAM block, starting at page `first`.
    pub fn write(&self, block: usize, first: u64, bytes: &[u8]) -> Result<(), DestinationError> {
        self.slot(block)?.write(first, bytes)
    }

    /// Zeroes a run of pages.
    pub fn zero(&self, block: usize, first: u64, pages: u64) -> Result<(), DestinationError> {
        self.slot(block)?.zero(first, pages)
    }

    fn slot(&self, block: usize) -> Result<&RamBlockFile, DestinationError> {
        self.slots.get(block).ok_or(DestinationError::NoFile)
    }

    /// Returns the paths of the files, by RAM block.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.slots.iter().map(|slot| slot.path.clone()).collect()
    }

    /// Returns the content digest of the files, computed by several threads.
    ///
    /// Calls `tick` regularly in the thread of the caller. An error of `tick` ends the computation.
    pub fn digest<E: From<DestinationError>>(
        &self,
        hasher: &PageHasher,
        mut tick: impl FnMut() -> Result<(), E>,
    ) -> Result<ContentDigest, E> {
        // Taken one by one: the sender determines their number.
        let parts = Mutex::new(self.parts());
        let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
        let stopped = AtomicBool::new(false);
        let helpers = std::thread::available_parallelism()
            .map_or(1, |it| it.get().min(DIGEST_THREADS_MAX))
            - 1;
        // Hashes chunks until none is left or any thread stops.
        let work =
            |keep_going: &mut dyn FnMut() -> bool| -> Result<ContentDigest, DestinationError> {
                let mut digest = ContentDigest::new();
                let mut buffer = vec![0; DIGEST_BUFFER_PAGES * PAGE];
                let mut keep_going = || keep_going() && !stopped.load(Ordering::Relaxed);
                while let Some(part) = next() {
                    let done = part.digest(hasher, &mut buffer, &mut digest, &mut keep_going);
                    if !matches!(done, Ok(true)) {
                        stopped.store(true, Ordering::Relaxed);
                        return done.map(|_| digest);
                    }
                }
                Ok(digest)
            };
        let mut reason = Ok(());
        let digests = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..helpers)
                .map(|_| scope.spawn(|| work(&mut || true)))
                .collect();
            let mut digests = vec![work(&mut || {
                reason = tick();
                reason.is_ok()
            })];
            for thread in threads {
                digests.push(thread.join().unwrap_or(Err(DestinationError::DigestFailed)));
            }
            digests
        });
        reason?;
        let mut whole = ContentDigest::new();
        for digest in digests {
            whole.join(digest?);
        }
        Ok(whole)
    }

    fn parts(&self) -> impl Iterator<Item = DigestChunk<'_>> {
        self.slots.iter().enumerate().flat_map(|(block, slot)| {
            let whole = PageRun {
                block,
                first: 0,
                pages: slot.pages,
            };
            whole
                .chunks(DIGEST_CHUNK_PAGES)
                .map(move |run| DigestChunk { slot, run })
        })
    }
}
