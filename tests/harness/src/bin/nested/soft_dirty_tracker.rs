// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The soft-dirty tracker against a plain model: the writes of several processes, through mappings that are created and
//! removed, and the memory of the destination in a small migration.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use guest_migration::dirty_tracking::{
    choose_tracker, DirtyTracker, PunchedPages, SoftDirtyTracker, Stage, TrackingMode,
};
use guest_migration::{Layout, Memory, PageRun, RamBlock, SyncPhase};
use nix::fcntl::{fallocate, FallocateFlags};

use crate::mapping::{PageMapping, Rng, PAGE};
use crate::writer::{write_random, Writer, WriterRequest};

/// The size of the memory file in pages: more than one read of the page map covers.
const PAGES: u64 = 70_000;
/// The random operations use only this many pages, so that they often use the same page.
const BUSY: u64 = 600;

/// A small migration.
struct MiniMigration {
    memory: Memory,
    tracker: SoftDirtyTracker,
    phase: SyncPhase,
    /// The first byte of each page at the destination.
    destination: Vec<u8>,
    punched: PunchedPages,
    own: PageMapping,
    lock: Arc<Mutex<()>>,
    /// The longest time for which a sync stopped the other processes.
    longest: Duration,
}

impl MiniMigration {
    fn new(file: File, lock: Arc<Mutex<()>>) -> Result<Self> {
        let block = RamBlock::new("ram", PAGES * PAGE)?;
        let layout = Arc::new(Layout::new([block], [])?);
        let own = PageMapping::map(&file, 0, PAGES)?;
        let memory = Memory::new(layout.clone(), vec![file])?;
        let punched = PunchedPages::new(&layout)?;
        let mut tracker =
            SoftDirtyTracker::new(memory.clone(), punched.clone(), Box::new(lock.clone()))?;
        let phase = SyncPhase::new(&layout)?;
        tracker.start()?;
        phase.set_all();
        let mut this = Self {
            memory,
            tracker,
            phase,
            destination: vec![0; usize::try_from(PAGES)?],
            punched,
            own,
            lock,
            longest: Duration::ZERO,
        };
        this.send()?;
        Ok(this)
    }

    fn file(&self) -> Result<&File> {
        self.memory.file(0).context("there is a block")
    }

    /// Sends every dirty page.
    fn send(&mut self) -> Result<()> {
        const AT_ONCE: u64 = 256;
        let bitmap = self.phase.bitmap().clone();
        let page_size = usize::try_from(PAGE)?;
        let mut bytes = Vec::new();
        for run in bitmap.dirty_runs().flat_map(|run| run.chunks(AT_ONCE)) {
            bitmap.take(run);
            bytes.resize(usize::try_from(run.length())?, 0);
            self.memory.read(run, &mut bytes)?;
            for (page, bytes) in run.chunks(1).zip(bytes.chunks(page_size)) {
                self.destination[usize::try_from(page.first)?] = bytes[0];
                if bytes[0] == 0 {
                    self.tracker.record_sent_zeros(page);
                } else {
                    self.tracker.record_sent(page, &[]);
                }
            }
        }
        Ok(())
    }

    /// Syncs, and returns the dirty pages.
    fn sync(&mut self) -> Result<BTreeSet<u64>> {
        let synced = self.tracker.sync(&self.phase, Stage::Live)?;
        self.longest = self.longest.max(synced.stop_time);
        let runs = self.phase.bitmap().dirty_runs();
        Ok(runs.flat_map(|run| run.first..run.end()).collect())
    }

    /// Returns the pages among the first `pages` that differ at the destination.
    fn differing(&self, pages: u64) -> Result<BTreeSet<u64>> {
        let mut differing = BTreeSet::new();
        let all = PageRun {
            block: 0,
            first: 0,
            pages,
        };
        let mut bytes = Vec::new();
        for run in all.chunks(256) {
            bytes.resize(usize::try_from(run.length())?, 0);
            self.memory.read(run, &mut bytes)?;
            let here = bytes.chunks(usize::try_from(PAGE)?).map(|page| page[0]);
            for (page, here) in (run.first..).zip(here) {
                if here != self.destination[usize::try_from(page)?] {
                    differing.insert(page);
                }
            }
        }
        Ok(differing)
    }

    /// Syncs and sends. Fails if a page differs at the destination and the sync did not find it. Returns the dirty
    /// pages.
    fn check_nothing_lost(&mut self) -> Result<BTreeSet<u64>> {
        let dirty = self.sync()?;
        let lost: Vec<u64> = self.differing(BUSY)?.difference(&dirty).copied().collect();
        ensure!(lost.is_empty(), "lost: {lost:?}");
        self.send()?;
        Ok(dirty)
    }

    fn punch(&self, page: u64) -> Result<()> {
        let _guard = self.lock.lock().expect("no thread panics");
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, length) = (i64::try_from(page * PAGE)?, i64::try_from(PAGE)?);
        fallocate(self.file()?, flags, start, length)?;
        self.punched.note(PageRun {
            block: 0,
            first: page,
            pages: 1,
        });
        Ok(())
    }
}

/// Runs all checks and prints the results.
pub fn check() -> Result<()> {
    let file: File =
        nix::sys::memfd::memfd_create("guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?.into();
    file.set_len(PAGES * PAGE)?;
    let mut writers = Vec::new();
    for _ in 0..3 {
        let mut writer = Writer::start(&file, PAGES)?;
        writer.execute(&WriterRequest::Map {
            first: 0,
            pages: PAGES,
        })?;
        writers.push(writer);
    }
    let lock = Arc::new(Mutex::new(()));
    let mut mini = MiniMigration::new(file, lock)?;
    check_auto_choice(&mini)?;
    check_exact_writes(&mut mini, &mut writers)?;
    let believed = check_child_process(&mut mini, &mut writers[0])?;
    let (syncs, all) = check_random_operations(&mut mini, &mut writers)?;
    check_concurrent_writes(&mut mini, &mut writers)?;
    println!(
        "{believed} pages of a child were believed to be all; {all} of {syncs} syncs over mappings and processes \
         that come and go took all for written; processes were stopped for {:?} at most",
        mini.longest
    );
    Ok(())
}

/// Checks that the automatic choice is this tracker.
fn check_auto_choice(mini: &MiniMigration) -> Result<()> {
    let quiesce = Box::new(mini.lock.clone());
    let choice = choose_tracker(
        TrackingMode::Auto,
        true,
        false,
        &mini.memory,
        &mini.punched,
        quiesce,
    )?;
    ensure!(
        choice.tracker.name() == "soft-dirty" && choice.use_hints,
        "{choice:?}"
    );
    println!("{}", choice.why);
    Ok(())
}

/// Writes from other processes and from this one, through mappings that stay. Checks that exactly the written pages are
/// dirty.
fn check_exact_writes(mini: &mut MiniMigration, writers: &mut [Writer]) -> Result<()> {
    let mut random = Rng(1);
    mini.check_nothing_lost()?;
    for interval in 0..20u64 {
        let mut written = BTreeSet::new();
        for _ in 0..interval * 4 {
            let page = random.below(PAGES);
            let value = u8::try_from(1 + random.below(255))?;
            match usize::try_from(random.below(4))? {
                3 => mini.own.write(page, value)?,
                writer => writers[writer].execute(&WriterRequest::Write { page, value })?,
            }
            written.insert(page);
        }
        let dirty = mini.check_nothing_lost()?;
        let why = mini.tracker.all_dirty_reason();
        ensure!(why.is_none(), "all was taken for written: {why:?}");
        ensure!(dirty == written, "written {written:?}, marked {dirty:?}");
    }
    Ok(())
}

/// Writes from a child of a process that maps guest memory. The child has other mappings than its parent.
///
/// The tracker trusts the child's bits only if they show one written page for each page fault of the child. If the
/// child also uses other memory, the tracker seldom trusts its bits. Returns the number of pages in trusted syncs.
fn check_child_process(mini: &mut MiniMigration, parent: &mut Writer) -> Result<u64> {
    let execute = |request| WriterRequest::ToChild(Box::new(request));
    parent.execute(&WriterRequest::StartChild)?;
    parent.execute(&execute(WriterRequest::Map {
        first: 0,
        pages: 32,
    }))?;
    for value in [1, 2] {
        for page in 0..32 {
            parent.execute(&execute(WriterRequest::Write { page, value }))?;
        }
        mini.check_nothing_lost()?;
        // The tracker does not trust a new process with new mappings at once.
        ensure!(value == 2 || mini.tracker.all_dirty_reason().is_some());
    }
    let mut believed = 0;
    for value in 3..40 {
        let written: BTreeSet<u64> = (0..32).step_by(usize::from(value)).collect();
        for &page in &written {
            parent.execute(&execute(WriterRequest::Write { page, value }))?;
        }
        let dirty = mini.check_nothing_lost()?;
        if mini.tracker.all_dirty_reason().is_none() {
            ensure!(dirty == written, "written {written:?}, marked {dirty:?}");
            believed += written.len() as u64;
        }
    }
    // The tracker must not trust a process that maps and unmaps between two syncs.
    parent.execute(&execute(WriterRequest::MapWriteUnmap {
        page: 500,
        value: 9,
    }))?;
    let dirty = mini.check_nothing_lost()?;
    ensure!(dirty.contains(&500) && mini.tracker.all_dirty_reason().is_some());
    parent.execute(&WriterRequest::EndChild)?;
    mini.check_nothing_lost()?;
    ensure!(
        mini.tracker.all_dirty_reason().is_some(),
        "its end was not seen"
    );
    Ok(believed)
}

/// Random operations, including all that soft-dirty bits do not show. Returns the number of syncs, and of those that
/// marked all data dirty.
fn check_random_operations(mini: &mut MiniMigration, writers: &mut [Writer]) -> Result<(u32, u32)> {
    let mut random = Rng(2);
    let file = mini.file()?.try_clone()?;
    // The second mapping of each writer, and whether the writer has a child.
    let mut mapped = [None; 3];
    let mut children = [false; 3];
    let (mut syncs, mut all) = (0, 0);
    for _ in 0..100 {
        let writer = usize::try_from(random.below(3))?;
        let page = random.below(BUSY);
        let value = u8::try_from(1 + random.below(255))?;
        match random.below(14) {
            0..4 => match mapped[writer] {
                None => writers[writer].execute(&WriterRequest::Write { page, value })?,
                Some(first) => {
                    let page = first + page % 8;
                    writers[writer].execute(&WriterRequest::Write { page, value })?;
                }
            },
            4 => mini.own.write(page, value)?,
            5 => mini.punch(page)?,
            // Reading fills a hole.
            6 => drop(mini.own.read(page)?),
            7 => {
                // Sync before and after: the tracker does not see a mapping that a process, if it is no child, creates
                // and removes between two syncs.
                syncs += 1;
                mini.check_nothing_lost()?;
                all += u32::from(mini.tracker.all_dirty_reason().is_some());
                if mapped[writer].take().is_some() {
                    writers[writer].execute(&WriterRequest::Unmap)?;
                } else {
                    let first = page.min(BUSY - 8);
                    writers[writer].execute(&WriterRequest::Map { first, pages: 8 })?;
                    mapped[writer] = Some(first);
                }
                syncs += 1;
                mini.check_nothing_lost()?;
                all += u32::from(mini.tracker.all_dirty_reason().is_some());
            }
            8 => writers[writer].execute(&WriterRequest::ChildMapWriteUnmap { page, value })?,
            9 => {
                let request = if children[writer] {
                    WriterRequest::EndChild
                } else {
                    WriterRequest::StartChild
                };
                children[writer] = !children[writer];
                writers[writer].execute(&request)?;
            }
            10 if children[writer] => {
                let flash = WriterRequest::MapWriteUnmap { page, value };
                writers[writer].execute(&WriterRequest::ToChild(Box::new(flash)))?;
            }
            11 if random.below(10) == 0 => {
                // Replace the writer. The old writer's mappings and its child end with it.
                let mut new = Writer::start(&file, PAGES)?;
                new.execute(&WriterRequest::Map {
                    first: 0,
                    pages: PAGES,
                })?;
                writers[writer] = new;
                mapped[writer] = None;
                children[writer] = false;
            }
            _ => {
                syncs += 1;
                mini.check_nothing_lost()?;
                all += u32::from(mini.tracker.all_dirty_reason().is_some());
            }
        }
    }
    mini.check_nothing_lost()?;
    ensure!(all < syncs, "every sync took all for written");
    Ok((syncs, all))
}

/// Syncs during continuous writes. Checks that the last sync, after the writes have stopped, has found all of them.
fn check_concurrent_writes(mini: &mut MiniMigration, writers: &mut [Writer]) -> Result<()> {
    for (writer, seed) in writers.iter_mut().zip(10..) {
        writer.execute(&WriterRequest::Hammer { seed })?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let own = std::thread::spawn({
        let (stop, lock) = (stop.clone(), mini.lock.clone());
        let mapping = PageMapping::map(mini.file()?, 0, PAGES)?;
        move || -> Result<()> {
            let mut seed = 0;
            while !stop.load(Ordering::Relaxed) {
                // Let others take the lock.
                std::thread::sleep(Duration::from_millis(1));
                let _guard = lock.lock().expect("no thread panics");
                let soon = AtomicBool::new(false);
                // Write in short bursts.
                std::thread::scope(|scope| {
                    seed += 1;
                    let pounding = scope.spawn(|| write_random(&mapping, PAGES, seed, &soon));
                    std::thread::sleep(Duration::from_micros(200));
                    soon.store(true, Ordering::Relaxed);
                    pounding.join().expect("no thread panics")
                })?;
            }
            Ok(())
        }
    });
    for _ in 0..5 {
        mini.sync()?;
        let why = mini.tracker.all_dirty_reason();
        ensure!(why.is_none(), "all was taken for written: {why:?}");
        mini.send()?;
    }
    for writer in writers {
        writer.execute(&WriterRequest::StopHammer)?;
    }
    stop.store(true, Ordering::Relaxed);
    own.join().expect("no thread panics")?;
    mini.sync()?;
    mini.send()?;
    let differing = mini.differing(PAGES)?;
    ensure!(differing.is_empty(), "lost: {differing:?}");
    Ok(())
}
