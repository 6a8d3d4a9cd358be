// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The migration: rounds, the pause, the end.

use shared_abi::command::HintId;
use shared_abi::hinting::device;

use crate::instance::{Instance, Mutation, Tracking};
use crate::state::ModelState;

/// How far a migration has come.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum MigrationPhase {
    /// None runs; the last one, if there was one, was cancelled, or its source goes on.
    None,
    /// A round: pages are sent, and hints may come meanwhile.
    Iteration,
    /// Hints are over for good, DONE is said, and the guest still runs.
    PreSwitchover,
    /// Hints are dead, and the tracking is to be read.
    Syncing,
    /// It was read; a new round may begin.
    Synced,
    /// The guest stands still. What was written since the last sync is not known yet.
    Paused,
    /// The last sync was done; what is left is sent.
    FinalIteration,
    /// The destination has everything.
    Completed,
}

/// A migration and what it knows.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Migration {
    /// How far it has come.
    pub progress: MigrationPhase,
    /// Migrations that may still begin.
    pub remaining: u8,
    /// Syncs that may still be done.
    pub syncs: u8,
    /// The dirty bits.
    pub dirty: u8,
    /// How many of them are set, as counted.
    pub count: u8,
    /// Pages that were written since the kernel's notes were last read.
    pub written: u8,
    /// What is in each page at the destination, zeros at first; and so what each page was when it was sent.
    pub destination: Vec<u8>,
    /// What was in each page when somebody last looked, for [`Tracking::ContentAsSeen`].
    pub seen: Vec<u8>,
    /// The page whose bit was cleared and which is being read.
    pub taken: Option<usize>,
    /// A hint has spared the sending of a page.
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

    /// Clears a page's bit because of a hint.
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

/// What the migration may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Begins: the tracking notes writes from now on, every page is dirty, the guest is asked for hints.
    Begin,
    /// Clears a page's dirty bit, to send the page.
    Take(usize),
    /// Reads the page and sends it.
    Send,
    /// Ends the time of hints: a sync begins.
    CloseWindow,
    /// Reads the tracking and marks what was written.
    Sync,
    /// Asks for hints again, under a new id.
    OpenWindow,
    /// Has no more use for hints, while the guest runs on.
    SendDone,
    /// Pauses the guest.
    Pause,
    /// Nothing is left: the migration is complete, and DONE is said.
    Complete,
    /// The operator lets the source go on after a migration.
    Resume,
    /// Ends in the middle of it.
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
        // The count decides, as it does in the engine.
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

/// The guest runs; what the migration knew is forgotten.
fn end(instance: &Instance, state: &mut ModelState) {
    state.paused = false;
    state.migration = Migration {
        remaining: state.migration.remaining,
        ..Migration::idle(instance)
    };
}
