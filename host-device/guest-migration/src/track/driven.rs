// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes that a test says were made.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{DirtyTracker, Stage, Synced, TrackError};
use crate::{Run, SyncPhase};

/// A tracker that believes what it is told through [`Writes`]. For tests of what is built on trackers.
#[derive(Debug)]
pub struct Driven {
    writes: Writes,
    begun: bool,
}

/// Tells a [`Driven`] tracker what was written. Copies tell the same tracker, also from other threads.
#[derive(Clone, Debug, Default)]
pub struct Writes(Arc<Mutex<Pending>>);

#[derive(Debug, Default)]
struct Pending {
    runs: Vec<Run>,
    fault: Option<String>,
    sent: Vec<Run>,
    syncs: u64,
}

/// A tracker, and who tells it.
pub fn driven() -> (Driven, Writes) {
    let writes = Writes::default();
    let tracker = Driven {
        writes: writes.clone(),
        begun: false,
    };
    (tracker, writes)
}

impl Writes {
    /// The pages `run` have been written, now: call it after the write.
    pub fn wrote(&self, run: Run) {
        self.pending().runs.push(run);
    }

    /// The next sync fails, with these words.
    pub fn fail(&self, words: &str) {
        self.pending().fault = Some(words.to_owned());
    }

    /// The pages that the tracker was told were sent, as zeros or otherwise, in that order.
    pub fn sent(&self) -> Vec<Run> {
        self.pending().sent.clone()
    }

    /// How many syncs there were.
    pub fn syncs(&self) -> u64 {
        self.pending().syncs
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyTracker for Driven {
    fn name(&self) -> &'static str {
        "driven"
    }

    fn hints_need_discard(&self) -> bool {
        false
    }

    fn wants_bytes(&self) -> bool {
        false
    }

    fn begin(&mut self) -> Result<(), TrackError> {
        self.writes.pending().runs.clear();
        self.begun = true;
        Ok(())
    }

    fn sync(&mut self, phase: &SyncPhase, _: Stage) -> Result<Synced, TrackError> {
        if !self.begun {
            let text = "a sync before tracking was begun".to_owned();
            return Err(TrackError::Unavailable(text));
        }
        let mut pending = self.writes.pending();
        if let Some(words) = pending.fault.take() {
            return Err(TrackError::Unavailable(words));
        }
        pending.syncs += 1;
        let runs = std::mem::take(&mut pending.runs);
        Ok(Synced {
            marked: runs.into_iter().map(|run| phase.mark(run)).sum(),
            ..Synced::default()
        })
    }

    fn sent(&mut self, run: Run, _: &[u8]) {
        self.writes.pending().sent.push(run);
    }

    fn sent_zeros(&mut self, run: Run) {
        self.writes.pending().sent.push(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Block, Layout};

    #[test]
    fn it_marks_what_it_was_told_once() {
        let layout = Layout::new([Block::new("ram", 0x10_0000).unwrap()], []).unwrap();
        let phase = SyncPhase::new(&layout.into()).unwrap();
        let (mut tracker, writes) = driven();
        let run = |first, pages| Run {
            block: 0,
            first,
            pages,
        };
        writes.wrote(run(9, 1));
        assert!(tracker.sync(&phase, Stage::Live).is_err());
        tracker.begin().unwrap();
        writes.wrote(run(1, 4));
        writes.wrote(run(3, 4));
        writes.fail("no");
        let refused = tracker.sync(&phase, Stage::Live).unwrap_err();
        assert_eq!(refused.to_string(), "no");
        assert_eq!(tracker.sync(&phase, Stage::Live).unwrap().marked, 6);
        assert_eq!(tracker.sync(&phase, Stage::Live).unwrap().marked, 0);
        assert_eq!(writes.syncs(), 2);
        assert_eq!(phase.bitmap().dirty_runs().collect::<Vec<_>>(), [run(1, 6)]);
    }
}
