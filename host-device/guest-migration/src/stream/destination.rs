// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory files that a stream is received into, and the markers beside them while they are incomplete.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{fallocate, flock, seek, FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::Errno;

use super::error::DestinationError;
use super::format::RamBlockEntry;
use crate::digest::{is_zero, ContentDigest, PageHasher};
use crate::{PageRun, PAGE_SIZE};

const PAGE: usize = PAGE_SIZE as usize;
/// Number of pages that a thread hashes between two calls of `keep_going`.
const DIGEST_BUFFER_PAGES: usize = 64;
/// Number of pages in a chunk, which one thread hashes: 64 MiB.
const DIGEST_CHUNK_PAGES: u64 = 16384;
/// The maximum number of hashing threads.
const DIGEST_THREADS_MAX: usize = 4;

/// The memory files for the RAM blocks of a stream.
///
/// A file that does not exist is created. An existing file must be empty or as long as its RAM block; its content is
/// discarded. A waiting VMM may have mapped it already. Zero pages, and pages that the stream does not contain, are
/// holes at the end.
///
/// The marker `PATH.incomplete` exists beside each file from before the first write until the stream is received and
/// verified. After a failure the marker stays, and contains the reason.
#[derive(Debug, Clone, Default)]
pub struct Destination {
    /// The file for a stream with one RAM block of any name.
    only: Option<PathBuf>,
    named: Vec<(String, PathBuf)>,
}

impl Destination {
    /// Creates a destination without files. [`with_ram_block`](Self::with_ram_block) adds them.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a destination of one file, for a stream with one RAM block of any name.
    pub fn with_file(path: impl Into<PathBuf>) -> Self {
        Self {
            only: Some(path.into()),
            named: Vec::new(),
        }
    }

    /// Adds the file for the RAM block `name`.
    #[must_use]
    pub fn with_ram_block(mut self, name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        self.named.push((name.into(), path.into()));
        self
    }

    /// Returns the path of the marker beside an incomplete memory file.
    pub fn marker(path: &Path) -> PathBuf {
        let mut name = OsString::from(path);
        name.push(".incomplete");
        name.into()
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let named = self.named.iter().map(|(_, path)| path);
        self.only.iter().chain(named)
    }

    /// Marks all files as incomplete, without opening them.
    pub(super) fn mark_incomplete(self) -> Result<IncompleteFiles, DestinationError> {
        if self.paths().next().is_none() {
            return Err(DestinationError::NoFile);
        }
        for (index, (name, _)) in self.named.iter().enumerate() {
            if self.named.iter().skip(index + 1).any(|it| it.0 == *name) {
                return Err(DestinationError::DuplicateFile(name.clone()));
            }
        }
        let markers = self.paths().map(|path| IncompleteMarker::create(path));
        let markers = markers.collect::<Result<_, _>>()?;
        Ok(IncompleteFiles {
            destination: self,
            markers,
        })
    }

    /// Returns the path for each RAM block, in the order of `blocks`.
    fn assign(&self, blocks: &[RamBlockEntry]) -> Result<Vec<PathBuf>, DestinationError> {
        if let Some(path) = &self.only {
            if blocks.len() == 1 && self.named.is_empty() {
                return Ok(vec![path.clone()]);
            }
            let names: Vec<_> = blocks.iter().map(|block| block.name.as_str()).collect();
            return Err(DestinationError::NeedNames {
                blocks: blocks.len(),
                names: names.join(", "),
            });
        }
        let unused = |(name, _): &&(String, PathBuf)| blocks.iter().all(|it| it.name != *name);
        if let Some((name, _)) = self.named.iter().find(unused) {
            return Err(DestinationError::UnusedFile(name.clone()));
        }
        blocks
            .iter()
            .map(|block| {
                let named = self.named.iter().find(|(name, _)| *name == block.name);
                let names: Vec<_> = self.named.iter().map(|(name, _)| name.as_str()).collect();
                named.map(|(_, path)| path.clone()).ok_or_else(|| {
                    DestinationError::NoFileForBlock {
                        block: block.name.clone(),
                        given: names.join(", "),
                    }
                })
            })
            .collect()
    }
}

/// A destination whose files are marked as incomplete.
#[derive(Debug)]
pub(super) struct IncompleteFiles {
    destination: Destination,
    markers: Vec<IncompleteMarker>,
}

impl IncompleteFiles {
    /// Opens the file of each RAM block, and makes it one hole as long as the RAM block.
    pub fn open(&self, blocks: &[RamBlockEntry]) -> Result<OpenFiles, DestinationError> {
        let paths = self.destination.assign(blocks)?;
        // All files are checked before the content of any is discarded.
        let files = blocks
            .iter()
            .zip(&paths)
            .map(|(block, path)| open(block, path))
            .collect::<Result<Vec<_>, _>>()?;
        let parts = blocks.iter().zip(paths).zip(files);
        let slots = parts
            .map(|((block, path), file)| {
                let slot = RamBlockFile {
                    file,
                    path,
                    pages: block.pages,
                };
                slot.clear().map(|()| slot)
            })
            .collect::<Result<_, _>>()?;
        Ok(OpenFiles { slots })
    }

    /// Removes the markers: the files are complete.
    pub fn complete(&self) -> Result<(), DestinationError> {
        self.markers.iter().try_for_each(IncompleteMarker::remove)
    }

    /// Writes the reason of a failure into the markers. Creates the markers again if they were removed.
    pub fn write_failure(&self, why: &str) {
        for marker in &self.markers {
            // Ignored: the caller already gets the first error.
            let _ = marker.write_reason(why);
        }
    }
}

fn open(block: &RamBlockEntry, path: &Path) -> Result<File, DestinationError> {
    let error = |doing| {
        move |source| DestinationError::Io {
            path: path.to_owned(),
            doing,
            source,
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        // Only the owner may read guest memory.
        .mode(0o600)
        .open(path)
        .map_err(error("cannot open the memory file"))?;
    let metadata = file.metadata().map_err(error("cannot examine it"))?;
    if !metadata.is_file() {
        return Err(DestinationError::NotRegularFile(path.to_owned()));
    }
    let wanted = block.pages.saturating_mul(PAGE_SIZE);
    if metadata.len() != 0 && metadata.len() != wanted {
        return Err(DestinationError::SizeMismatch {
            path: path.to_owned(),
            block: block.name.clone(),
            has: metadata.len(),
            wanted,
        });
    }
    Ok(file)
}

/// The memory file of one RAM block.
#[derive(Debug)]
struct RamBlockFile {
    file: File,
    path: PathBuf,
    pages: u64,
}

impl RamBlockFile {
    fn error(&self, doing: &'static str) -> impl Fn(io::Error) -> DestinationError + '_ {
        move |source| DestinationError::Io {
            path: self.path.clone(),
            doing,
            source,
        }
    }

    /// Makes the whole file one hole. Does not truncate it, because a VMM may have mapped it.
    fn clear(&self) -> Result<(), DestinationError> {
        self.file
            .set_len(self.pages.saturating_mul(PAGE_SIZE))
            .map_err(self.error("cannot make it as long as the block"))?;
        self.zero(0, self.pages)
    }

    fn zero(&self, first: u64, pages: u64) -> Result<(), DestinationError> {
        let (offset, length) = (
            first.saturating_mul(PAGE_SIZE),
            pages.saturating_mul(PAGE_SIZE),
        );
        if !self.has_data(offset, length) {
            return Ok(());
        }
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, how, offset, length) {
            Ok(()) => Ok(()),
            // The file system does not support holes.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(offset, length),
            Err(error) => Err(error.into()),
        }
        .map_err(self.error("cannot make a hole"))
    }

    fn write_zeros(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeros = [0; PAGE];
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            self.file.write_all_at(&zeros, at)?;
            at = at.saturating_add(PAGE_SIZE);
        }
        Ok(())
    }

    /// Returns whether the range contains data. Returns true if the file system cannot tell.
    fn has_data(&self, offset: u64, length: u64) -> bool {
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data < offset.saturating_add(length),
            Err(error) => error != Errno::NXIO,
        }
    }

    /// Writes pages. Zero pages become holes or stay holes.
    fn write(&self, first: u64, bytes: &[u8]) -> Result<(), DestinationError> {
        let mut at = first;
        let mut rest = bytes;
        while !rest.is_empty() {
            let zero = is_zero(rest.get(..PAGE.min(rest.len())).unwrap_or_default());
            let same = rest.chunks(PAGE).take_while(|page| is_zero(page) == zero);
            let pages = same.count();
            let (part, tail) = rest
                .split_at_checked(pages.saturating_mul(PAGE))
                .unwrap_or((rest, &[]));
            if zero {
                self.zero(at, pages as u64)?;
            } else {
                self.file
                    .write_all_at(part, at.saturating_mul(PAGE_SIZE))
                    .map_err(self.error("cannot write pages"))?;
            }
            at = at.saturating_add(pages as u64);
            rest = tail;
        }
        Ok(())
    }
}

/// The open memory files of a stream. Several threads can write to them.
#[derive(Debug)]
pub(super) struct OpenFiles {
    slots: Vec<RamBlockFile>,
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
        let parts: Vec<DigestChunk> = self.parts().collect();
        let next = AtomicUsize::new(0);
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
                while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
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

/// A chunk of a memory file, which one thread hashes.
struct DigestChunk<'a> {
    slot: &'a RamBlockFile,
    run: PageRun,
}

impl DigestChunk<'_> {
    /// Adds the pages of the chunk to `digest`. Returns false if `keep_going` ended it early.
    fn digest(
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
                .map_err(self.slot.error("cannot read it back"))?;
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

/// The marker `PATH.incomplete`, locked by this receiver.
#[derive(Debug)]
struct IncompleteMarker {
    path: PathBuf,
    file: File,
}

impl IncompleteMarker {
    fn create(memory: &Path) -> Result<Self, DestinationError> {
        let path = Destination::marker(memory);
        let error = |doing| {
            let path = path.clone();
            move |source: io::Error| DestinationError::Io {
                path,
                doing,
                source,
            }
        };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(error("cannot mark the memory file as incomplete"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(DestinationError::Busy(memory.to_owned())),
            Err(other) => return Err(error("cannot lock it")(other.into())),
        }
        let marker = Self { path, file };
        marker
            .write_reason("the migration into it is under way")
            .map_err(|source| DestinationError::Io {
                path: marker.path.clone(),
                doing: "cannot write to it",
                source,
            })?;
        Ok(marker)
    }

    fn write_reason(&self, why: &str) -> io::Result<()> {
        let mut file = if self.path.exists() {
            self.file.try_clone()?
        } else {
            File::create(&self.path)?
        };
        file.set_len(0)?;
        rustix::fs::seek(&file, SeekFrom::Start(0))?;
        writeln!(
            file,
            "The memory file beside this one is incomplete: {why}."
        )
    }

    fn remove(&self) -> Result<(), DestinationError> {
        fs::remove_file(&self.path).map_err(|source| DestinationError::Io {
            path: self.path.clone(),
            doing: "the memory file is complete, but its mark cannot be removed",
            source,
        })
    }
}
