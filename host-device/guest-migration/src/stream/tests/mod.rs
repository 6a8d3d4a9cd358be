// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of streams: round trips against a plain model of memory, malformed streams, and failing peers.

mod hostile;
mod peers;
mod round_trips;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::fs::{ftruncate, memfd_create, seek, MemfdFlags, SeekFrom};
use rustix::io::Errno;
use tempfile::TempDir;

use super::*;
use crate::{Layout, Memory, PageRun, RamBlock, PAGE_SIZE};

const PAGE: usize = PAGE_SIZE as usize;
const NAMES: [&str; 2] = ["ram", "vga"];

fn run(block: usize, first: u64, pages: u64) -> PageRun {
    PageRun {
        block,
        first,
        pages,
    }
}

fn layout(pages: [u64; 2]) -> Layout {
    let blocks = NAMES
        .iter()
        .zip(pages)
        .map(|(name, pages)| RamBlock::new(name, pages * PAGE_SIZE).unwrap());
    Layout::new(blocks, []).unwrap()
}

fn memory(layout: &Layout) -> Memory {
    let files = layout.blocks().iter().map(|block| {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, block.length()).unwrap();
        file
    });
    Memory::new(Arc::new(layout.clone()), files.collect()).unwrap()
}

/// The directory of a test's files.
struct TestDir(TempDir);

impl TestDir {
    fn new() -> Self {
        // Guest memory usually is in a tmpfs, and files are fast there.
        let shared = Path::new("/dev/shm");
        Self(match shared.is_dir() {
            true => tempfile::tempdir_in(shared).unwrap(),
            false => tempfile::tempdir().unwrap(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn address(&self, kind: &str) -> Address {
        match kind {
            "tcp" => "tcp:127.0.0.1:0".parse().unwrap(),
            kind => format!("{kind}:{}", self.path("stream").display())
                .parse()
                .unwrap(),
        }
    }

    fn destination(&self) -> Destination {
        NAMES.iter().fold(Destination::new(), |destination, name| {
            destination.with_ram_block(*name, self.path(name))
        })
    }

    fn marked(&self) -> bool {
        let marks = NAMES.map(|name| Destination::marker(&self.path(name)).exists());
        assert_eq!(marks[0], marks[1], "one is marked and one is not");
        marks[0]
    }

    /// Starts a receiver at `address`. Returns its actual address and its thread.
    fn receive(&self, address: &Address) -> (Address, Receiving) {
        self.receive_with(address, ReceiverOptions::default())
    }

    fn receive_with(&self, address: &Address, options: ReceiverOptions) -> (Address, Receiving) {
        let listener = Listener::bind(address).unwrap();
        let receiver = Receiver::new(listener, self.destination(), options).unwrap();
        assert!(self.marked());
        let address = receiver.address().clone();
        let progress = receiver.progress();
        let thread = std::thread::spawn(move || receiver.run());
        (address, Receiving { thread, progress })
    }

    /// Returns the content of a RAM block's file, and for each page whether it is not a hole.
    fn content(&self, block: usize) -> (Vec<u8>, Vec<bool>) {
        read(&self.path(NAMES[block]))
    }
}

struct Receiving {
    thread: JoinHandle<Result<Received, StreamError>>,
    progress: ReceiveProgress,
}

impl Receiving {
    fn end(self) -> Result<Received, StreamError> {
        let ended = self.thread.join().unwrap();
        assert_eq!(self.progress.phase(), ReceivePhase::Ended);
        ended
    }
}

fn read(path: &Path) -> (Vec<u8>, Vec<bool>) {
    let file = File::open(path).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    let mut data = vec![false; bytes.len() / PAGE];
    let mut at = 0;
    loop {
        let start = match seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => panic!("{error}"),
        };
        at = seek(&file, SeekFrom::Hole(start)).unwrap();
        data[start as usize / PAGE..(at as usize).div_ceil(PAGE)].fill(true);
    }
    file.read_exact_at(&mut bytes, 0).unwrap();
    (bytes, data)
}

/// Returns the content of `pages` pages: some zero, some compressible, some incompressible.
fn pattern(seed: u64, pages: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(pages as usize * PAGE);
    for page in 0..pages {
        match (seed + page) % 5 {
            0 => bytes.extend([0; PAGE]),
            1 | 2 => bytes.extend([(seed + page) as u8 | 1; PAGE]),
            _ => bytes.extend((0..PAGE as u64 / 8).flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })),
        }
    }
    bytes
}
