// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty tracking with the soft-dirty bits that the kernel keeps for each process.
//!
//! A dirty sync stops all processes that map guest memory, reads the bits of all of them, clears the bits, and lets the
//! processes continue. No process writes between reading and clearing, so no write is lost. The process of
//! the device maps guest memory too; [`Quiesce`] keeps it from writing.
//!
//! # Writes that the bits do not show
//!
//! The bits belong to a mapping and disappear with it. A write that cannot be ruled out counts as made:
//!
//! - **A mapping that was removed or changed.** The pages that it mapped writable at the last sync count as written.
//!   The kernel reports the pages of a new mapping as written.
//! - **A process that started and exited between two syncs.** If its parent maps guest memory and has waited for it,
//!   the number of page faults of the parent's children has grown. All data then counts as written.
//! - **A process whose mappings come and go**, such as a stub of user-mode Linux. This is a child of a process that
//!   maps guest memory, with mappings that differ from those of its parent. Between two syncs it may map a page, write
//!   the page and unmap it. Each such write takes a page fault. The bits are trusted only if the process has the same
//!   mappings as at the last sync, and as many page faults since then as its bits show written pages. Otherwise all
//!   data counts as written. The same holds if such a process is new or has exited. A child that maps nothing but has a
//!   memory file open is such a process too. A guest in user-mode Linux whose processes start, exit or map memory is
//!   therefore fully dirty at each sync. Its migration is correct, but most of its memory is sent while the guest is
//!   paused.
//! - **Pages that the kernel removed from a mapping**, with their bits, because memory was scarce or a huge page was
//!   split. If the system has done so since the last sync, all data counts as written.
//! - **Holes.** Punching a hole is a write of zeros that no bit shows. A page that is a hole counts as written unless
//!   it is known to be zero at the destination. The same holds for a page that was noted in [`PunchedPages`], whatever
//!   was written to it since.
//!
//! # Writes that remain unseen
//!
//! - `write` to the memory file, and any other access that does not use a mapping.
//! - Devices and requests that write to pinned pages: VFIO, RDMA, and direct I/O in flight.
//! - A mapping that is made, written through and removed between two syncs, unless by a process that counts above as
//!   one whose mappings come and go.
//! - A child that starts and exits between two syncs and that its parent does not wait for.
//! - Processes that we may not examine.
//! - `MADV_DONTNEED` on a mapping, and holes that other processes punch and fill by reading between two syncs.
//!
//! With the guest paused, [`verify`](super::SentTable) finds pages that were missed. Memory on hugetlbfs has no
//! soft-dirty bits; the tracker refuses it.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::fs::fstatfs;

use super::pagemap::{self, PageMap};
use super::process_snapshot::{process_error, take_snapshot, ProcessSnapshot};
use super::reclaim::Reclaim;
use super::{DirtyTracker, PunchedPages, Quiesce, Stage, SyncStats, TrackingError};
use crate::atomic_bitmap::AtomicBitmap;
use crate::guard::ResumeGuard;
use crate::page_bitmaps::{page_bitmaps, set_runs};
use crate::processes::{
    has_soft_dirty_mappings, Mapping, Process, RamFiles, StopError, StoppedProcesses,
};
use crate::{Memory, PageRun, SyncPhase};

/// Timeout for stopping all processes.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

const HUGETLBFS: i64 = 0x9584_58f6;
const TMPFS: i64 = 0x0102_1994;

/// A tracker that uses soft-dirty bits.
pub struct SoftDirtyTracker {
    quiesce: Box<dyn Quiesce>,
    /// Lets stopped processes continue if this process is killed.
    guard: ResumeGuard,
    inner: Inner,
}

struct Inner {
    memory: Memory,
    files: RamFiles,
    punched: PunchedPages,
    /// Set for each page that may differ from zero at the destination.
    sent_nonzero: Vec<AtomicBitmap>,
    /// The processes as of the last sync.
    previous: BTreeMap<Process, ProcessSnapshot>,
    reclaim: Reclaim,
    all_dirty_reason: Option<String>,
}

impl SoftDirtyTracker {
    /// Returns a tracker for `memory`. `quiesce` keeps the device's process from writing to the memory. Code that punches
    /// holes in the memory notes them in `punched`.
    ///
    /// # Errors
    ///
    /// If the kernel or the memory files do not have soft-dirty bits, if no other process maps guest memory, or if we
    /// may not clear the bits of such a process.
    pub fn new(
        memory: Memory,
        punched: PunchedPages,
        quiesce: Box<dyn Quiesce>,
    ) -> Result<Self, TrackingError> {
        let unavailable = |text: String| TrackingError::Unavailable(text);
        pagemap::check_support().map_err(unavailable)?;
        let failed = |error| {
            TrackingError::Unavailable(format!("guest memory files cannot be examined: {error}"))
        };
        let files = RamFiles::from_memory(&memory, quiesce.process()).map_err(failed)?;
        let mut tmpfs = true;
        for (block, file) in memory.blocks() {
            let kind = fstatfs(file).map_err(|error| failed(error.into()))?.f_type;
            if kind == HUGETLBFS {
                let name = block.name();
                return Err(unavailable(format!(
                    "RAM block '{name}' is on hugetlbfs, which has no soft-dirty bits"
                )));
            }
            tmpfs &= kind == TMPFS;
        }
        let mapping_processes = files.mapping_processes().map_err(failed)?;
        if mapping_processes.is_empty() {
            let text = "no other process maps guest memory, or this process may not read its /proc/PID/maps: run as the user of the VMM, or with CAP_SYS_PTRACE";
            return Err(unavailable(text.into()));
        }
        for mapping_process in mapping_processes {
            let pid = mapping_process.process.pid;
            pagemap::can_clear(pid)
                .map_err(|source| process_error(pid, "/proc/PID/clear_refs", source))?;
        }
        let sent_nonzero = page_bitmaps(memory.layout(), TrackingError::no_bitmap)?;
        let reclaim = Reclaim { tmpfs, count: 0 };
        Ok(Self {
            quiesce,
            guard: ResumeGuard::start(),
            inner: Inner {
                memory,
                files,
                punched,
                sent_nonzero,
                previous: BTreeMap::new(),
                reclaim,
                all_dirty_reason: None,
            },
        })
    }

    /// Checks that this kernel has soft-dirty bits. Clears the bits of our own process.
    ///
    /// # Errors
    ///
    /// A sentence that states why the bits are unusable.
    pub fn check_support() -> Result<(), String> {
        pagemap::check_support()
    }

    /// Returns why the last sync counted all data as written, if it did.
    pub fn all_dirty_reason(&self) -> Option<&str> {
        self.inner.all_dirty_reason.as_deref()
    }

    /// Marks the written pages in `phase`, if there is one, and clears the bits. Returns the number of pages that were
    /// clean before.
    fn collect_while_stopped(
        &mut self,
        phase: Option<&SyncPhase>,
    ) -> Result<SyncStats, TrackingError> {
        let Self {
            quiesce,
            guard,
            inner,
        } = self;
        let mut result = Err(TrackingError::Unavailable(
            "writes of the device to guest memory could not be stopped".into(),
        ));
        quiesce.with_quiesced(&mut || {
            result = StoppedProcesses::stop(&inner.files, STOP_TIMEOUT, guard)
                .map_err(stop_error)
                .and_then(|stopped| {
                    let marked = inner.read_and_clear(phase, &stopped)?;
                    let stop_time = stopped.resume().map_err(stop_error)?;
                    Ok(SyncStats { marked, stop_time })
                });
        });
        result
    }
}

impl DirtyTracker for SoftDirtyTracker {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn hints_need_discard(&self) -> bool {
        false
    }

    fn wants_bytes(&self) -> bool {
        false
    }

    fn start(&mut self) -> Result<(), TrackingError> {
        self.collect_while_stopped(None).map(drop)
    }

    fn sync(&mut self, phase: &SyncPhase, _: Stage) -> Result<SyncStats, TrackingError> {
        self.collect_while_stopped(Some(phase))
    }

    fn record_sent(&mut self, run: PageRun, _: &[u8]) {
        if let Some(bits) = self.inner.sent_nonzero.get(run.block) {
            bits.set(run.first..run.end());
        }
    }

    fn record_sent_zeros(&mut self, run: PageRun) {
        if let Some(bits) = self.inner.sent_nonzero.get(run.block) {
            bits.clear(run.first..run.end());
        }
    }
}

impl std::fmt::Debug for SoftDirtyTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SoftDirty")
            .field("processes", &self.inner.previous.keys())
            .field("all_dirty_reason", &self.inner.all_dirty_reason)
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn read_and_clear(
        &mut self,
        phase: Option<&SyncPhase>,
        stopped: &StoppedProcesses,
    ) -> Result<u64, TrackingError> {
        let now = take_snapshot(&self.files, stopped)?;
        let mut marked = 0;
        if let Some(phase) = phase {
            let mut all = None;
            marked += self.mark_unmapped(phase, &now, &mut all);
            for (process, snapshot) in &now {
                marked += self.mark_written(phase, *process, snapshot, &mut all)?;
            }
            if self.reclaim.has_changed()? {
                all.get_or_insert_with(|| "kernel has reclaimed mapped pages".to_owned());
            }
            if all.is_some() {
                marked += self.mark_data(phase)?;
            }
            self.all_dirty_reason = all;
            marked += self.mark_holes(phase)?;
        } else {
            self.reclaim.has_changed()?;
            self.punched.drain();
        }
        // A process that maps nothing was not stopped, and may map and write memory now. Its bits stay for the next
        // sync.
        for (process, _) in now
            .iter()
            .filter(|(_, snapshot)| !snapshot.mappings.is_empty())
        {
            let pid = process.pid;
            pagemap::clear(pid)
                .map_err(|source| process_error(pid, "/proc/PID/clear_refs", source))?;
        }
        self.previous = now;
        Ok(marked)
    }

    /// Marks the pages of mappings that were writable at the last sync and have changed or disappeared. Sets `all` to
    /// the reason if any data may have been written.
    fn mark_unmapped(
        &self,
        phase: &SyncPhase,
        now: &BTreeMap<Process, ProcessSnapshot>,
        all: &mut Option<String>,
    ) -> u64 {
        let mut marked = 0;
        for (process, previous) in &self.previous {
            let pid = process.pid;
            let still = now.get(process);
            if previous.has_transient_mappings && still.is_none() {
                all.get_or_insert_with(|| format!("process {pid} has exited"));
            }
            if still.is_some_and(|it| it.child_faults != previous.child_faults) {
                all.get_or_insert_with(|| format!("a child of process {pid} has exited"));
            }
            let mapped: &[Mapping] = still.map_or(&[], |it| &it.mappings);
            for mapping in &previous.mappings {
                if mapping.writable && !mapped.contains(mapping) {
                    marked += phase.mark(PageRun {
                        block: mapping.block,
                        first: mapping.first,
                        pages: mapping.pages(),
                    });
                }
            }
        }
        for (process, snapshot) in now {
            if snapshot.has_transient_mappings && !self.previous.contains_key(process) {
                all.get_or_insert_with(|| format!("process {} has started", process.pid));
            }
        }
        marked
    }

    /// Marks the pages that the bits of a process show as written. Sets `all` to the reason if the process may have
    /// written other data.
    fn mark_written(
        &self,
        phase: &SyncPhase,
        process: Process,
        snapshot: &ProcessSnapshot,
        all: &mut Option<String>,
    ) -> Result<u64, TrackingError> {
        let pid = process.pid;
        let failed = |what| move |source| process_error(pid, what, source);
        let map = PageMap::open(pid).map_err(failed("/proc/PID/pagemap"))?;
        let (mut marked, mut dirty) = (0, 0);
        for mapping in &snapshot.mappings {
            match &map {
                Some(map) => {
                    dirty += map
                        .dirty(mapping, |run| marked += phase.mark(run))
                        .map_err(failed("/proc/PID/pagemap"))?;
                }
                None => {
                    all.get_or_insert_with(|| format!("process {pid} has exited"));
                }
            }
        }
        let Some(previous) = self
            .previous
            .get(&process)
            .filter(|_| snapshot.has_transient_mappings)
        else {
            return Ok(marked);
        };
        let faults = snapshot.faults.wrapping_sub(previous.faults);
        let doubtful = previous.mappings != snapshot.mappings
            || faults != dirty
            || (dirty > 0 && has_soft_dirty_mappings(pid).map_err(failed("/proc/PID/smaps"))?);
        if doubtful {
            all.get_or_insert_with(|| {
                format!("process {pid} has {faults} page faults and {dirty} soft-dirty pages")
            });
        }
        Ok(marked)
    }

    /// Marks all pages that are not holes.
    fn mark_data(&self, phase: &SyncPhase) -> Result<u64, TrackingError> {
        let mut marked = 0;
        for block in 0..self.sent_nonzero.len() {
            let mut page = 0;
            while let Some(run) = self.next_data(block, page)? {
                marked += phase.mark(run);
                page = run.end();
            }
        }
        Ok(marked)
    }

    /// Marks the pages that are or were holes, and that may differ from zero at the destination.
    fn mark_holes(&self, phase: &SyncPhase) -> Result<u64, TrackingError> {
        let mut marked = 0;
        for run in self.punched.drain() {
            marked += self.mark_sent_nonzero(phase, run);
        }
        for (block, bits) in self.sent_nonzero.iter().enumerate() {
            let mut hole = 0;
            while hole < bits.len() {
                let data = self.next_data(block, hole)?;
                let end = data.map_or(bits.len(), |run| run.first);
                marked += self.mark_sent_nonzero(
                    phase,
                    PageRun {
                        block,
                        first: hole,
                        pages: end.saturating_sub(hole),
                    },
                );
                hole = data.map_or(bits.len(), |run| run.end());
            }
        }
        Ok(marked)
    }

    /// Marks those pages of `run` that may differ from zero at the destination.
    fn mark_sent_nonzero(&self, phase: &SyncPhase, run: PageRun) -> u64 {
        let Some(bits) = self.sent_nonzero.get(run.block) else {
            return 0;
        };
        set_runs(run.block, bits, run.first)
            .take_while(|it| it.first < run.end())
            .map(|it| {
                let pages = it.end().min(run.end()) - it.first;
                phase.mark(PageRun { pages, ..it })
            })
            .sum()
    }

    fn next_data(&self, block: usize, page: u64) -> Result<Option<PageRun>, TrackingError> {
        let run = self.memory.next_data(block, page);
        run.map_err(|source| TrackingError::Read {
            block,
            offset: page.saturating_mul(crate::PAGE_SIZE),
            source,
        })
    }
}

fn stop_error(error: StopError) -> TrackingError {
    TrackingError::Unavailable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty_tracking::{test_memory, NoWriters};

    #[test]
    fn a_kernel_without_the_bits_is_refused_in_plain_words() {
        let memory = test_memory(&[4]);
        let punched = PunchedPages::new(memory.layout()).unwrap();
        let made = SoftDirtyTracker::new(memory, punched, Box::new(NoWriters));
        let said = made.unwrap_err().to_string();
        match SoftDirtyTracker::check_support() {
            // No other process maps the memory.
            Ok(()) => assert!(said.contains("no other process"), "{said}"),
            Err(why) => {
                assert_eq!(said, why);
                assert!(why.contains("soft-dirty"), "{why}");
            }
        }
    }
}
