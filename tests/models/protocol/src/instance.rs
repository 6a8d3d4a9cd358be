// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is to be explored.

use stateright::{Model, Property};

use crate::state::ModelState;
use crate::{device, guest, migration, properties};

/// Which driver the guest has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Driver {
    /// It gives a block to nobody before the device has returned the block's buffer, and what it gives away
    /// before DONE it makes zero.
    Owning,
    /// As Linux's own: a held block may be somebody's again before the device has seen the hint.
    Reusing,
}

/// How the migration learns which pages were written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tracking {
    /// The kernel notes each write; reading the notes and clearing them is one step.
    SoftDirty,
    /// A page is dirty when it differs from what the destination has.
    ContentAsSent,
    /// A page is dirty when it differs from what it was when somebody last looked, sent or not.
    ContentAsSeen,
}

/// A mistake that is made on purpose.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mutation {
    /// None.
    None,
    /// R2: whatever round the driver starts is taken for the one that is wanted.
    AcceptAnyStart,
    /// R2: whatever round the driver stops is taken for the one that is wanted.
    AcceptAnyStop,
    /// R6: a sync does not end the time of hints, and no new id is issued after it.
    HintsOutliveSync,
    /// R8: the ids of each migration begin at the first one again.
    ReuseIds,
    /// R12: clearing a bit lowers the dirty count, also when the bit was clear already.
    CountClearBits,
    /// R16: a cancelled migration says STOP, and not DONE.
    CancelWithoutDone,
}

/// One small world and what may happen in it.
#[derive(Clone, Copy, Debug)]
pub struct Instance {
    /// The guest's pages.
    pub pages: usize,
    /// Pages hold the values below this; 0 stands for zeros, which is also what a hole is.
    pub values: u8,
    /// How often the guest's kernel may allocate, write, free or take a page from the driver.
    pub guest_steps: u8,
    /// Messages on the free page queue before the driver has to wait.
    pub queue: usize,
    /// Migrations, one after the other.
    pub migrations: u8,
    /// Syncs of each migration, without the last one.
    pub syncs: u8,
    /// How often the driver may be unloaded.
    pub resets: u8,
    /// The driver.
    pub driver: Driver,
    /// The tracking.
    pub tracking: Tracking,
    /// Whether the device makes a hinted page zero before it returns the buffer.
    pub discards: bool,
    /// What is wrong.
    pub mutation: Mutation,
}

impl Instance {
    /// Two pages, two rounds and a last one, and a migration that may be cancelled and followed by another.
    pub const fn new(driver: Driver, tracking: Tracking) -> Self {
        Self {
            pages: 2,
            values: 2,
            guest_steps: 3,
            queue: 3,
            migrations: 2,
            syncs: 1,
            resets: 0,
            driver,
            tracking,
            discards: false,
            mutation: Mutation::None,
        }
    }

    /// With `mutation`.
    #[must_use]
    pub const fn with_mutation(mut self, mutation: Mutation) -> Self {
        self.mutation = mutation;
        self
    }

    /// With a device that makes hinted pages zero.
    #[must_use]
    pub const fn with_discard(mut self) -> Self {
        self.discards = true;
        self
    }
}

/// A step of somebody.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// The guest's kernel or driver, which stand still while the guest is paused.
    Guest(guest::Step),
    /// The device, which does not.
    Device(device::Step),
    /// The migration.
    Migration(migration::Step),
}

impl Model for Instance {
    type State = ModelState;
    type Action = Step;

    fn init_states(&self) -> Vec<ModelState> {
        ModelState::initial_states(self)
    }

    fn actions(&self, state: &ModelState, steps: &mut Vec<Step>) {
        if !state.paused {
            guest::enabled_steps(self, state, |step| steps.push(Step::Guest(step)));
        }
        device::enabled_steps(state, |step| steps.push(Step::Device(step)));
        migration::enabled_steps(self, state, |step| steps.push(Step::Migration(step)));
    }

    fn next_state(&self, state: &ModelState, step: Step) -> Option<ModelState> {
        let mut next = state.clone();
        match step {
            Step::Guest(step) => guest::apply(self, &mut next, step),
            Step::Device(step) => device::apply(self, &mut next, step),
            Step::Migration(step) => migration::apply(self, &mut next, step),
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
