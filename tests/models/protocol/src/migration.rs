// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The migration: iterations, dirty syncs, switchover and completion.

use shared_abi::command::HintId;
use shared_abi::hinting::device;

use crate::instance::{Instance, Mutation, Tracking};
use crate::state::ModelState;

/// The phase of a migration.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum MigrationPhase {
    /// No migration runs. The last one, if any, was cancelled, or its source was resumed.
    None,
    /// An iteration: pages are sent, and hints are valid.
    Iteration,
    /// DONE is reported, so hints are no longer valid. Pages are sent, and the guest still runs.
    PreSwitchover,
    /// A dirty sync: hints are invalid, and the tracking is not read yet.
    Syncing,
    /// The dirty sync has ended. The next iteration can start.
    Synced,
    /// The guest is paused. Writes since the last dirty sync are not marked yet.
    Paused,
    /// The final dirty sync has ended. The remaining dirty pages are sent.
    FinalIteration,
    /// The migration is complete.
    Completed,
}

/// The state of a migration.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Migration {
    /// The phase of the migration.
    pub progress: MigrationPhase,
    /// Number of migrations that may still start.
    pub remaining: u8,
    /// Number of dirty syncs that may still happen, without the final one.
    pub syncs: u8,
    /// The dirty bitmap.
    pub dirty: u8,
    /// The dirty count.
    pub count: u8,
    /// Pages written since the kernel's records were last read, one bit each.
    pub written: u8,
    /// Content of each page at the destination: as last sent, or 0.
    pub destination: Vec<u8>,
    /// Content of each page at the last dirty sync or sending, for [`Tracking::ContentAsSeen`].
    pub seen: Vec<u8>,
    /// The page whose dirty bit was cleared and which is not sent yet.
    pub taken: Option<usize>,
    /// Whether a hint has cleared a dirty bit.
    pub hint_skipped_page: bool,
}

impl Migration {
    pub(crate) fn idle(instance: &Instance) -> Self {
        Self {
            progress: MigrationPhase::None,
            remaining: instance.migrations,
            syncs: 0,
            dirty: 0,
            count: 0,
            written: 0,
            destination: vec![0; instance.pages],
            seen: vec![0; instance.pages],
            taken: None,
            hint_skipped_page: false,
        }
    }

    /// Applies a hint: clears the page's dirty bit.
    pub(crate) fn hinted(&mut self, instance: &Instance, page: usize) {
        self.hint_skipped_page |= self.dirty & (1 << page) != 0;
        self.clear(instance, page);
    }

    fn clear(&mut self, instance: &Instance, page: usize) {
        let was_set = self.dirty & (1 << page) != 0;
        self.dirty &= !(1 << page);
        if was_set || instance.mutation == Mutation::CountClearBits {
            self.count = self.count.saturating_sub(1);
        }
    }

    fn mark(&mut self, page: usize) {
        if self.dirty & (1 << page) == 0 {
            self.dirty |= 1 << page;
            self.count += 1;
        }
    }
}

/// A step of the migration.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Starts a migration: starts write tracking, marks all pages as dirty, and requests hints.
    Begin,
    /// Clears a page's dirty bit, to send the page.
    Take(usize),
    /// Reads the taken page and sends it.
    Send,
    /// Closes the hint window: hints are invalid, and a dirty sync starts.
    CloseWindow,
    /// Reads the tracking and marks the written pages as dirty.
    Sync,
    /// Starts the next iteration, and requests hints with a new command id.
    OpenWindow,
    /// Reports DONE while the guest still runs, because no more hints are needed.
    SendDone,
    /// Pauses the guest.
    Pause,
    /// Completes the migration, because no page is dirty, and reports DONE.
    Complete,
    /// The administrator resumes the source after a completed migration.
    Resume,
    /// Cancels the migration.
    Cancel,
}

pub(crate) fn enabled_steps(instance: &Instance, state: &ModelState, mut step: impl FnMut(Step)) {
    let migration = &state.migration;
    let is_idle = migration.taken.is_none();
    let sends = matches!(
        migration.progress,
        MigrationPhase::Iteration | MigrationPhase::PreSwitchover | MigrationPhase::FinalIteration
    );
    if sends {
        match migration.taken {
            Some(_) => step(Step::Send),
            None => (0..instance.pages)
                .filter(|page| migration.dirty & (1 << page) != 0)
                .for_each(|page| step(Step::Take(page))),
        }
    }
    match migration.progress {
        MigrationPhase::None if migration.remaining > 0 => step(Step::Begin),
        MigrationPhase::None => {}
        MigrationPhase::Iteration if is_idle => {
            if migration.syncs > 0 {
                step(Step::CloseWindow);
            }
            step(Step::SendDone);
            step(Step::Pause);
        }
        MigrationPhase::PreSwitchover if is_idle => step(Step::Pause),
        MigrationPhase::Iteration | MigrationPhase::PreSwitchover => {}
        MigrationPhase::Paused => step(Step::CloseWindow),
        MigrationPhase::Syncing => step(Step::Sync),
        MigrationPhase::Synced => step(Step::OpenWindow),
        // The dirty count decides, as in the engine.
        MigrationPhase::FinalIteration if is_idle && migration.count == 0 => step(Step::Complete),
        MigrationPhase::FinalIteration => {}
        MigrationPhase::Completed => step(Step::Resume),
    }
    if !matches!(
        migration.progress,
        MigrationPhase::None | MigrationPhase::Completed
    ) {
        step(Step::Cancel);
    }
}

pub(crate) fn apply(instance: &Instance, state: &mut ModelState, step: Step) {
    match step {
        Step::Begin => begin(instance, state),
        Step::Take(page) => {
            state.migration.clear(instance, page);
            state.migration.taken = Some(page);
        }
        Step::Send => {
            if let Some(page) = state.migration.taken.take() {
                let value = state.pages[page].value;
                state.migration.destination[page] = value;
                if instance.tracking == Tracking::ContentAsSeen {
                    state.migration.seen[page] = value;
                }
            }
        }
        Step::CloseWindow => {
            if instance.mutation != Mutation::HintsOutliveSync {
                state.notify_device(device::Event::SyncStarts);
            }
            state.migration.progress = MigrationPhase::Syncing;
        }
        Step::Sync => sync(instance, state),
        Step::OpenWindow => {
            if instance.mutation != Mutation::HintsOutliveSync {
                state.notify_device(device::Event::SyncEnds);
            }
            state.migration.syncs -= 1;
            state.migration.progress = MigrationPhase::Iteration;
        }
        Step::SendDone => {
            state.notify_device(device::Event::Done);
            state.migration.progress = MigrationPhase::PreSwitchover;
        }
        Step::Pause => {
            state.paused = true;
            state.migration.progress = MigrationPhase::Paused;
        }
        Step::Complete => {
            state.notify_device(device::Event::Done);
            state.migration.progress = MigrationPhase::Completed;
        }
        Step::Resume => end(instance, state),
        Step::Cancel => {
            state.notify_device(match instance.mutation {
                Mutation::CancelWithoutDone => device::Event::Stop,
                _ => device::Event::Done,
            });
            end(instance, state);
        }
    }
}

fn begin(instance: &Instance, state: &mut ModelState) {
    if instance.mutation == Mutation::ReuseIds {
        state.device = device::State::with_next_id(HintId::FIRST);
    }
    let remaining = state.migration.remaining - 1;
    let values: Vec<u8> = state.pages.iter().map(|page| page.value).collect();
    state.migration = Migration {
        progress: MigrationPhase::Iteration,
        remaining,
        syncs: instance.syncs,
        ..Migration::idle(instance)
    };
    if instance.tracking == Tracking::ContentAsSeen {
        state.migration.seen = values;
    }
    (0..instance.pages).for_each(|page| state.migration.mark(page));
    state.notify_device(device::Event::Start);
}

fn sync(instance: &Instance, state: &mut ModelState) {
    let migration = &mut state.migration;
    for (page, now) in state.pages.iter().enumerate() {
        let changed = match instance.tracking {
            Tracking::SoftDirty => migration.written & (1 << page) != 0,
            Tracking::ContentAsSent => migration.destination[page] != now.value,
            Tracking::ContentAsSeen => migration.seen[page] != now.value,
        };
        if changed {
            migration.mark(page);
        }
        if instance.tracking == Tracking::ContentAsSeen {
            migration.seen[page] = now.value;
        }
    }
    migration.written = 0;
    migration.progress = if state.paused {
        MigrationPhase::FinalIteration
    } else {
        MigrationPhase::Synced
    };
}

/// Resumes the guest, and discards the state of the migration.
fn end(instance: &Instance, state: &mut ModelState) {
    state.paused = false;
    state.migration = Migration {
        remaining: state.migration.remaining,
        ..Migration::idle(instance)
    };
}
