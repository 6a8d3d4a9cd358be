// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What others see of a migration while it goes on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::status::{Iteration, MigrationInfo, MigrationStatus, TrackingInfo};
use crate::{CancelToken, PAGE_SIZE};

/// Something that operators may want to be told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProgressEvent {
    /// It has come so far.
    State(MigrationStatus),
    /// So many syncs were done.
    Pass(u64),
}

/// The most rounds that are kept.
const MAX_ITERATIONS: usize = 100;

type EventHandler = Box<dyn Fn(ProgressEvent) + Send + Sync>;

/// A migration as others see it, from any thread. Copies show the same one.
#[derive(Clone)]
pub struct Progress(Arc<Inner>);

struct Inner {
    shared: Mutex<Shared>,
    changed: Condvar,
    on_event: EventHandler,
}

struct Shared {
    status: MigrationInfo,
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
    /// A migration that begins now. `on_event` is told of what happens, in the migration's thread; it must not wait for that.
    pub fn new(on_event: impl Fn(ProgressEvent) + Send + Sync + 'static) -> Self {
        let status = MigrationInfo {
            status: MigrationStatus::Setup,
            ..MigrationInfo::default()
        };
        Self(Arc::new(Inner {
            shared: Mutex::new(Shared {
                status,
                begun: Instant::now(),
                paused: None,
                is_continued: false,
            }),
            changed: Condvar::new(),
            on_event: Box::new(on_event),
        }))
    }

    /// How it stands.
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

    /// Tells a migration in [`MigrationStatus::PreSwitchover`] that the machine is paused, and says whether it was in that state.
    pub fn continue_migration(&self) -> bool {
        let mut shared = self.shared();
        let waits = shared.status.status == MigrationStatus::PreSwitchover && !shared.is_continued;
        if waits {
            shared.is_continued = true;
            self.0.changed.notify_all();
        }
        waits
    }

    /// Says that it is being given up.
    pub fn set_cancelling(&self) {
        if !self.shared().status.status.is_over() {
            self.set_status(MigrationStatus::Cancelling);
        }
    }

    /// Waits until it is over, for `timeout` at most, and says whether it is.
    pub fn wait_until_over(&self, timeout: Duration) -> bool {
        let shared = self.shared();
        let (shared, _) = self
            .0
            .changed
            .wait_timeout_while(shared, timeout, |shared| !shared.status.status.is_over())
            .unwrap_or_else(PoisonError::into_inner);
        shared.status.status.is_over()
    }

    /// Notes how writes are tracked.
    pub fn set_tracking(&self, tracking: TrackingInfo) {
        self.shared().status.tracking = Some(tracking);
    }

    /// Notes that it has failed before its rounds began, or why it was not even tried.
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
        {
            let mut shared = self.shared();
            if shared.status.status == state {
                return;
            }
            // Whoever gives up says so until the end.
            if shared.status.status == MigrationStatus::Cancelling && !state.is_over() {
                return;
            }
            shared.status.status = state;
            let elapsed = millis(shared.begun.elapsed());
            match state {
                MigrationStatus::Active => shared.status.setup_time = elapsed,
                MigrationStatus::Device => {
                    shared.paused.get_or_insert_with(Instant::now);
                }
                MigrationStatus::Completed => {
                    shared.status.total_time = elapsed;
                    shared.status.downtime = shared.paused.map(|paused| millis(paused.elapsed()));
                    shared.status.expected_downtime = None;
                }
                _ => {}
            }
        }
        self.0.changed.notify_all();
        (self.0.on_event)(ProgressEvent::State(state));
    }

    /// Waits to be told to go on; `false` if `cancel` came first.
    pub(super) fn wait_for_continue(&self, cancel: &CancelToken) -> bool {
        let inner = Arc::downgrade(&self.0);
        cancel.on_cancel(move || {
            if let Some(inner) = inner.upgrade() {
                // Not between the sleeper's look and its sleep.
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

    /// Changes the figures.
    pub(super) fn update(&self, change: impl FnOnce(&mut MigrationInfo)) {
        let mut shared = self.shared();
        change(&mut shared.status);
        let elapsed = shared.begun.elapsed().as_secs_f64();
        let ram = &mut shared.status.ram;
        ram.page_size = PAGE_SIZE;
        if elapsed > 0.0 {
            // For people: the mantissa is long enough.
            #[allow(clippy::cast_precision_loss)]
            let bits = ram.transferred as f64 * 8.0;
            ram.mbps = bits / elapsed / 1e6;
        }
    }

    /// Notes that a round is over, and with it a sync if there was one.
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

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
