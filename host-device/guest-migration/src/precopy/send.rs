// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sends dirty pages.

use crate::atomic_bitmap::AtomicBitmap;
use crate::digest::is_zero;
use crate::dirty_tracking::{DirtyTracker, SentTable};
use crate::page_bitmaps::page_bitmaps;
use crate::{
    CancelToken, DirtyBitmap, LayoutError, Memory, PageRun, RamBlock, SyncPhase, PAGE_SIZE,
};

use super::rate_limiter::RateLimiter;
use super::sink::Sink;
use super::PrecopyError;

/// Maximum number of pages that are read and sent at once.
const CHUNK_PAGES: u64 = 256;

/// Numbers of pages sent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct SentCounts {
    /// Pages sent with their content.
    pub(super) normal: u64,
    /// Pages sent as zeros.
    pub(super) duplicate: u64,
    /// Pages of both kinds that were sent before.
    pub(super) resent: u64,
}

/// Takes dirty pages from the bitmap and sends them.
pub(super) struct PageSender {
    memory: Memory,
    sink: Box<dyn Sink>,
    sent: Option<SentTable>,
    /// Set for each page that was sent at least once, by RAM block.
    sent_before: Vec<AtomicBitmap>,
    zero_page_detection: bool,
    buffer: Vec<u8>,
    counts: SentCounts,
}

impl PageSender {
    pub(super) fn new(
        memory: Memory,
        sink: Box<dyn Sink>,
        sent: Option<SentTable>,
        zero_page_detection: bool,
    ) -> Result<Self, LayoutError> {
        Ok(Self {
            sent_before: page_bitmaps(memory.layout(), too_large)?,
            memory,
            sink,
            sent,
            zero_page_detection,
            buffer: Vec::new(),
            counts: SentCounts::default(),
        })
    }

    pub(super) fn sink(&mut self) -> &mut dyn Sink {
        &mut *self.sink
    }

    pub(super) fn bytes(&self) -> u64 {
        self.sink.bytes()
    }

    /// Returns the numbers of pages sent so far.
    pub(super) fn counts(&self) -> SentCounts {
        self.counts
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Returns the content that was sent, if it is recorded here and not by the tracker.
    pub(super) fn sent_table(&self) -> Option<&SentTable> {
        self.sent.as_ref()
    }

    /// Marks each page that was sent and whose content has changed since. Returns the number of these pages.
    pub(super) fn mark_changed(&mut self, phase: &SyncPhase) -> Result<u64, PrecopyError> {
        let mut marked = 0;
        if let Some(table) = &mut self.sent {
            let mut changed = Vec::new();
            table.compare(&self.memory, |run| {
                // A page that hints have spared may differ.
                changed.extend(phase.bitmap().taken_among(run));
            })?;
            marked = changed.into_iter().map(|run| phase.mark(run)).sum();
        }
        Ok(marked)
    }

    /// Sends every dirty page once, and calls `on_progress` after each chunk.
    ///
    /// Skips a page that becomes clean before its turn: a hint has cleared its dirty bit.
    pub(super) fn send(
        &mut self,
        bitmap: &DirtyBitmap,
        tracker: &mut dyn DirtyTracker,
        rate_limiter: &mut RateLimiter,
        cancel: &CancelToken,
        mut on_progress: impl FnMut(&Self),
    ) -> Result<(), PrecopyError> {
        let (mut block, mut page) = (0, 0);
        // A run of data in the file, looked up once for each run. A page that is written after the lookup is written
        // after the last dirty sync, so the next sync shows it.
        let mut data: Option<PageRun> = None;
        while let Some(run) = bitmap.next_dirty(block, page, u64::MAX) {
            if cancel.is_cancelled() {
                return Err(PrecopyError::Cancelled);
            }
            if data.is_none_or(|it| it.block != run.block || it.end() <= run.first) {
                let found = self.memory.next_data(run.block, run.first);
                let pages = bitmap.layout().blocks().get(run.block);
                data = Some(
                    found
                        .map_err(|source| read_error(run, source))?
                        // Only holes follow up to the end of the RAM block.
                        .unwrap_or(PageRun {
                            block: run.block,
                            first: pages.map_or(u64::MAX, |it| it.pages()),
                            pages: 1,
                        }),
                );
            }
            let start = data.map_or(0, |it| it.first);
            let before = self.bytes();
            let run = if run.first < start {
                let hole = PageRun {
                    pages: run.pages.min(start - run.first),
                    ..run
                };
                if bitmap.take(hole) > 0 {
                    self.zeros(hole, tracker)?;
                }
                hole
            } else {
                let end = data.map_or(u64::MAX, |it| it.end());
                let chunk = PageRun {
                    pages: run.pages.min(CHUNK_PAGES).min(end - run.first),
                    ..run
                };
                if bitmap.take(chunk) > 0 {
                    self.send_data(chunk, tracker)?;
                }
                chunk
            };
            (block, page) = (run.block, run.end());
            on_progress(self);
            let wait = rate_limiter.delay_after(self.bytes().saturating_sub(before));
            if !wait.is_zero() && cancel.sleep(wait) {
                return Err(PrecopyError::Cancelled);
            }
        }
        Ok(())
    }

    fn send_data(
        &mut self,
        run: PageRun,
        tracker: &mut dyn DirtyTracker,
    ) -> Result<(), PrecopyError> {
        let copies = tracker.wants_bytes() || self.sent.is_some() || self.zero_page_detection;
        if !copies {
            self.sink
                .pages_from(run, &self.memory)
                .map_err(PrecopyError::Sink)?;
            tracker.record_sent(run, &[]);
            self.count(run, false);
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.send_copied(run, &mut buffer, tracker);
        self.buffer = buffer;
        result
    }

    /// Sends pages through the buffer. The destination receives exactly the bytes that the tracker records.
    fn send_copied(
        &mut self,
        run: PageRun,
        buffer: &mut Vec<u8>,
        tracker: &mut dyn DirtyTracker,
    ) -> Result<(), PrecopyError> {
        // A run has at most 1 MiB here.
        let length = usize::try_from(run.length()).unwrap_or(usize::MAX);
        buffer.resize(length, 0);
        self.memory
            .read(run, buffer)
            .map_err(|source| read_error(run, source))?;
        let page_size = usize::try_from(PAGE_SIZE).unwrap_or(usize::MAX);
        let mut rest: &[u8] = buffer;
        let mut at = run.first;
        while at < run.end() {
            let mut pages = rest.chunks(page_size).map(is_zero);
            let zero = pages.next().unwrap_or(true);
            let more = pages.take_while(|it| *it == zero).count();
            let some = PageRun {
                block: run.block,
                first: at,
                pages: 1 + more as u64,
            };
            let (bytes, others) = rest
                .split_at_checked((1 + more).saturating_mul(page_size))
                .unwrap_or((rest, &[]));
            if zero {
                self.zeros(some, tracker)?;
            } else {
                self.sink.pages(some, bytes).map_err(PrecopyError::Sink)?;
                tracker.record_sent(some, bytes);
                if let Some(table) = &mut self.sent {
                    table.record_sent(some, bytes);
                }
                self.count(some, false);
            }
            rest = others;
            at = some.end();
        }
        Ok(())
    }

    fn zeros(&mut self, run: PageRun, tracker: &mut dyn DirtyTracker) -> Result<(), PrecopyError> {
        self.sink.zeros(run).map_err(PrecopyError::Sink)?;
        tracker.record_sent_zeros(run);
        if let Some(table) = &mut self.sent {
            table.record_sent_zeros(run);
        }
        self.count(run, true);
        Ok(())
    }

    fn count(&mut self, run: PageRun, zeros: bool) {
        let new = self
            .sent_before
            .get(run.block)
            .map_or(0, |bits| bits.set(run.first..run.end()));
        let counts = &mut self.counts;
        counts.resent += run.pages.saturating_sub(new);
        if zeros {
            counts.duplicate += run.pages;
        } else {
            counts.normal += run.pages;
        }
    }
}

/// Returns the error for a bitmap of the pages of `block` that does not fit in memory.
fn too_large(block: &RamBlock) -> LayoutError {
    LayoutError::TooLarge {
        name: block.name().to_owned(),
        length: block.length(),
    }
}

fn read_error(run: PageRun, source: std::io::Error) -> PrecopyError {
    PrecopyError::Read {
        block: run.block,
        offset: run.offset(),
        source,
    }
}
