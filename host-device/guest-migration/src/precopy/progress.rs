// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What others see of a migration while it goes on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::status::{Round, State, Status, Tracking};
use crate::{Cancel, PAGE_SIZE};

/// Something that operators may want to be told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Notice {
    /// It has come so far.
    State(State),
    /// So many syncs were done.
    Pass(u64),
}

/// The most rounds that are kept.
const MAX_ROUNDS: usize = 100;

type Listener = Box<dyn Fn(Notice) + Send + Sync>;

/// A migration as others see it, from any thread. Copies show the same one.
#[derive(Clone)]
pub struct Progress(Arc<Inner>);

struct Inner {
    shared: Mutex<Shared>,
    changed: Condvar,
    listener: Listener,
}

struct Shared {
    status: Status,
    begun: Instant,
    paused: Option<Instant>,
    go_on: bool,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Progress").field(&self.status()).finish()
    }
}

impl Progress {
    /// A migration that begins now. `listener` is told of what happens, in the migration's thread; it must not wait for that.
    pub fn new(listener: impl Fn(Notice) + Send + Sync + 'static) -> Self {
        let status = Status {
            status: State::Setup,
            ..Status::default()
        };
        Self(Arc::new(Inner {
            shared: Mutex::new(Shared {
                status,
                begun: Instant::now(),
                paused: None,
                go_on: false,
            }),
            changed: Condvar::new(),
            listener: Box::new(listener),
        }))
    }

    /// How it stands.
    pub fn status(&self) -> Status {
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

    /// Tells a migration in [`State::PreSwitchover`] that the machine is paused, and says whether it was in that state.
    pub fn go_on(&self) -> bool {
        let mut shared = self.shared();
        let waits = shared.status.status == State::PreSwitchover && !shared.go_on;
        if waits {
            shared.go_on = true;
            self.0.changed.notify_all();
        }
        waits
    }

    /// Says that it is being given up.
    pub fn cancelling(&self) {
        if !self.shared().status.status.is_over() {
            self.enter(State::Cancelling);
        }
    }

    /// Waits until it is over, for `limit` at most, and says whether it is.
    pub fn wait_over(&self, limit: Duration) -> bool {
        let shared = self.shared();
        let (shared, _) = self
            .0
            .changed
            .wait_timeout_while(shared, limit, |shared| !shared.status.status.is_over())
            .unwrap_or_else(PoisonError::into_inner);
        shared.status.status.is_over()
    }

    /// Notes how writes are tracked.
    pub fn tracking(&self, tracking: Tracking) {
        self.shared().status.tracking = Some(tracking);
    }

    /// Notes that it has failed before its rounds began, or why it was not even tried.
    pub fn fail(&self, error: &super::PrecopyError) {
        let state = match error {
            super::PrecopyError::Cancelled => State::Cancelled,
            _ => State::Failed,
        };
        {
            let mut shared = self.shared();
            if state == State::Failed {
                shared.status.error_desc = Some(error.to_string());
            }
            shared.status.total_time = millis(shared.begun.elapsed());
            shared.status.downtime = shared.paused.map(|paused| millis(paused.elapsed()));
        }
        self.enter(state);
    }

    pub(super) fn enter(&self, state: State) {
        {
            let mut shared = self.shared();
            if shared.status.status == state {
                return;
            }
            // Whoever gives up says so until the end.
            if shared.status.status == State::Cancelling && !state.is_over() {
                return;
            }
            shared.status.status = state;
            let elapsed = millis(shared.begun.elapsed());
            match state {
                State::Active => shared.status.setup_time = elapsed,
                State::Device => {
                    shared.paused.get_or_insert_with(Instant::now);
                }
                State::Completed => {
                    shared.status.total_time = elapsed;
                    shared.status.downtime = shared.paused.map(|paused| millis(paused.elapsed()));
                    shared.status.expected_downtime = None;
                }
                _ => {}
            }
        }
        self.0.changed.notify_all();
        (self.0.listener)(Notice::State(state));
    }

    /// Waits to be told to go on; `false` if `cancel` came first.
    pub(super) fn wait_to_go_on(&self, cancel: &Cancel) -> bool {
        let inner = Arc::downgrade(&self.0);
        cancel.on_cancel(move || {
            if let Some(inner) = inner.upgrade() {
                // Not between the sleeper's look and its sleep.
                drop(inner.shared.lock());
                inner.changed.notify_all();
            }
        });
        let mut shared = self.shared();
        while !shared.go_on && !cancel.is_cancelled() {
            shared = self
                .0
                .changed
                .wait(shared)
                .unwrap_or_else(PoisonError::into_inner);
        }
        shared.go_on && !cancel.is_cancelled()
    }

    /// Changes the figures.
    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
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
    pub(super) fn round(&self, round: Round, synced: bool) {
        let mut passes = 0;
        self.update(|status| {
            if status.rounds.len() >= MAX_ROUNDS {
                status.rounds.remove(0);
            }
            status.rounds.push(round);
            if synced {
                status.ram.dirty_sync_count += 1;
            }
            passes = status.ram.dirty_sync_count;
        });
        if synced {
            (self.0.listener)(Notice::Pass(passes));
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
