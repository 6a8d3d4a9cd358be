// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory files that a stream is written into, and the marks beside them as long as they are incomplete.

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
/// Pages that are hashed between two looks at the clock.
const DIGEST_BUFFER_PAGES: usize = 64;
/// Pages that one thread hashes before it takes others: 64 MiB.
const DIGEST_CHUNK_PAGES: u64 = 16384;
/// The most threads that hash.
const DIGEST_THREADS_MAX: usize = 4;

/// Memory files for the blocks of a stream.
///
/// A file that does not exist is created; one that does must be empty or as long as its block, and its content is given
/// up. It may be mapped already by a VMM that waits for it. What the stream does not bring, or brings as zeros, is
/// a hole afterwards.
///
/// From before the first byte is written until the stream has ended well, `PATH.incomplete` stands beside the file,
/// and if the stream ends badly it stays there and says why.
#[derive(Debug, Clone, Default)]
pub struct Destination {
    /// For the one block of a stream, whatever its name.
    only: Option<PathBuf>,
    named: Vec<(String, PathBuf)>,
}

impl Destination {
    /// No file yet: see [`with_ram_block`](Self::with_ram_block).
    pub fn new() -> Self {
        Self::default()
    }

    /// One file, for a stream that has one block, whatever its name is.
    pub fn with_file(path: impl Into<PathBuf>) -> Self {
        Self {
            only: Some(path.into()),
            named: Vec::new(),
        }
    }

    /// The file for the block `name`.
    #[must_use]
    pub fn with_ram_block(mut self, name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        self.named.push((name.into(), path.into()));
        self
    }

    /// The mark beside a memory file that is not complete.
    pub fn marker(path: &Path) -> PathBuf {
        let mut name = OsString::from(path);
        name.push(".incomplete");
        name.into()
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let named = self.named.iter().map(|(_, path)| path);
        self.only.iter().chain(named)
    }

    /// Marks all files as incomplete. Nothing is written into them yet.
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

    /// The file for each block, in the order of the blocks.
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

/// Files that are marked as incomplete, and hold nothing yet of the stream.
#[derive(Debug)]
pub(super) struct IncompleteFiles {
    destination: Destination,
    markers: Vec<IncompleteMarker>,
}

impl IncompleteFiles {
    /// Opens a file for each of the blocks, and makes it empty and as long as the block.
    pub fn open(&self, blocks: &[RamBlockEntry]) -> Result<OpenFiles, DestinationError> {
        let paths = self.destination.assign(blocks)?;
        // All are looked at before one is changed.
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

    /// Takes the marks away: the files are complete.
    pub fn complete(&self) -> Result<(), DestinationError> {
        self.markers.iter().try_for_each(IncompleteMarker::remove)
    }

    /// Puts the marks there again, if they were taken away, and says in them why the files are not complete.
    pub fn write_failure(&self, why: &str) {
        for marker in &self.markers {
            // There is nobody to tell but the one who is told of the first error.
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
        // It will hold all that the guest has in memory.
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

/// The file of one block.
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

    /// Makes it all one hole. It is not cut: somebody may have mapped it.
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
            // A file system without holes.
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

    /// Whether something there is not a hole, as far as one can tell.
    fn has_data(&self, offset: u64, length: u64) -> bool {
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data < offset.saturating_add(length),
            Err(error) => error != Errno::NXIO,
        }
    }

    /// Writes pages; those of zeros become, or stay, holes.
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

/// Files that pages are written into, from several threads.
#[derive(Debug)]
pub(super) struct OpenFiles {
    slots: Vec<RamBlockFile>,
}

impl OpenFiles {
    /// Writes whole pages into a block from page `first` on.
    pub fn write(&self, block: usize, first: u64, bytes: &[u8]) -> Result<(), DestinationError> {
        self.slot(block)?.write(first, bytes)
    }

    /// Makes pages zero.
    pub fn zero(&self, block: usize, first: u64, pages: u64) -> Result<(), DestinationError> {
        self.slot(block)?.zero(first, pages)
    }

    fn slot(&self, block: usize) -> Result<&RamBlockFile, DestinationError> {
        self.slots.get(block).ok_or(DestinationError::NoFile)
    }

    /// The paths, by block.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.slots.iter().map(|slot| slot.path.clone()).collect()
    }

    /// The digest of what is in the files, computed by a few threads. Calls `tick` now and then, whose error ends it.
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
        // Takes parts until there are none, or somebody has found a reason to stop.
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

/// Some pages of a file, which one thread looks at.
struct DigestChunk<'a> {
    slot: &'a RamBlockFile,
    run: PageRun,
}

impl DigestChunk<'_> {
    /// Adds the pages' parts to a digest. `false` if `keep_going` said that it is to be given up.
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
                // A file system that does not know holes.
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

/// `PATH.incomplete`, locked for this receiver.
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
