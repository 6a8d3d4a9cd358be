// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process of a workload.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{stdin, stdout, Write};
use std::os::unix::fs::FileExt;

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{Fill, Verified};
use guest_agent::pattern::{self, PAGE};
use guest_agent::protocol::CallResult;
use guest_agent::ranges::{PhysicalRange, RangeSet};
use memmap2::{Advice, MmapMut};
use serde_json::Value;

use crate::file_churn::FileChurn;
use crate::fork_churn::ForkChurn;
use crate::job::JobThread;
use crate::memory_churn::MemoryChurn;
use crate::sys;
use crate::workloads::WorkerRequest;

/// Answers requests until the end of standard input.
pub fn run() -> Result<()> {
    // If memory runs out, the OOM killer should end this process, not the agent.
    fs::write("/proc/self/oom_score_adj", "1000")
        .context("cannot offer myself to the OOM killer")?;
    let mut state = State::default();
    for line in stdin().lines() {
        let request: WorkerRequest =
            serde_json::from_str(&line.context("cannot read an order")?).context("not an order")?;
        let result = match handle(&mut state, request) {
            Ok(value) => CallResult::Done(value),
            Err(error) => CallResult::Failed(format!("{error:#}")),
        };
        let mut line = serde_json::to_string(&result).context("cannot encode an answer")?;
        line.push('\n');
        stdout()
            .write_all(line.as_bytes())
            .context("cannot answer")?;
    }
    Ok(())
}

#[derive(Default)]
struct State {
    memory: Option<FilledMemory>,
    churn: Option<JobThread>,
}

fn handle(state: &mut State, request: WorkerRequest) -> Result<Value> {
    let memory = &mut state.memory;
    let answer = match request {
        WorkerRequest::Fill(fill) => {
            let new = FilledMemory::fill(&fill)?;
            let counts = (new.filled, new.kept_pages());
            *memory = Some(new);
            serde_json::to_value(counts)
        }
        WorkerRequest::Release => {
            filled_memory(memory)?.releasable = None;
            serde_json::to_value(())
        }
        WorkerRequest::ReleaseLowest(pages) => {
            serde_json::to_value(filled_memory(memory)?.release_lowest(usize::try_from(pages)?)?)
        }
        WorkerRequest::Verify => serde_json::to_value(filled_memory(memory)?.verify()),
        WorkerRequest::KeptPages => serde_json::to_value(filled_memory(memory)?.physical_ranges()?),
        WorkerRequest::ChurnMemory(churn) => {
            state.churn = Some(JobThread::start(MemoryChurn::new(&churn)?, churn.rest));
            serde_json::to_value(())
        }
        WorkerRequest::ChurnFiles(churn) => {
            state.churn = Some(JobThread::start(FileChurn::new(&churn)?, churn.rest));
            serde_json::to_value(())
        }
        WorkerRequest::ChurnForks(churn) => {
            state.churn = Some(JobThread::start(ForkChurn::new(&churn)?, churn.rest));
            serde_json::to_value(())
        }
        WorkerRequest::ChurnProgress => {
            let running = state.churn.as_ref().context("nothing churns")?;
            serde_json::to_value(running.progress()?)
        }
        WorkerRequest::StopChurn => {
            let running = state.churn.take().context("nothing churns")?;
            serde_json::to_value(running.end()?)
        }
    };
    answer.context("cannot encode an answer")
}

fn filled_memory(memory: &mut Option<FilledMemory>) -> Result<&mut FilledMemory> {
    memory.as_mut().context("nothing was filled yet")
}

/// Filled memory in two mappings, which are filled alternately, so that kept pages are among others in physical memory.
struct FilledMemory {
    kept: Option<MmapMut>,
    releasable: Option<MmapMut>,
    filled: u64,
    seed: u64,
}

impl FilledMemory {
    fn fill(fill: &Fill) -> Result<Self> {
        let pages = usize::try_from(fill.bytes)? / PAGE;
        let every = usize::try_from(fill.keep_every)?;
        let kept_pages = pages.checked_div(every).unwrap_or(0);
        let mut kept = map(kept_pages, every > 1)?;
        let mut releasable = map(pages - kept_pages, every > 1)?;
        let mut kept_chunks = kept
            .iter_mut()
            .flat_map(|map| map.chunks_exact_mut(PAGE))
            .zip(0..);
        let mut rest_chunks = releasable
            .iter_mut()
            .flat_map(|map| map.chunks_exact_mut(PAGE));
        for page in 0..pages {
            let turn = every > 0 && page % every == every - 1;
            if turn {
                if let Some((bytes, number)) = kept_chunks.next() {
                    pattern::write(bytes, fill.seed, number);
                }
            } else if let Some(bytes) = rest_chunks.next() {
                pattern::write(bytes, !fill.seed, u64::try_from(page)?);
            }
        }
        Ok(Self {
            kept,
            releasable,
            filled: u64::try_from(pages)?,
            seed: fill.seed,
        })
    }

    fn pages(&self) -> impl Iterator<Item = &[u8]> {
        self.kept.iter().flat_map(|map| map.chunks_exact(PAGE))
    }

    fn kept_pages(&self) -> u64 {
        self.pages()
            .zip(0..)
            .last()
            .map_or(0, |(_, number): (_, u64)| number + 1)
    }

    fn verify(&self) -> Verified {
        let mut found = Verified {
            pages: 0,
            wrong: 0,
            first_wrong: None,
        };
        for (bytes, number) in self.pages().zip(0..) {
            found.pages += 1;
            if !pattern::holds(bytes, self.seed, number) {
                found.wrong += 1;
                found.first_wrong.get_or_insert(number);
            }
        }
        found
    }

    fn physical_ranges(&self) -> Result<RangeSet> {
        let map = PageMap::open()?;
        let range_of = |bytes: &[u8]| {
            Ok(PhysicalRange {
                start: map.pfn_of(bytes)? * PAGE as u64,
                length: PAGE as u64,
            })
        };
        self.pages().map(range_of).collect()
    }

    fn release_lowest(&mut self, pages: usize) -> Result<()> {
        let map = PageMap::open()?;
        let releasable = self.releasable.as_mut().context("all is kept")?;
        let mut places: Vec<(u64, &mut [u8])> = releasable
            .chunks_exact_mut(PAGE)
            .map(|bytes| Ok((map.pfn_of(bytes)?, bytes)))
            .collect::<Result<_>>()?;
        ensure!(
            pages <= places.len(),
            "there are only {} pages",
            places.len()
        );
        places.sort_unstable_by_key(|(frame, _)| *frame);
        for (_, bytes) in places.into_iter().take(pages) {
            sys::madvise_dontneed(bytes)?;
        }
        Ok(())
    }
}

/// The physical addresses of this process's pages (`/proc/self/pagemap`).
struct PageMap(File);

impl PageMap {
    fn open() -> Result<Self> {
        let file = File::open("/proc/self/pagemap").context("cannot open my page map")?;
        Ok(Self(file))
    }

    /// Returns the page frame number of the page at the start of `bytes`.
    fn pfn_of(&self, bytes: &[u8]) -> Result<u64> {
        const PRESENT: u64 = 1 << 63;
        const PFN_MASK: u64 = (1 << 55) - 1;
        /// The limit of retries. The kernel may migrate the page at any time, also repeatedly.
        const MAX_READS: u32 = 1000;
        let place = u64::try_from(bytes.as_ptr().addr() / PAGE * size_of::<u64>())?;
        let mut entry = 0;
        for _ in 0..MAX_READS {
            // The access waits until a page migration has ended.
            black_box(bytes.first().copied());
            let mut word = [0; size_of::<u64>()];
            self.0
                .read_exact_at(&mut word, place)
                .context("cannot read my page map")?;
            entry = u64::from_le_bytes(word);
            if entry & PRESENT != 0 && entry & PFN_MASK != 0 {
                return Ok(entry & PFN_MASK);
            }
        }
        bail!("a page has no frame: entry {entry:#x}")
    }
}

fn map(pages: usize, small: bool) -> Result<Option<MmapMut>> {
    if pages == 0 {
        return Ok(None);
    }
    let map = MmapMut::map_anon(pages * PAGE).context("cannot map memory")?;
    if small {
        // Single pages are kept, not huge pages. A kernel without huge pages refuses the advice and does not need it.
        let _ = map.advise(Advice::NoHugePage);
    }
    Ok(Some(map))
}
