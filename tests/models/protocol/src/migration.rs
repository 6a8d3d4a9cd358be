// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The migration: rounds, the pause, the end.

use shared_abi::command::HintId;
use shared_abi::hinting::device;

use crate::instance::{Broken, Instance, Tracking};
use crate::world::World;

/// How far a migration has come.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Progress {
    /// None runs; the last one, if there was one, was cancelled, or its source goes on.
    None,
    /// A round: pages are sent, and hints may come meanwhile.
    Round,
    /// Hints are over for good, DONE is said, and the guest still runs.
    BeforeTheSwitch,
    /// Hints are dead, and the tracking is to be read.
    Syncing,
    /// It was read; a new round may begin.
    Synced,
    /// The guest stands still. What was written since the last sync is not known yet.
    Paused,
    /// The last sync was done; what is left is sent.
    Rest,
    /// The destination has everything.
    Completed,
}

/// A migration and what it knows.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Migration {
    /// How far it has come.
    pub progress: Progress,
    /// Migrations that may still begin.
    pub left: u8,
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
    pub spared: bool,
}

impl Migration {
    pub(crate) fn none(instance: &Instance) -> Self {
        Self {
            progress: Progress::None,
            left: instance.migrations,
            syncs: 0,
            dirty: 0,
            count: 0,
            written: 0,
            destination: vec![0; instance.pages],
            seen: vec![0; instance.pages],
            taken: None,
            spared: false,
        }
    }

    /// Clears a page's bit because of a hint.
    pub(crate) fn hinted(&mut self, instance: &Instance, page: usize) {
        self.spared |= self.dirty & (1 << page) != 0;
        self.clear(instance, page);
    }

    fn clear(&mut self, instance: &Instance, page: usize) {
        let was_set = self.dirty & (1 << page) != 0;
        self.dirty &= !(1 << page);
        if was_set || instance.broken == Broken::ClearBitsAreCounted {
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
    SayDone,
    /// Pauses the guest.
    Pause,
    /// Nothing is left: the migration is complete, and DONE is said.
    Complete,
    /// The operator lets the source go on after a migration.
    Resume,
    /// Ends in the middle of it.
    Cancel,
}

pub(crate) fn steps(instance: &Instance, world: &World, mut step: impl FnMut(Step)) {
    let migration = &world.migration;
    let idle_hands = migration.taken.is_none();
    let sends = matches!(
        migration.progress,
        Progress::Round | Progress::BeforeTheSwitch | Progress::Rest
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
        Progress::None if migration.left > 0 => step(Step::Begin),
        Progress::None => {}
        Progress::Round if idle_hands => {
            if migration.syncs > 0 {
                step(Step::CloseWindow);
            }
            step(Step::SayDone);
            step(Step::Pause);
        }
        Progress::BeforeTheSwitch if idle_hands => step(Step::Pause),
        Progress::Round | Progress::BeforeTheSwitch => {}
        Progress::Paused => step(Step::CloseWindow),
        Progress::Syncing => step(Step::Sync),
        Progress::Synced => step(Step::OpenWindow),
        // The count decides, as it does in the engine.
        Progress::Rest if idle_hands && migration.count == 0 => step(Step::Complete),
        Progress::Rest => {}
        Progress::Completed => step(Step::Resume),
    }
    if !matches!(migration.progress, Progress::None | Progress::Completed) {
        step(Step::Cancel);
    }
}

pub(crate) fn take(instance: &Instance, world: &mut World, step: Step) {
    match step {
        Step::Begin => begin(instance, world),
        Step::Take(page) => {
            world.migration.clear(instance, page);
            world.migration.taken = Some(page);
        }
        Step::Send => {
            if let Some(page) = world.migration.taken.take() {
                let value = world.pages[page].value;
                world.migration.destination[page] = value;
                if instance.tracking == Tracking::ContentAsSeen {
                    world.migration.seen[page] = value;
                }
            }
        }
        Step::CloseWindow => {
            if instance.broken != Broken::HintsOutliveTheSync {
                world.tell_device(device::Event::SyncStarts);
            }
            world.migration.progress = Progress::Syncing;
        }
        Step::Sync => sync(instance, world),
        Step::OpenWindow => {
            if instance.broken != Broken::HintsOutliveTheSync {
                world.tell_device(device::Event::SyncEnds);
            }
            world.migration.syncs -= 1;
            world.migration.progress = Progress::Round;
        }
        Step::SayDone => {
            world.tell_device(device::Event::Done);
            world.migration.progress = Progress::BeforeTheSwitch;
        }
        Step::Pause => {
            world.paused = true;
            world.migration.progress = Progress::Paused;
        }
        Step::Complete => {
            world.tell_device(device::Event::Done);
            world.migration.progress = Progress::Completed;
        }
        Step::Resume => end(instance, world),
        Step::Cancel => {
            world.tell_device(match instance.broken {
                Broken::CancelledWithoutDone => device::Event::Stop,
                _ => device::Event::Done,
            });
            end(instance, world);
        }
    }
}

fn begin(instance: &Instance, world: &mut World) {
    if instance.broken == Broken::IdsBeginAgain {
        world.device = device::State::with_next_id(HintId::FIRST);
    }
    let left = world.migration.left - 1;
    let values: Vec<u8> = world.pages.iter().map(|page| page.value).collect();
    world.migration = Migration {
        progress: Progress::Round,
        left,
        syncs: instance.syncs,
        ..Migration::none(instance)
    };
    if instance.tracking == Tracking::ContentAsSeen {
        world.migration.seen = values;
    }
    (0..instance.pages).for_each(|page| world.migration.mark(page));
    world.tell_device(device::Event::Start);
}

fn sync(instance: &Instance, world: &mut World) {
    let migration = &mut world.migration;
    for (page, now) in world.pages.iter().enumerate() {
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
    migration.progress = if world.paused {
        Progress::Rest
    } else {
        Progress::Synced
    };
}

/// The guest runs; what the migration knew is forgotten.
fn end(instance: &Instance, world: &mut World) {
    world.paused = false;
    world.migration = Migration {
        left: world.migration.left,
        ..Migration::none(instance)
    };
}
