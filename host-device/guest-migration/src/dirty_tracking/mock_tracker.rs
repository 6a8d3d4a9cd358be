// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A dirty tracker for tests, which reports the writes that the test names.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{DirtyTracker, Stage, SyncStats, TrackingError};
use crate::{PageRun, SyncPhase};

/// A tracker that marks the pages that the test names through [`MockWrites`].
#[derive(Debug)]
pub struct MockTracker {
    writes: MockWrites,
    is_started: bool,
}

/// Reports writes to a [`MockTracker`]. Clones report to the same tracker, from any thread.
#[derive(Clone, Debug, Default)]
pub struct MockWrites(Arc<Mutex<Pending>>);

#[derive(Debug, Default)]
struct Pending {
    runs: Vec<PageRun>,
    fault: Option<String>,
    sent: Vec<PageRun>,
    syncs: u64,
}

/// Returns a tracker, and the handle that reports writes to it.
pub fn mock_tracker() -> (MockTracker, MockWrites) {
    let writes = MockWrites::default();
    let tracker = MockTracker {
        writes: writes.clone(),
        is_started: false,
    };
    (tracker, writes)
}

impl MockWrites {
    /// Reports that the pages `run` were written. Call it after the write.
    pub fn record_write(&self, run: PageRun) {
        self.pending().runs.push(run);
    }

    /// Makes the next sync fail with the message `words`.
    pub fn fail(&self, words: &str) {
        self.pending().fault = Some(words.to_owned());
    }

    /// Returns the pages that were recorded as sent, as zeros or with content, in the order of the calls.
    pub fn sent(&self) -> Vec<PageRun> {
        self.pending().sent.clone()
    }

    /// Returns the number of successful syncs.
    pub fn syncs(&self) -> u64 {
        self.pending().syncs
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyTracker for MockTracker {
    fn name(&self) -> &'static str {
        "driven"
    }

    fn hints_need_discard(&self) -> bool {
        false
    }

    fn wants_bytes(&self) -> bool {
        false
    }

    fn start(&mut self) -> Result<(), TrackingError> {
        self.writes.pending().runs.clear();
        self.is_started = true;
        Ok(())
    }

    fn sync(&mut self, phase: &SyncPhase, _: Stage) -> Result<SyncStats, TrackingError> {
        if !self.is_started {
            let text = "dirty sync before tracking has started".to_owned();
            return Err(TrackingError::Unavailable(text));
        }
        let mut pending = self.writes.pending();
        if let Some(words) = pending.fault.take() {
            return Err(TrackingError::Unavailable(words));
        }
        pending.syncs += 1;
        let runs = std::mem::take(&mut pending.runs);
        Ok(SyncStats {
            marked: runs.into_iter().map(|run| phase.mark(run)).sum(),
            ..SyncStats::default()
        })
    }

    fn record_sent(&mut self, run: PageRun, _: &[u8]) {
        self.writes.pending().sent.push(run);
    }

    fn record_sent_zeros(&mut self, run: PageRun) {
        self.writes.pending().sent.push(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layout, RamBlock};

    #[test]
    fn it_marks_what_it_was_told_once() {
        let layout = Layout::new([RamBlock::new("ram", 0x10_0000).unwrap()], []).unwrap();
        let phase = SyncPhase::new(&layout.into()).unwrap();
        let (mut tracker, writes) = mock_tracker();
        let run = |first, pages| PageRun {
            block: 0,
            first,
            pages,
        };
        writes.record_write(run(9, 1));
        assert!(tracker.sync(&phase, Stage::Live).is_err());
        tracker.start().unwrap();
        writes.record_write(run(1, 4));
        writes.record_write(run(3, 4));
        writes.fail("no");
        let refused = tracker.sync(&phase, Stage::Live).unwrap_err();
        assert_eq!(refused.to_string(), "no");
        assert_eq!(tracker.sync(&phase, Stage::Live).unwrap().marked, 6);
        assert_eq!(tracker.sync(&phase, Stage::Live).unwrap().marked, 0);
        assert_eq!(writes.syncs(), 2);
        assert_eq!(phase.bitmap().dirty_runs().collect::<Vec<_>>(), [run(1, 6)]);
    }
}
