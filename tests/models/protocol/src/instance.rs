// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The parameters of a model, and its steps.

use stateright::{Model, Property};

use crate::state::ModelState;
use crate::{device, guest, migration, properties};

/// The driver of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Driver {
    /// The driver of this project. It keeps a hinted block until the device has used its buffer. It zeroes a hinted
    /// block that is reclaimed before DONE.
    Owning,
    /// The driver of Linux. The kernel may reuse a hinted block before the device has processed the hint.
    Reusing,
}

/// How the migration tracks writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tracking {
    /// The kernel records each write. Reading and clearing the records is one step.
    SoftDirty,
    /// A page is dirty if its content differs from the destination's.
    ContentAsSent,
    /// A page is dirty if its content differs from its content at the last dirty sync or sending, whichever was later.
    ContentAsSeen,
}

/// A deliberate fault, which the model must find.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mutation {
    /// No fault.
    None,
    /// R2: the device treats any start as the start of the hint round that it requested.
    AcceptAnyStart,
    /// R2: the device treats any STOP as the STOP of the hint round that it requested.
    AcceptAnyStop,
    /// R6: a dirty sync does not invalidate hints, and no new command id is issued after it.
    HintsOutliveSync,
    /// R8: each migration starts with the first command id again.
    ReuseIds,
    /// R12: clearing a bit decrements the dirty count even if the bit was clear already.
    CountClearBits,
    /// R16: a cancelled migration reports STOP instead of DONE.
    CancelWithoutDone,
}

/// The parameters of one model.
#[derive(Clone, Copy, Debug)]
pub struct Instance {
    /// Number of guest pages.
    pub pages: usize,
    /// Number of different page contents. Content 0 is a zero page, which is also how a hole reads.
    pub values: u8,
    /// How often the guest's kernel may allocate, write, free or reclaim a page, in total.
    pub guest_steps: u8,
    /// Capacity of the free page queue, in messages.
    pub queue: usize,
    /// Number of consecutive migrations.
    pub migrations: u8,
    /// Number of dirty syncs of each migration, without the final one.
    pub syncs: u8,
    /// How often the driver may be unloaded.
    pub resets: u8,
    /// The driver.
    pub driver: Driver,
    /// The write tracking.
    pub tracking: Tracking,
    /// Whether the device zeroes a hinted page before it returns the buffer.
    pub discards: bool,
    /// The deliberate fault.
    pub mutation: Mutation,
}

impl Instance {
    /// Creates an instance with two pages and two migrations.
    ///
    /// Each migration has at most two iterations and a final one, and can be cancelled.
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

    /// Returns the instance with the fault `mutation`.
    #[must_use]
    pub const fn with_mutation(mut self, mutation: Mutation) -> Self {
        self.mutation = mutation;
        self
    }

    /// Returns the instance with a device that zeroes hinted pages.
    #[must_use]
    pub const fn with_discard(mut self) -> Self {
        self.discards = true;
        self
    }
}

/// A step of the model.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// A step of the guest's kernel or driver. Not possible while the guest is paused.
    Guest(guest::Step),
    /// A step of the device. Possible while the guest is paused.
    Device(device::Step),
    /// A step of the migration.
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
