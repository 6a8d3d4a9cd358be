// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty tracking by comparison: a page is dirty if its content differs from the content at the destination.
//!
//! This tracker needs no kernel support and sees writes of any origin. It reads all of guest memory at each sync. A
//! [`SentTable`] keeps a hash of each page *as sent*, and thereby describes the content at the destination.
//!
//! # Hints
//!
//! A hinted page is not sent. The destination keeps the content that was sent before, or zeros. If the page at the
//! source differs from that, the next sync marks it, and the hint has saved nothing. A hint is useful if the device
//! makes each hinted page zero before the guest may use it again. A page that was not sent before is then zero at both
//! ends until the guest writes it.
//!
//! The alternative, to record a hinted page as sent with its current content, loses pages. If the guest uses the page
//! again and writes the same bytes, the page looks unchanged although the destination never received it. A test
//! demonstrates this.

use super::{DirtyTracker, SentTable, Stage, SyncStats, TrackingError};
use crate::{Memory, PageRun, SyncPhase};

/// A tracker that compares content.
#[derive(Debug)]
pub struct ContentTracker {
    memory: Memory,
    table: SentTable,
}

impl ContentTracker {
    /// Returns a tracker for `memory`.
    ///
    /// # Errors
    ///
    /// As [`SentTable::new`].
    pub fn new(memory: Memory) -> Result<Self, TrackingError> {
        let table = SentTable::new(memory.layout())?;
        Ok(Self { memory, table })
    }

    /// Records hinted pages as sent with their current content. This is unsound, as a test shows.
    #[cfg(test)]
    fn trust_hint(&mut self, run: PageRun) {
        let mut bytes = vec![0; usize::try_from(run.length()).unwrap()];
        self.memory.read(run, &mut bytes).unwrap();
        self.table.record_sent(run, &bytes);
    }
}

impl DirtyTracker for ContentTracker {
    fn name(&self) -> &'static str {
        "content"
    }

    fn hints_need_discard(&self) -> bool {
        true
    }

    fn wants_bytes(&self) -> bool {
        true
    }

    fn start(&mut self) -> Result<(), TrackingError> {
        // The table describes an empty destination, so the first sync also shows all earlier writes.
        Ok(())
    }

    fn sync(&mut self, phase: &SyncPhase, _: Stage) -> Result<SyncStats, TrackingError> {
        let mut synced = SyncStats::default();
        self.table
            .compare(&self.memory, |run| synced.marked += phase.mark(run))?;
        Ok(synced)
    }

    fn record_sent(&mut self, run: PageRun, bytes: &[u8]) {
        self.table.record_sent(run, bytes);
    }

    fn record_sent_zeros(&mut self, run: PageRun) {
        self.table.record_sent_zeros(run);
    }

    fn sent_table(&self) -> Option<&SentTable> {
        Some(&self.table)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::dirty_tracking::test_memory;
    use crate::PAGE_SIZE;

    const PAGE: usize = PAGE_SIZE as usize;

    /// A minimal migration: the memory of the source, the tracker, and the pages of the destination.
    struct Small {
        memory: Memory,
        tracker: ContentTracker,
        phase: Option<SyncPhase>,
        there: Vec<u8>,
    }

    impl Small {
        fn new(pages: u64) -> Self {
            let memory = test_memory(&[pages]);
            let phase = SyncPhase::new(memory.layout()).unwrap();
            phase.set_all();
            let mut tracker = ContentTracker::new(memory.clone()).unwrap();
            tracker.start().unwrap();
            Self {
                tracker,
                phase: Some(phase),
                there: vec![0; pages as usize],
                memory,
            }
        }

        fn write(&self, page: u64, value: u8) {
            let file = self.memory.file(0).unwrap();
            file.write_all_at(&[value; PAGE], page * PAGE_SIZE).unwrap();
        }

        fn discard(&self, run: PageRun) {
            use rustix::fs::{fallocate, FallocateFlags};
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let file = self.memory.file(0).unwrap();
            fallocate(file, flags, run.offset(), run.length()).unwrap();
        }

        /// Applies the hints, and then sends the dirty pages.
        fn iteration(&mut self, hints: &[PageRun]) {
            let window = self.phase.take().unwrap().finish();
            for hint in hints {
                let _ = window.hint(hint.offset(), hint.length()).unwrap();
            }
            self.phase = Some(window.close());
            self.send();
        }

        fn send(&mut self) {
            let bitmap = self.phase.as_ref().unwrap().bitmap().clone();
            for run in bitmap.dirty_runs() {
                for run in run.chunks(1) {
                    bitmap.take(run);
                    let mut bytes = vec![0; PAGE];
                    self.memory.read(run, &mut bytes).unwrap();
                    self.there[run.first as usize] = bytes[0];
                    self.tracker.record_sent(run, &bytes);
                }
            }
        }

        fn sync(&mut self) -> u64 {
            let phase = self.phase.as_ref().unwrap();
            let before = phase.bitmap().dirty_pages();
            let marked = self.tracker.sync(phase, Stage::Live).unwrap().marked;
            assert_eq!(before + marked, phase.bitmap().dirty_pages());
            marked
        }

        fn here(&self) -> Vec<u8> {
            let mut bytes = vec![0; self.there.len() * PAGE];
            let run = pages(0, self.there.len() as u64);
            self.memory.read(run, &mut bytes).unwrap();
            bytes.chunks(PAGE).map(|page| page[0]).collect()
        }
    }

    fn pages(first: u64, pages: u64) -> PageRun {
        PageRun {
            block: 0,
            first,
            pages,
        }
    }

    #[test]
    fn a_trusted_hint_loses_a_page_that_is_filled_with_the_same_bytes_again() {
        let mut small = Small::new(4);
        small.write(1, 7);
        small.iteration(&[pages(1, 1)]);
        // The guest hinted page 1, and then uses it again.
        small.tracker.trust_hint(pages(1, 1));
        small.write(1, 0);
        small.write(1, 7);
        assert_eq!(small.sync(), 0);
        assert_eq!(small.here()[1], 7);
        assert_eq!(small.there[1], 0, "it was not lost");
    }

    #[test]
    fn the_same_page_is_found_if_hints_are_not_trusted_or_discarded() {
        for discards in [false, true] {
            let mut small = Small::new(4);
            small.write(1, 7);
            small.write(2, 8);
            small.iteration(&[pages(1, 2)]);
            if discards {
                small.discard(pages(1, 2));
            }
            small.write(1, 0);
            small.write(1, 7);
            // A discarded page that the guest has not used stays skipped.
            assert_eq!(small.sync(), if discards { 1 } else { 2 });
            small.send();
            assert_eq!(small.here(), small.there);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u8),
        Discard(u64, u64),
        Sync,
        Send,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..24u64, 0..3u8).prop_map(|(page, value)| Step::Write(page, value)),
            1 => (0..20u64, 1..4u64).prop_map(|(first, pages)| Step::Discard(first, pages)),
            1 => Just(Step::Sync),
            1 => Just(Step::Send),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_is_written_when_the_last_sync_and_sending_make_both_sides_equal(
            steps in prop::collection::vec(step(), 0..120),
        ) {
            let mut small = Small::new(24);
            small.send();
            for step in steps {
                match step {
                    Step::Write(page, value) => small.write(page, value),
                    Step::Discard(first, count) => small.discard(pages(first, count)),
                    Step::Sync => { small.sync(); }
                    Step::Send => small.send(),
                }
            }
            small.sync();
            small.send();
            prop_assert_eq!(small.here(), small.there);
        }
    }
}
