// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The precopy engine, which runs the iterations.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::digest::PageHasher;
use crate::dirty_tracking::{DirtyTracker, SentTable, Stage, SyncStats};
use crate::status::{Iteration, MigrationStatus};
use crate::vm::Vm;
use crate::{CancelToken, DirtyBitmap, Memory, SyncPhase, WaitOutcome, PAGE_SIZE};

use super::hint_rounds::Hints;
use super::pause_guard::PauseGuard;
use super::progress::Progress;
use super::rate_limiter::{self, RateLimiter};
use super::send::PageSender;
use super::sink::{Sink, SinkError};
use super::{Parameters, Parts, PrecopyError};

/// A migration by precopy.
pub struct Precopy {
    parameters: Parameters,
    tracker: Box<dyn DirtyTracker>,
    /// Declared before `hints`, and so dropped before it: a paused guest resumes before it is told DONE.
    vm: PauseGuard,
    hints: Hints,
    sender: PageSender,
    progress: Progress,
    cancel: CancelToken,
    /// Bytes per second, as last measured.
    bandwidth: Option<u64>,
}

impl Precopy {
    /// Sends the memory of `parts` through the sink that `connect` returns. Returns the paused VM of `parts`, if there
    /// is one.
    ///
    /// Blocks until the migration has ended. `progress` shows the state of the migration, and `cancel` ends it at once.
    /// `cancel` must also unblock the sink.
    ///
    /// # Errors
    ///
    /// If any step fails or the migration was cancelled. The VM then runs, unless another client has paused it. The
    /// guest has its hinted pages back, and `progress` shows the error.
    pub fn run(
        parameters: Parameters,
        parts: Parts,
        connect: impl FnOnce(&Memory, Option<&PageHasher>) -> Result<Box<dyn Sink>, SinkError>,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<Option<Box<dyn Vm>>, PrecopyError> {
        let result = Self::setup(parameters, parts, connect, progress, cancel)
            .and_then(Self::run_iterations);
        match result {
            Ok(vm) => {
                progress.set_status(MigrationStatus::Completed);
                Ok(vm)
            }
            Err(error) => {
                // An error after cancellation is a consequence of the cancellation.
                let error = if cancel.is_cancelled() {
                    PrecopyError::Cancelled
                } else {
                    error
                };
                progress.fail(&error);
                Err(error)
            }
        }
    }

    fn setup(
        parameters: Parameters,
        parts: Parts,
        connect: impl FnOnce(&Memory, Option<&PageHasher>) -> Result<Box<dyn Sink>, SinkError>,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<Self, PrecopyError> {
        let Parts {
            memory,
            tracker,
            sent,
            hints,
            vm,
        } = parts;
        // Dropped on every return path, so that the guest gets its hinted pages back (R16).
        let hints = Hints::new(hints);
        if parameters.postcopy {
            return Err(match hints.source {
                Some(_) => PrecopyError::PostcopyWithHints,
                None => PrecopyError::Postcopy,
            });
        }
        if vm.is_none() && !parameters.pause_before_switchover {
            return Err(PrecopyError::NoVm);
        }
        let discards = hints.source.as_ref().is_none_or(|it| it.discards());
        if tracker.hints_need_discard() && !discards {
            return Err(PrecopyError::UnsoundHints(tracker.name()));
        }
        let pages = memory.layout().pages();
        progress.update(|status| status.ram.total = pages.saturating_mul(PAGE_SIZE));
        let table = sent.as_ref().or(tracker.sent_table());
        let sink = connect(&memory, table.map(SentTable::hasher)).map_err(PrecopyError::Sink)?;
        let detect = parameters.zero_page_detection;
        Ok(Self {
            sender: PageSender::new(memory, sink, sent, detect)?,
            parameters,
            tracker,
            hints,
            vm: PauseGuard::new(vm, progress),
            progress: progress.clone(),
            cancel: cancel.clone(),
            bandwidth: None,
        })
    }

    fn run_iterations(mut self) -> Result<Option<Box<dyn Vm>>, PrecopyError> {
        let layout = self.sender.memory().layout().clone();
        let mut phase = SyncPhase::new(&layout)?;
        // Tracking starts before the first page is sent, so the first sync shows every later write.
        self.tracker.start()?;
        phase.set_all();
        self.progress.set_status(MigrationStatus::Active);
        let mut iterations = 0;
        loop {
            phase = self.live_iteration(phase)?;
            iterations += 1;
            if self.fits_downtime(phase.bitmap()) {
                break;
            }
            if iterations >= self.parameters.max_rounds {
                info!("max-rounds reached after {iterations} iterations: remaining pages are sent with the guest paused");
                break;
            }
        }
        self.pause()?;
        self.final_iteration(&phase)?;
        let table = self.sender.sent_table().or(self.tracker.sent_table());
        let digest = table.map(SentTable::digest);
        self.sender
            .sink()
            .finish(digest)
            .map_err(PrecopyError::Sink)?;
        if self.cancel.is_cancelled() {
            return Err(PrecopyError::Cancelled);
        }
        self.hints.done();
        Ok(self.vm.keep_paused())
    }

    /// Runs one iteration with the guest running: from the end of a dirty sync to the end of the next.
    fn live_iteration(&mut self, phase: SyncPhase) -> Result<SyncPhase, PrecopyError> {
        let mut iteration = Iteration {
            dirty: phase.bitmap().dirty_pages(),
            ..Iteration::default()
        };
        let bitmap = phase.bitmap().clone();
        let (before, bytes) = (self.sender.counts(), self.sender.bytes());
        self.hints.open(phase.finish());
        iteration.hint_wait_us = micros(self.wait_for_hints(&bitmap)?);
        let begun = Instant::now();
        self.send(&bitmap, self.parameters.max_bandwidth)?;
        self.end_iteration()?;
        let took = begun.elapsed();
        iteration.send_us = micros(took);
        let phase = self.hints.close()?.close();
        let counts = self.sender.counts();
        iteration.normal = counts.normal - before.normal;
        iteration.duplicate = counts.duplicate - before.duplicate;
        iteration.transferred = self.sender.bytes().saturating_sub(bytes);
        let gone = iteration.normal + iteration.duplicate + bitmap.dirty_pages();
        iteration.hinted = iteration.dirty.saturating_sub(gone);
        if iteration.normal > 0 {
            self.bandwidth = rate_limiter::rate(iteration.transferred, took).or(self.bandwidth);
        }
        let (synced, duration) = self.sync(&phase, Stage::Live)?;
        iteration.sync_us = micros(duration);
        iteration.stopped_us = micros(synced.stop_time);
        let rate = rate_limiter::rate(synced.marked, begun.elapsed()).unwrap_or(0);
        let expected = self.expected_downtime(&bitmap).saturating_add(duration);
        self.progress.update(|status| {
            status.ram.hinted += iteration.hinted;
            status.ram.dirty_pages_rate = rate;
            status.expected_downtime = u64::try_from(expected.as_millis()).ok();
        });
        self.update_progress(&bitmap);
        self.progress.add_iteration(iteration, true);
        Ok(phase)
    }

    /// Waits for hints, and returns how long it waited. A limit applies to the waits of all iterations together (R14).
    ///
    /// Once the bandwidth has been measured, the wait is also limited to the time that sending all dirty pages would
    /// take. A longer wait cannot pay off, and the guest may dirty more pages meanwhile.
    fn wait_for_hints(&mut self, bitmap: &DirtyBitmap) -> Result<Duration, PrecopyError> {
        let begun = Instant::now();
        let left = self.parameters.hint_wait;
        let timeout = match self.bandwidth {
            Some(_) => left.min(self.expected_downtime(bitmap)),
            None => left,
        };
        match self.hints.wait(timeout, &self.cancel) {
            WaitOutcome::Cancelled => return Err(PrecopyError::Cancelled),
            WaitOutcome::TimedOut if timeout < left => {}
            WaitOutcome::TimedOut => info!("hint round did not finish within free-page-hint-wait: later hints apply while pages are sent"),
            WaitOutcome::Lost(why) => info!("hint round ended early: {why}"),
            WaitOutcome::Finished => {}
        }
        let waited = begun.elapsed();
        self.parameters.hint_wait = left.saturating_sub(waited);
        if self.cancel.is_cancelled() {
            return Err(PrecopyError::Cancelled);
        }
        Ok(waited)
    }

    /// Pauses the VM, or waits until a client has paused it.
    fn pause(&mut self) -> Result<(), PrecopyError> {
        if self.parameters.pause_before_switchover {
            // The client that pauses the guest may unplug the balloon before. The guest therefore gets its pages back
            // now.
            self.hints.done();
            self.progress.set_status(MigrationStatus::PreSwitchover);
            if !self.progress.wait_for_continue(&self.cancel) {
                return Err(PrecopyError::Cancelled);
            }
        }
        self.progress.set_status(MigrationStatus::Device);
        if !self.parameters.pause_before_switchover {
            self.vm.pause()?;
        }
        Ok(())
    }

    /// Runs the last iteration: sends the remaining pages while the guest is paused.
    fn final_iteration(&mut self, phase: &SyncPhase) -> Result<(), PrecopyError> {
        let bitmap = phase.bitmap().clone();
        let (before, bytes) = (self.sender.counts(), self.sender.bytes());
        let (synced, duration) = self.sync(phase, Stage::Paused)?;
        let mut iteration = Iteration {
            paused: true,
            dirty: bitmap.dirty_pages(),
            sync_us: micros(duration),
            stopped_us: micros(synced.stop_time),
            ..Iteration::default()
        };
        let begun = Instant::now();
        self.send(&bitmap, 0)?;
        self.verify(phase)?;
        self.end_iteration()?;
        iteration.send_us = micros(begun.elapsed());
        let counts = self.sender.counts();
        iteration.normal = counts.normal - before.normal;
        iteration.duplicate = counts.duplicate - before.duplicate;
        iteration.transferred = self.sender.bytes().saturating_sub(bytes);
        self.update_progress(&bitmap);
        self.progress.add_iteration(iteration, true);
        Ok(())
    }

    /// Compares each page that was sent with its recorded content, if there is a record. Sends the pages that differ
    /// again.
    fn verify(&mut self, phase: &SyncPhase) -> Result<(), PrecopyError> {
        let missed = self.sender.mark_changed(phase)?;
        if missed > 0 {
            warn!(
                "{} tracking missed writes to {missed} pages; these pages are sent again",
                self.tracker.name()
            );
            self.progress.update(|status| status.ram.missed += missed);
            // A new iteration: within an iteration each page is sent once.
            self.end_iteration()?;
            self.send(phase.bitmap(), 0)?;
        }
        Ok(())
    }

    fn sync(
        &mut self,
        phase: &SyncPhase,
        stage: Stage,
    ) -> Result<(SyncStats, Duration), PrecopyError> {
        if self.cancel.is_cancelled() {
            return Err(PrecopyError::Cancelled);
        }
        let begun = Instant::now();
        let synced = self.tracker.sync(phase, stage)?;
        Ok((synced, begun.elapsed()))
    }

    fn send(&mut self, bitmap: &DirtyBitmap, max_bandwidth: u64) -> Result<(), PrecopyError> {
        let mut rate_limiter = RateLimiter::new(max_bandwidth);
        let progress = &self.progress;
        let mut shown: Option<Instant> = None;
        self.sender.send(
            bitmap,
            &mut *self.tracker,
            &mut rate_limiter,
            &self.cancel,
            |sender| {
                if shown.is_none_or(|it| it.elapsed() >= Duration::from_millis(20)) {
                    shown = Some(Instant::now());
                    update_progress(progress, sender, bitmap);
                }
            },
        )
    }

    fn end_iteration(&mut self) -> Result<(), PrecopyError> {
        self.sender
            .sink()
            .end_iteration()
            .map_err(PrecopyError::Sink)
    }

    fn update_progress(&self, bitmap: &DirtyBitmap) {
        update_progress(&self.progress, &self.sender, bitmap);
    }

    /// Returns whether the dirty pages can be sent within the downtime limit.
    fn fits_downtime(&self, bitmap: &DirtyBitmap) -> bool {
        self.expected_downtime(bitmap) <= self.parameters.downtime_limit
    }

    fn expected_downtime(&self, bitmap: &DirtyBitmap) -> Duration {
        let bytes = bitmap.dirty_pages().saturating_mul(PAGE_SIZE);
        // There is no measurement before the first page is sent: assume a slow network.
        const GIGABIT: u64 = 125_000_000;
        rate_limiter::transfer_time(bytes, self.bandwidth.unwrap_or(GIGABIT))
    }
}

fn update_progress(progress: &Progress, sender: &PageSender, bitmap: &DirtyBitmap) {
    let counts = sender.counts();
    progress.update(|status| {
        let ram = &mut status.ram;
        ram.remaining = bitmap.dirty_pages().saturating_mul(PAGE_SIZE);
        ram.transferred = sender.bytes();
        ram.normal = counts.normal;
        ram.duplicate = counts.duplicate;
        ram.resent = counts.resent;
        ram.skipped = bitmap.skipped_pages();
    });
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
