// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the precopy engine with a simulated guest, device and destination.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::digest::ContentDigest;
use crate::dirty_tracking::{mock_tracker, ContentTracker, MockWrites};
use crate::status::{MigrationInfo, MigrationStatus};
use crate::vm::{Vm, VmError};
use crate::{
    CancelToken, DirtyBitmap, HintSource, HintSourceError, HintWindow, Layout, PageRun, RamBlock,
    Region, WaitOutcome, PAGE_SIZE,
};

const PAGES: u64 = 64;
const PAGE: usize = PAGE_SIZE as usize;

/// The log of the simulated components, and the events and faults that a test injects.
#[derive(Default)]
struct TestState {
    log: Vec<String>,
    there: Vec<u8>,
    /// What happens at the n-th call of the destination.
    at: Vec<(usize, Act)>,
    calls: usize,
    /// The hints that the guest gives, by hint round.
    hints: Vec<Vec<PageRun>>,
    discards: bool,
    /// The first hint round that the guest does not finish, counted from 1.
    silent_from: Option<usize>,
    waited: Duration,
    lose_window: bool,
    pause_fails: bool,
    resume_fails: bool,
    /// Whether the guest is paused. A paused guest does not write.
    paused: bool,
    bitmap: Option<Arc<DirtyBitmap>>,
}

#[derive(Clone, Debug)]
enum Act {
    Write(u64, u8, Report),
    Cancel,
    Fail,
}

/// Whether a mock tracker is told of a write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Report {
    Yes,
    No,
}

#[derive(Clone)]
struct Test {
    state: Arc<Mutex<TestState>>,
    memory: Memory,
    writes: Option<MockWrites>,
    cancel: CancelToken,
}

impl Test {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGES * PAGE_SIZE).unwrap();
        let block = RamBlock::new("ram", PAGES * PAGE_SIZE).unwrap();
        let region = Region::new(0, PAGES * PAGE_SIZE).unwrap();
        let layout = Layout::new([block], [region]).unwrap();
        let state = TestState {
            there: vec![0xff; PAGES as usize],
            ..TestState::default()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            memory: Memory::new(layout.into(), vec![file]).unwrap(),
            writes: None,
            cancel: CancelToken::default(),
        }
    }

    fn set(&self, change: impl FnOnce(&mut TestState)) -> &Self {
        change(&mut self.state.lock().unwrap());
        self
    }

    fn log(&self, what: impl Into<String>) {
        self.set(|state| state.log.push(what.into()));
    }

    fn logged(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    fn count(&self, what: &str) -> usize {
        self.logged().iter().filter(|it| *it == what).count()
    }

    fn write(&self, page: u64, value: u8, report: Report) {
        let file = self.memory.file(0).unwrap();
        file.write_all_at(&[value; PAGE], page * PAGE_SIZE).unwrap();
        if let (Report::Yes, Some(writes)) = (report, &self.writes) {
            writes.record_write(run(page, 1));
        }
    }

    fn here(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGES as usize * PAGE];
        self.memory.read(run(0, PAGES), &mut bytes).unwrap();
        bytes.chunks(PAGE).map(|page| page[0]).collect()
    }

    fn there(&self) -> Vec<u8> {
        self.state.lock().unwrap().there.clone()
    }

    /// Migrates with a tracker that compares content if `compare` is true, and otherwise with a mock tracker.
    fn migrate(
        &mut self,
        parameters: Parameters,
        compare: bool,
    ) -> (Result<bool, PrecopyError>, MigrationInfo) {
        let tracker: Box<dyn DirtyTracker> = if compare {
            Box::new(ContentTracker::new(self.memory.clone()).unwrap())
        } else {
            let (tracker, writes) = mock_tracker();
            self.writes = Some(writes);
            Box::new(tracker)
        };
        let parts = Parts {
            memory: self.memory.clone(),
            tracker,
            sent: None,
            hints: Some(Box::new(TestHintSource {
                test: self.clone(),
                window: None,
                hint_round: 0,
            })),
            vm: Some(Box::new(TestVm(self.clone()))),
        };
        self.run(parameters, parts)
    }

    fn run(
        &self,
        parameters: Parameters,
        parts: Parts,
    ) -> (Result<bool, PrecopyError>, MigrationInfo) {
        let listener = self.clone();
        let progress = Progress::new(move |event| {
            if let ProgressEvent::State(state) = event {
                listener.log(format!("state {}", state.name()));
            }
        });
        let destination = TestSink(self.clone());
        let result = Precopy::run(
            parameters,
            parts,
            move |_, _| Ok(Box::new(destination)),
            &progress,
            &self.cancel,
        );
        (result.map(|vm| vm.is_some()), progress.status())
    }
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun {
        block: 0,
        first,
        pages,
    }
}

struct TestSink(Test);

impl TestSink {
    fn called(&self) -> Result<(), SinkError> {
        let acts: Vec<Act> = {
            let mut state = self.0.state.lock().unwrap();
            state.calls += 1;
            let calls = state.calls;
            let now = state.at.iter().filter(|(at, _)| *at == calls);
            now.map(|(_, act)| act.clone()).collect()
        };
        let paused = self.0.state.lock().unwrap().paused;
        for act in acts {
            match act {
                Act::Write(..) if paused => {}
                Act::Write(page, value, report) => self.0.write(page, value, report),
                Act::Cancel => self.0.cancel.cancel(),
                Act::Fail => return Err("the wire was cut".into()),
            }
        }
        Ok(())
    }

    fn put(&self, run: PageRun, value: impl Fn(usize) -> u8) {
        let first = run.first as usize;
        self.0.set(|state| {
            for page in 0..run.pages as usize {
                state.there[first + page] = value(page);
            }
        });
    }
}

impl Sink for TestSink {
    fn zeros(&mut self, run: PageRun) -> Result<(), SinkError> {
        self.put(run, |_| 0);
        self.called()
    }

    fn pages(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), SinkError> {
        assert_eq!(bytes.len() as u64, run.length());
        self.put(run, |page| bytes[page * PAGE]);
        self.called()
    }

    fn pages_from(&mut self, run: PageRun, memory: &Memory) -> Result<(), SinkError> {
        let mut bytes = vec![0; run.length() as usize];
        memory.read(run, &mut bytes)?;
        self.put(run, |page| bytes[page * PAGE]);
        self.called()
    }

    fn end_iteration(&mut self) -> Result<(), SinkError> {
        self.0.log("end of iteration");
        self.called()
    }

    fn finish(&mut self, _: Option<ContentDigest>) -> Result<(), SinkError> {
        self.called()?;
        self.0.log("finish");
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.0.state.lock().unwrap().calls as u64 * PAGE_SIZE
    }
}

struct TestVm(Test);

impl Vm for TestVm {
    fn describe(&self) -> String {
        "a machine in a test".into()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.0.log("pause");
        self.0.set(|state| state.paused = true);
        if self.0.state.lock().unwrap().pause_fails {
            return Err(VmError("it does not want to".into()));
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.0.log("resume");
        if self.0.state.lock().unwrap().resume_fails {
            return Err(VmError("it cannot".into()));
        }
        self.0.set(|state| state.paused = false);
        Ok(())
    }
}

struct TestHintSource {
    test: Test,
    window: Option<HintWindow>,
    hint_round: usize,
}

impl HintSource for TestHintSource {
    fn discards(&self) -> bool {
        self.test.state.lock().unwrap().discards
    }

    fn open(&mut self, window: HintWindow) -> Result<(), (HintWindow, HintSourceError)> {
        self.test.log("open");
        let bitmap = window.bitmap().clone();
        self.test.set(|state| state.bitmap = Some(bitmap));
        let hints = {
            let state = self.test.state.lock().unwrap();
            state
                .hints
                .get(self.hint_round)
                .cloned()
                .unwrap_or_default()
        };
        self.hint_round += 1;
        for hint in hints {
            let _ = window.hint(hint.offset(), hint.length()).unwrap();
            if self.discards() {
                for page in hint.first..hint.end() {
                    self.test.write(page, 0, Report::No);
                }
            }
        }
        self.window = Some(window);
        Ok(())
    }

    fn wait(&mut self, timeout: Duration, cancel: &CancelToken) -> WaitOutcome {
        let silent_from = self.test.state.lock().unwrap().silent_from;
        if silent_from.is_none_or(|from| self.hint_round < from) {
            return WaitOutcome::Finished;
        }
        self.test.set(|state| state.waited += timeout);
        if cancel.sleep(timeout) {
            WaitOutcome::Cancelled
        } else {
            WaitOutcome::TimedOut
        }
    }

    fn close(&mut self) -> Result<HintWindow, HintSourceError> {
        self.test.log("close");
        if self.test.state.lock().unwrap().lose_window {
            return Err(HintSourceError("the front end has gone".into()));
        }
        Ok(self.window.take().unwrap())
    }

    fn done(&mut self) {
        self.window = None;
        self.test.log("done");
    }
}

fn filled() -> Test {
    let test = Test::new();
    for page in 0..PAGES / 2 {
        test.write(page, 1 + page as u8, Report::No);
    }
    test
}

#[test]
fn all_of_memory_arrives_but_what_was_hinted() {
    let mut test = filled();
    test.set(|state| state.hints = vec![vec![run(3, 5)]]);
    let (result, status) = test.migrate(Parameters::default(), false);
    assert!(result.unwrap(), "the VM is returned, paused");
    let (here, there) = (test.here(), test.there());
    for page in 0..PAGES as usize {
        let hinted = (3..8).contains(&page);
        assert_eq!(
            there[page],
            if hinted { 0xff } else { here[page] },
            "{page}"
        );
    }
    assert_eq!(status.status, MigrationStatus::Completed);
    assert_eq!((status.ram.skipped, status.ram.hinted), (5, 5));
    assert_eq!(status.ram.normal, PAGES / 2 - 5);
    assert_eq!(status.ram.duplicate, PAGES / 2);
    assert_eq!((status.ram.resent, status.ram.remaining), (0, 0));
    assert_eq!(status.ram.total, PAGES * PAGE_SIZE);
    assert_eq!(status.rounds.len(), 2);
    assert_eq!(status.rounds[0].hinted, 5);
    assert_eq!(
        test.logged(),
        [
            "state active",
            "open",
            "end of iteration",
            "close",
            "state device",
            "pause",
            "end of iteration",
            "finish",
            "done",
            "done",
            "state completed"
        ]
    );
}

#[test]
fn what_is_written_while_memory_is_sent_is_sent_again() {
    for compare in [false, true] {
        let mut test = filled();
        test.set(|state| {
            state.discards = true;
            // All in the first iteration: pages 2 and 3 are written after they were sent, page 60 before.
            state.at = vec![
                (1, Act::Write(2, 77, Report::Yes)),
                (1, Act::Write(60, 78, Report::Yes)),
                (2, Act::Write(3, 79, Report::Yes)),
            ];
        });
        let (result, status) = test.migrate(Parameters::default(), compare);
        result.unwrap();
        assert_eq!(test.here(), test.there());
        // Comparison finds that page 60 was sent with its new content. The mock tracker marks it dirty again.
        assert_eq!(status.ram.resent, if compare { 2 } else { 3 });
        assert_eq!(status.ram.dirty_sync_count, status.rounds.len() as u64);
    }
}

#[test]
fn iterations_continue_while_too_much_is_dirty_and_end_at_the_limit() {
    let mut test = filled();
    let parameters = Parameters {
        downtime_limit: Duration::ZERO,
        max_rounds: 4,
        ..Parameters::default()
    };
    // Each call writes the first page again.
    let acts = (1..100).map(|at| (at, Act::Write(0, at as u8, Report::Yes)));
    test.set(|state| state.at = acts.collect());
    let (result, status) = test.migrate(parameters, false);
    result.unwrap();
    assert_eq!(status.rounds.iter().filter(|it| !it.paused).count(), 4);
    assert_eq!(test.count("open"), 4);
    // The last iteration runs with the guest paused.
    assert_eq!(status.rounds.last().map(|it| it.paused), Some(true));
}

#[test]
fn r16_the_guest_gets_its_pages_back_and_runs_on_wherever_it_fails() {
    let calls = {
        let mut test = filled();
        test.migrate(Parameters::default(), false).0.unwrap();
        let calls = test.state.lock().unwrap().calls;
        calls
    };
    assert!(calls > 3);
    for act in [Act::Fail, Act::Cancel] {
        for at in 1..=calls {
            let mut test = filled();
            test.set(|state| state.at = vec![(at, act.clone())]);
            let (result, status) = test.migrate(Parameters::default(), false);
            let error = result.unwrap_err();
            assert_eq!(test.count("resume"), test.count("pause"), "{act:?} {at}");
            assert!(test.count("done") > 0);
            let log = test.logged();
            let last = log.last().map(String::as_str);
            match act {
                Act::Fail => {
                    assert_eq!(last, Some("state failed"));
                    assert_eq!(status.error_desc.as_deref(), Some("the wire was cut"));
                }
                _ => {
                    assert!(matches!(error, PrecopyError::Cancelled));
                    assert_eq!((last, status.error_desc), (Some("state cancelled"), None));
                }
            }
        }
    }
}

#[test]
fn r16_also_if_the_machine_the_tracker_or_the_device_fails() {
    type Change = fn(&mut TestState);
    let fails: [(&str, Change); 2] = [
        ("it does not want to", |state| state.pause_fails = true),
        ("the front end has gone", |state| state.lose_window = true),
    ];
    for (words, fail) in fails {
        let mut test = filled();
        test.set(fail);
        let (result, status) = test.migrate(Parameters::default(), false);
        let text = result.unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
        assert_eq!(status.error_desc, Some(text));
        assert_eq!(test.count("resume"), test.count("pause"));
        assert!(test.count("done") > 0);
    }
    let test = filled();
    let (tracker, writes) = mock_tracker();
    writes.fail("soft-dirty bits are not available");
    let parts = Parts {
        memory: test.memory.clone(),
        tracker: Box::new(tracker),
        sent: None,
        hints: None,
        vm: Some(Box::new(TestVm(test.clone()))),
    };
    let (result, _) = test.run(Parameters::default(), parts);
    let text = result.unwrap_err().to_string();
    assert!(text.contains("soft-dirty bits are not available"), "{text}");
    assert_eq!(test.count("pause"), 0);
}

#[test]
fn a_guest_that_cannot_be_resumed_is_shown_as_paused() {
    for resume_fails in [false, true] {
        let mut test = filled();
        test.set(|state| {
            state.pause_fails = true;
            state.resume_fails = resume_fails;
        });
        let (result, status) = test.migrate(Parameters::default(), false);
        result.unwrap_err();
        assert_eq!(test.count("resume"), 1);
        assert_eq!(status.guest_paused, resume_fails);
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json.get("guest-paused").is_some(), resume_fails);
    }
}

#[test]
fn r14_a_silent_guest_delays_all_iterations_together_by_the_limit_at_most() {
    let mut test = filled();
    let timeout = Duration::from_millis(30);
    let parameters = Parameters {
        hint_wait: timeout,
        downtime_limit: Duration::ZERO,
        max_rounds: 5,
        ..Parameters::default()
    };
    let acts = (1..100).map(|at| (at, Act::Write(0, at as u8, Report::Yes)));
    test.set(|state| {
        state.silent_from = Some(1);
        state.at = acts.collect();
    });
    let (result, status) = test.migrate(parameters, false);
    result.unwrap();
    assert_eq!(test.count("open"), 5);
    assert_eq!(test.state.lock().unwrap().waited, timeout);
    assert!(status.rounds[0].hint_wait_us >= 30_000);
}

#[test]
fn later_iterations_wait_no_longer_than_they_would_send() {
    let mut test = filled();
    let parameters = Parameters {
        hint_wait: Duration::from_secs(600),
        downtime_limit: Duration::ZERO,
        max_rounds: 4,
        ..Parameters::default()
    };
    let acts = (1..100).map(|at| (at, Act::Write(0, at as u8, Report::Yes)));
    test.set(|state| {
        state.silent_from = Some(2);
        state.at = acts.collect();
    });
    let (result, status) = test.migrate(parameters, false);
    result.unwrap();
    assert_eq!(status.rounds.len(), 5);
    // Sending one page takes little time here.
    assert!(test.state.lock().unwrap().waited < Duration::from_secs(60));
}

#[test]
fn waiting_for_hints_ends_when_it_is_told_to() {
    let mut test = filled();
    test.set(|state| state.silent_from = Some(1));
    let cancel = test.cancel.clone();
    let parameters = Parameters {
        hint_wait: Duration::from_secs(600),
        ..Parameters::default()
    };
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        cancel.cancel();
    });
    let (result, _) = test.migrate(parameters, false);
    assert!(matches!(result, Err(PrecopyError::Cancelled)));
    other.join().unwrap();
}

#[test]
fn r7_post_copy_is_refused_at_the_start() {
    let mut test = filled();
    let parameters = Parameters {
        postcopy: true,
        ..Parameters::default()
    };
    let (result, status) = test.migrate(parameters, false);
    assert!(matches!(result, Err(PrecopyError::PostcopyWithHints)));
    assert_eq!(status.status, MigrationStatus::Failed);
    assert_eq!(test.count("open") + test.count("pause"), 0);
    assert_eq!(test.state.lock().unwrap().calls, 0);
}

#[test]
fn r17_hints_that_discard_nothing_are_refused_with_comparison() {
    let mut test = filled();
    let (result, _) = test.migrate(Parameters::default(), true);
    assert!(matches!(result, Err(PrecopyError::UnsoundHints("content"))));
    assert_eq!(test.count("open"), 0);
}

#[test]
fn before_switchover_hinted_pages_are_back_and_others_pause() {
    let mut test = filled();
    test.set(|state| state.hints = vec![vec![run(3, 5)]]);
    let (tracker, writes) = mock_tracker();
    test.writes = Some(writes);
    let parts = Parts {
        memory: test.memory.clone(),
        tracker: Box::new(tracker),
        sent: None,
        hints: Some(Box::new(TestHintSource {
            test: test.clone(),
            window: None,
            hint_round: 0,
        })),
        vm: None,
    };
    let (sender, states) = std::sync::mpsc::channel();
    let progress = Progress::new(move |event| sender.send(event).unwrap());
    std::thread::scope(|scope| {
        let migration = scope.spawn(|| {
            let destination = TestSink(test.clone());
            let parameters = Parameters {
                pause_before_switchover: true,
                ..Parameters::default()
            };
            let connect = move |_: &Memory, _: Option<&_>| -> Result<Box<dyn Sink>, SinkError> {
                Ok(Box::new(destination))
            };
            Precopy::run(parameters, parts, connect, &progress, &test.cancel)
        });
        let waits = ProgressEvent::State(MigrationStatus::PreSwitchover);
        while states.recv().unwrap() != waits {}
        assert_eq!(test.count("done"), 1);
        assert_eq!(test.count("finish"), 0);
        // The guest still runs, and uses a page that it got back.
        test.write(4, 99, Report::Yes);
        assert!(progress.continue_migration());
        assert!(!progress.continue_migration(), "once is enough");
        assert!(migration.join().unwrap().unwrap().is_none());
    });
    assert_eq!(test.there()[4], 99);
    assert_eq!(progress.status().status, MigrationStatus::Completed);
    assert_eq!(test.count("pause"), 0);
}

#[test]
fn a_check_at_the_end_finds_what_tracking_has_missed() {
    let test = filled();
    let (tracker, _) = mock_tracker();
    let parts = Parts {
        memory: test.memory.clone(),
        tracker: Box::new(tracker),
        sent: Some(SentTable::new(test.memory.layout()).unwrap()),
        hints: None,
        vm: Some(Box::new(TestVm(test.clone()))),
    };
    // Written after the page was sent, and not reported to the tracker.
    test.set(|state| state.at = vec![(1, Act::Write(0, 99, Report::No))]);
    let (result, status) = test.run(Parameters::default(), parts);
    result.unwrap();
    assert_eq!(status.ram.missed, 1);
    assert_eq!(test.here(), test.there());
}

#[test]
fn without_zero_page_detection_only_holes_are_zeros_and_the_tracker_is_told_of_all() {
    let mut test = filled();
    // An allocated page of zeros.
    test.write(40, 0, Report::No);
    let parameters = Parameters {
        zero_page_detection: false,
        ..Parameters::default()
    };
    let (result, status) = test.migrate(parameters, false);
    result.unwrap();
    assert_eq!(test.here(), test.there());
    assert_eq!(status.ram.normal, PAGES / 2 + 1);
    assert_eq!(status.ram.duplicate, PAGES / 2 - 1);
    let told = test
        .writes
        .as_ref()
        .map(MockWrites::sent)
        .unwrap_or_default();
    assert_eq!(told.iter().map(|it| it.pages).sum::<u64>(), PAGES);
}

#[test]
fn a_bandwidth_that_is_too_low_is_kept_to() {
    let mut test = filled();
    let parameters = Parameters {
        max_bandwidth: 20 * PAGE_SIZE,
        ..Parameters::default()
    };
    let (result, status) = test.migrate(parameters, false);
    result.unwrap();
    // The sink counts one page for each call. The call that ends the iteration is not limited.
    let bytes = status.rounds[0].transferred - PAGE_SIZE;
    let least = bytes * 1_000_000 / (20 * PAGE_SIZE);
    assert!(status.rounds[0].send_us >= least, "{status:?}");
}

fn acts() -> impl Strategy<Value = Vec<(usize, Act)>> {
    let act = (1..12usize, 0..PAGES, 0..3u8)
        .prop_map(|(at, page, value)| (at, Act::Write(page, value, Report::Yes)));
    prop::collection::vec(act, 0..40)
}

fn hints() -> impl Strategy<Value = Vec<Vec<PageRun>>> {
    let hint = (0..PAGES - 8, 1..8u64).prop_map(|(first, pages)| run(first, pages));
    prop::collection::vec(prop::collection::vec(hint, 0..5), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Pages that differ at the end are pages that hints have spared, whatever the guest writes and hints.
    #[test]
    fn only_what_hints_have_spared_may_differ_at_the_end(
        acts in acts(), hints in hints(), compare: bool, iterations in 1..5u32,
    ) {
        let mut test = filled();
        test.set(|state| {
            state.discards = compare;
            state.there = vec![0; PAGES as usize];
            state.at = acts;
            state.hints = hints;
        });
        let parameters = Parameters {
            downtime_limit: Duration::ZERO,
            max_rounds: iterations,
            ..Parameters::default()
        };
        let (result, status) = test.migrate(parameters, compare);
        result.unwrap();
        let (here, there) = (test.here(), test.there());
        let bitmap = test.state.lock().unwrap().bitmap.clone().unwrap();
        let skipped: Vec<PageRun> = bitmap.skipped_runs().collect();
        prop_assert_eq!(skipped.iter().map(|it| it.pages).sum::<u64>(), status.ram.skipped);
        for page in 0..PAGES {
            let same = here[page as usize] == there[page as usize];
            let spared = skipped.iter().any(|it| (it.first..it.end()).contains(&page));
            prop_assert!(same || spared, "page {} differs: {:?}", page, test.logged());
        }
    }
}
