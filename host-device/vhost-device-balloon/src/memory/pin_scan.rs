// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Repeated search for devices that pin guest memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use guest_migration::{find_pinning_of, FileId, Pinning};
use rustix::fs::fstat;
use tracing::warn;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Ram;
use crate::sync::lock;

/// The least time between two searches. A search takes time for each process of the host.
const INTERVAL: Duration = Duration::from_secs(1);

/// A search of some duration is not repeated for so many times this duration, because others can make it take long.
const REST: u32 = 20;

/// Searches for devices that pin the memory files with these identities.
type Search = dyn Fn(Vec<FileId>) -> io::Result<Pinning> + Send + Sync;

/// Who searches for devices that pin guest memory: this process, unless another one does it.
#[derive(Clone, Default)]
pub struct PinFinder(Option<Arc<Search>>);

impl PinFinder {
    /// Returns a finder that calls `search`. It takes time for each process of the host, and is not called under a lock of
    /// the device.
    pub fn new(
        search: impl Fn(Vec<FileId>) -> io::Result<Pinning> + Send + Sync + 'static,
    ) -> Self {
        Self(Some(Arc::new(search)))
    }

    /// Returns `None` if the search failed, so that it tells nothing.
    fn find<'a>(&self, files: impl IntoIterator<Item = &'a File>) -> Option<Pinning> {
        let ids: io::Result<Vec<_>> = files.into_iter().map(FileId::of).collect();
        let found = ids.and_then(|ids| match &self.0 {
            Some(search) => search(ids),
            None => find_pinning_of(ids, std::process::id()),
        });
        found
            .inspect_err(|error| warn!("search for devices that pin guest memory failed: {error}"))
            .ok()
    }
}

impl std::fmt::Debug for PinFinder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PinFinder").field(&self.0.is_some()).finish()
    }
}

#[derive(Debug, Default)]
struct State {
    is_running: bool,
    finished: Option<Instant>,
    /// How long the last search took.
    took: Duration,
    /// What the last search found, until it is taken.
    found: Option<Pinning>,
}

/// Searches for devices that pin guest memory, in a thread of its own.
#[derive(Clone, Debug, Default)]
pub struct PinScan {
    finder: PinFinder,
    state: Arc<Mutex<State>>,
}

impl PinScan {
    /// Creates a scan that `finder` does.
    pub fn new(finder: PinFinder) -> Self {
        Self {
            finder,
            state: Arc::default(),
        }
    }

    /// Returns who searches.
    pub fn finder(&self) -> PinFinder {
        self.finder.clone()
    }

    /// Returns what has been found since the last call, if a search has ended. Starts another search if the last one is
    /// long ago. Never waits for a search.
    pub fn poll(&self, ram: &Ram) -> Option<Pinning> {
        let mut state = lock(&self.state);
        let found = state.found.take();
        let interval = INTERVAL.max(state.took.saturating_mul(REST));
        let is_due = state.finished.is_none_or(|it| it.elapsed() >= interval);
        if is_due && !state.is_running {
            let files = ram.regions.iter().filter_map(|it| it.file.as_ref());
            let files: Vec<FileOffset> = files.cloned().collect();
            let scan = self.clone();
            let thread = thread::Builder::new().name("pin-scan".into());
            let started = thread.spawn(move || scan.run(&files));
            state.is_running = started.is_ok();
        }
        found
    }

    /// Returns whether a search has ever been started.
    #[cfg(test)]
    pub(crate) fn has_started(&self) -> bool {
        let state = lock(&self.state);
        state.is_running || state.finished.is_some()
    }

    fn run(&self, files: &[FileOffset]) {
        let begun = Instant::now();
        let found = self.finder.find(files.iter().map(FileOffset::file));
        let mut state = lock(&self.state);
        state.is_running = false;
        state.took = begun.elapsed();
        state.finished = Some(Instant::now());
        state.found = found;
    }
}

/// Searches for devices that pin memory files which the front end has not shared before.
#[derive(Debug)]
pub struct NewFiles {
    finder: PinFinder,
    known: BTreeSet<(u64, u64)>,
}

impl NewFiles {
    /// Creates a search that `finder` does. No file is known.
    pub fn new(finder: PinFinder) -> Self {
        Self {
            finder,
            known: BTreeSet::new(),
        }
    }

    /// Searches for devices that pin `memory`. Takes time for each process of the host. Returns `None`, without a search,
    /// if all files are known, and if the search failed.
    pub fn find_pins(&mut self, memory: &GuestMemoryMmap) -> Option<Pinning> {
        let files = || {
            let files = memory.iter().filter_map(GuestMemoryRegion::file_offset);
            files.map(FileOffset::file)
        };
        let inodes = files().filter_map(|file| fstat(file).ok());
        // No more than the front end shares now, so that the set stays small.
        let inodes: BTreeSet<_> = inodes.map(|it| (it.st_dev, it.st_ino)).collect();
        let is_new = !inodes.is_subset(&self.known);
        self.known = inodes;
        is_new.then(|| self.finder.find(files())).flatten()
    }
}
