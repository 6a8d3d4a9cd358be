// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The chunks of memory files that threads hash.

use std::os::unix::fs::FileExt;

use rustix::fs::{seek, SeekFrom};
use rustix::io::Errno;

use super::ram_block_file::{RamBlockFile, PAGE};
use crate::digest::{ContentDigest, PageHasher};
use crate::stream::destination_error::DestinationError;
use crate::{PageRun, PAGE_SIZE};

/// A chunk of a memory file, which one thread hashes.
pub(super) struct DigestChunk<'a> {
    pub(super) slot: &'a RamBlockFile,
    pub(super) run: PageRun,
}

impl DigestChunk<'_> {
    /// Adds the pages of the chunk to `digest`. Returns false if `keep_going` ended it early.
    pub(super) fn digest(
        &self,
        hasher: &PageHasher,
        buffer: &mut [u8],
        digest: &mut ContentDigest,
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DestinationError> {
        let end = self.run.end().saturating_mul(PAGE_SIZE);
        let mut at = self.run.offset();
        while at < end {
            at = match seek(&self.slot.file, SeekFrom::Data(at)) {
                Ok(data) => data / PAGE_SIZE * PAGE_SIZE,
                Err(Errno::NXIO) => break,
                // The file system cannot report holes.
                Err(_) => at,
            };
            let count = end.saturating_sub(at).min(buffer.len() as u64);
            let bytes = usize::try_from(count).ok();
            let bytes = bytes.and_then(|count| buffer.get_mut(..count));
            let bytes = bytes.unwrap_or_default();
            self.slot
                .file
                .read_exact_at(bytes, at)
                .map_err(self.slot.error("cannot read received pages"))?;
            for (page, bytes) in (at / PAGE_SIZE..).zip(bytes.chunks_exact(PAGE)) {
                digest.add(self.run.block, page, hasher.hash(bytes));
            }
            at = at.saturating_add(count);
            if !keep_going() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
