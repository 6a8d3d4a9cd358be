// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Repeated search for devices that pin guest memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use guest_migration::{find_pinning, Pinning};
use rustix::fs::fstat;
use tracing::debug;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Ram;
use crate::sync::lock;

/// The least time between two searches. A search takes time for each process of the host.
const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    is_running: bool,
    finished: Option<Instant>,
    /// What the last search found, until it is taken.
    found: Option<Pinning>,
}

/// Searches for devices that pin guest memory, in a thread of its own.
#[derive(Clone, Debug, Default)]
pub struct PinScan(Arc<Mutex<State>>);

impl PinScan {
    /// Returns what has been found since the last call, if a search has ended. Starts another search if the last one is
    /// long ago. Never waits for a search.
    pub fn poll(&self, ram: &Ram) -> Option<Pinning> {
        let mut state = lock(&self.0);
        let found = state.found.take();
        let is_due = state.finished.is_none_or(|it| it.elapsed() >= INTERVAL);
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
        let state = lock(&self.0);
        state.is_running || state.finished.is_some()
    }

    fn run(&self, files: &[FileOffset]) {
        let found = search(files.iter().map(FileOffset::file));
        let mut state = lock(&self.0);
        state.is_running = false;
        state.finished = Some(Instant::now());
        state.found = Some(found);
    }
}

/// Searches for devices that pin memory files which the front end has not shared before.
#[derive(Debug, Default)]
pub struct NewFiles(BTreeSet<(u64, u64)>);

impl NewFiles {
    /// Searches for devices that pin `memory`. Takes time for each process of the host. Returns `None`, without a search,
    /// if all files are known.
    pub fn find_pins(&mut self, memory: &GuestMemoryMmap) -> Option<Pinning> {
        let files = || {
            let files = memory.iter().filter_map(GuestMemoryRegion::file_offset);
            files.map(FileOffset::file)
        };
        let inodes = files().filter_map(|file| fstat(file).ok());
        // No more than the front end shares now, so that the set stays small.
        let inodes: BTreeSet<_> = inodes.map(|it| (it.st_dev, it.st_ino)).collect();
        let is_new = !inodes.is_subset(&self.0);
        self.0 = inodes;
        is_new.then(|| search(files()))
    }
}

fn search<'a>(files: impl IntoIterator<Item = &'a File>) -> Pinning {
    find_pinning(files).unwrap_or_else(|error| {
        debug!("search for devices that pin guest memory failed: {error}");
        Pinning::default()
    })
}
