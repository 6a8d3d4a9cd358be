// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The progress of a migration, as other threads see it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::status::{Iteration, MigrationInfo, MigrationStatus, TrackingInfo};
use crate::{CancelToken, PAGE_SIZE};

/// A change that QMP clients may want to know.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProgressEvent {
    /// The migration has entered this state.
    State(MigrationStatus),
    /// This number of dirty syncs is done.
    Pass(u64),
}

/// Maximum number of iterations that are kept.
const MAX_ITERATIONS: usize = 100;

type EventHandler = Box<dyn Fn(ProgressEvent) + Send + Sync>;

/// The progress of a migration, for any thread. Clones share it.
#[derive(Clone)]
pub struct Progress(Arc<Inner>);

struct Inner {
    shared: Mutex<Shared>,
    changed: Condvar,
    on_event: EventHandler,
}

struct Shared {
    status: MigrationInfo,
    /// Number of changes of the status.
    changes: u64,
    begun: Instant,
    paused: Option<Instant>,
    is_continued: bool,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Progress").field(&self.status()).finish()
    }
}

impl Progress {
    /// Returns the progress of a migration that starts now. `on_event` is called in the thread that changes the
    /// progress, without the lock. It must not wait for the migration.
    pub fn new(on_event: impl Fn(ProgressEvent) + Send + Sync + 'static) -> Self {
        let status = MigrationInfo {
            status: MigrationStatus::Setup,
            ..MigrationInfo::default()
        };
        Self(Arc::new(Inner {
            shared: Mutex::new(Shared {
                status,
                changes: 0,
                begun: Instant::now(),
                paused: None,
                is_continued: false,
            }),
            changed: Condvar::new(),
            on_event: Box::new(on_event),
        }))
    }

    /// Returns the current status.
    pub fn status(&self) -> MigrationInfo {
        let shared = self.shared();
        let mut status = shared.status.clone();
        if !status.status.is_over() {
            status.total_time = millis(shared.begun.elapsed());
            if let Some(paused) = shared.paused {
                status.downtime = Some(millis(paused.elapsed()));
            }
        }
        status
    }

    /// Tells a migration in [`MigrationStatus::PreSwitchover`] that the VM is paused. Returns whether the migration was
    /// waiting for this.
    pub fn continue_migration(&self) -> bool {
        let mut shared = self.shared();
        let waits = shared.status.status == MigrationStatus::PreSwitchover && !shared.is_continued;
        if waits {
            shared.is_continued = true;
            self.0.changed.notify_all();
        }
        waits
    }

    /// Sets the state to [`MigrationStatus::Cancelling`], unless the migration has ended.
    pub fn set_cancelling(&self) {
        if !self.shared().status.status.is_over() {
            self.set_status(MigrationStatus::Cancelling);
        }
    }

    /// Waits until the migration has ended, for at most `timeout`. Returns whether it has ended.
    pub fn wait_until_over(&self, timeout: Duration) -> bool {
        let shared = self.shared();
        let (shared, _) = self
            .0
            .changed
            .wait_timeout_while(shared, timeout, |shared| !shared.status.status.is_over())
            .unwrap_or_else(PoisonError::into_inner);
        shared.status.status.is_over()
    }

    /// Waits until the status has changed since there were `seen` changes. Returns the number of changes now.
    pub fn wait_for_change(&self, seen: u64) -> u64 {
        let mut shared = self.shared();
        while shared.changes == seen {
            shared = self
                .0
                .changed
                .wait(shared)
                .unwrap_or_else(PoisonError::into_inner);
        }
        shared.changes
    }

    /// Shows the status of a migration that runs in another process. The time of the migration in progress is measured
    /// here.
    ///
    /// Emits an event if the state differs. A migration that is being cancelled keeps that state until it ends.
    pub fn show(&self, status: MigrationInfo) {
        let state = status.status;
        {
            let mut shared = self.shared();
            if shared.status.status.is_over() {
                return;
            }
            let status = MigrationInfo {
                status: shared.status.status,
                ..status
            };
            shared.status = status;
        }
        self.change_status(state, false);
    }

    /// Emits the event of a dirty sync in another process.
    pub fn show_pass(&self, pass: u64) {
        (self.0.on_event)(ProgressEvent::Pass(pass));
    }

    /// Records how writes are tracked.
    pub fn set_tracking(&self, tracking: TrackingInfo) {
        let mut shared = self.shared();
        shared.status.tracking = Some(tracking);
        self.0.note_change(&mut shared);
    }

    /// Records the failure or cancellation of the migration, also of one that was not started.
    pub fn fail(&self, error: &super::PrecopyError) {
        let state = match error {
            super::PrecopyError::Cancelled => MigrationStatus::Cancelled,
            _ => MigrationStatus::Failed,
        };
        {
            let mut shared = self.shared();
            if state == MigrationStatus::Failed {
                shared.status.error_desc = Some(error.to_string());
            }
            shared.status.total_time = millis(shared.begun.elapsed());
            shared.status.downtime = shared.paused.map(|paused| millis(paused.elapsed()));
        }
        self.set_status(state);
    }

    pub(super) fn set_status(&self, state: MigrationStatus) {
        self.change_status(state, true);
    }

    /// Changes the state. Records the times if `with_times` is true.
    fn change_status(&self, state: MigrationStatus, with_times: bool) {
        {
            let mut shared = self.shared();
            if shared.status.status == state {
                return;
            }
            // A migration that is being cancelled keeps that state until it ends.
            if shared.status.status == MigrationStatus::Cancelling && !state.is_over() {
                return;
            }
            shared.status.status = state;
            let elapsed = millis(shared.begun.elapsed());
            match state {
                MigrationStatus::Device => {
                    shared.paused.get_or_insert_with(Instant::now);
                }
                _ if !with_times => {}
                MigrationStatus::Active => shared.status.setup_time = elapsed,
                MigrationStatus::Completed => {
                    shared.status.total_time = elapsed;
                    shared.status.downtime = shared.paused.map(|paused| millis(paused.elapsed()));
                    shared.status.expected_downtime = None;
                }
                _ => {}
            }
            self.0.note_change(&mut shared);
        }
        (self.0.on_event)(ProgressEvent::State(state));
    }

    /// Waits until a client continues the migration. Returns `false` if `cancel` came first.
    pub(super) fn wait_for_continue(&self, cancel: &CancelToken) -> bool {
        let inner = Arc::downgrade(&self.0);
        cancel.on_cancel(move || {
            if let Some(inner) = inner.upgrade() {
                // Take the lock, so that the notification does not fall between the waiter's check and its wait.
                drop(inner.shared.lock());
                inner.changed.notify_all();
            }
        });
        let mut shared = self.shared();
        while !shared.is_continued && !cancel.is_cancelled() {
            shared = self
                .0
                .changed
                .wait(shared)
                .unwrap_or_else(PoisonError::into_inner);
        }
        shared.is_continued && !cancel.is_cancelled()
    }

    /// Updates the status.
    pub(super) fn update(&self, change: impl FnOnce(&mut MigrationInfo)) {
        let mut shared = self.shared();
        change(&mut shared.status);
        let elapsed = shared.begun.elapsed().as_secs_f64();
        let ram = &mut shared.status.ram;
        ram.page_size = PAGE_SIZE;
        if elapsed > 0.0 {
            // Precise enough for a value that is shown.
            #[allow(clippy::cast_precision_loss)]
            let bits = ram.transferred as f64 * 8.0;
            ram.mbps = bits / elapsed / 1e6;
        }
        self.0.note_change(&mut shared);
    }

    /// Records the end of an iteration, and of a dirty sync if `synced` is true.
    pub(super) fn add_iteration(&self, iteration: Iteration, synced: bool) {
        let mut passes = 0;
        self.update(|status| {
            if status.rounds.len() >= MAX_ITERATIONS {
                status.rounds.remove(0);
            }
            status.rounds.push(iteration);
            if synced {
                status.ram.dirty_sync_count += 1;
            }
            passes = status.ram.dirty_sync_count;
        });
        if synced {
            (self.0.on_event)(ProgressEvent::Pass(passes));
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn note_change(&self, shared: &mut Shared) {
        shared.changes = shared.changes.wrapping_add(1);
        self.changed.notify_all();
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
