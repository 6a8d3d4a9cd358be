// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The state machine of free page hinting for the driver.
//!
//! The driver *offers* free blocks during a hint round. It keeps the offered blocks, the *hinted
//! blocks*, until the device shows DONE.

use super::super::command::{CommandId, HintRoundId};

/// The state of the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum State {
    /// No hint round since DONE or a reset. There are no hinted blocks.
    #[default]
    Idle,
    /// The start of this hint round was sent, and free blocks are offered.
    Offering(HintRoundId),
    /// The STOP of this hint round was sent. The driver keeps the hinted blocks until DONE.
    AwaitingDone(HintRoundId),
}

/// An event for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Configuration space changed and shows this command id.
    ///
    /// Only pass an id that was read after a configuration change. QEMU's device shows STOP again
    /// once it has seen the start of a hint round, although it does not want the driver to stop.
    ConfigChanged(CommandId),
    /// The driver has no more free blocks to offer.
    Exhausted,
    /// The device was reset or removed. Nothing can be sent.
    Reset,
}

/// An action of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this id on the free page queue, then offer free blocks.
    SendStart(HintRoundId),
    /// Offer the hinted blocks of earlier hint rounds again, before new free blocks.
    ///
    /// The new id may be the first of another migration, whose destination does not have these
    /// pages. The driver may have missed the DONE between them: the device may have replaced it in
    /// configuration space before the driver read it.
    ReofferHinted,
    /// Offer no more free blocks, and send STOP on the free page queue.
    SendStop,
    /// Return each hinted block to the guest, as soon as the device has used its buffer.
    ReleaseHinted,
}

/// Up to three actions of the driver, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Actions([Option<Action>; 3]);

impl Actions {
    const NONE: Self = Self([None; 3]);

    const fn one(a: Action) -> Self {
        Self([Some(a), None, None])
    }

    const fn two(a: Action, b: Action) -> Self {
        Self([Some(a), Some(b), None])
    }

    const fn three(a: Action, b: Action, c: Action) -> Self {
        Self([Some(a), Some(b), Some(c)])
    }
}

impl IntoIterator for Actions {
    type Item = Action;
    type IntoIter = core::iter::Flatten<core::array::IntoIter<Option<Action>, 3>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter().flatten()
    }
}

impl State {
    /// Returns the hint round for which free blocks are offered, if there is one.
    pub const fn offering(self) -> Option<HintRoundId> {
        match self {
            Self::Offering(id) => Some(id),
            Self::Idle | Self::AwaitingDone(_) => None,
        }
    }

    /// Takes an event, and returns the next state and the actions.
    #[must_use]
    pub const fn step(self, event: Event) -> (Self, Actions) {
        use Action::{ReleaseHinted, ReofferHinted, SendStart, SendStop};

        let command = match event {
            Event::Reset => return (Self::Idle, Actions::one(ReleaseHinted)),
            Event::Exhausted => {
                return match self {
                    Self::Offering(id) => (Self::AwaitingDone(id), Actions::one(SendStop)),
                    Self::Idle | Self::AwaitingDone(_) => (self, Actions::NONE),
                };
            }
            Event::ConfigChanged(command) => command,
        };
        match (self, command.hint_round()) {
            // Configuration space still shows the current hint round, or one that the driver has
            // stopped.
            (Self::Offering(now) | Self::AwaitingDone(now), Some(id))
                if now.number() == id.number() =>
            {
                (self, Actions::NONE)
            }
            (Self::Idle, Some(id)) => (Self::Offering(id), Actions::one(SendStart(id))),
            (Self::Offering(_), Some(id)) => (
                Self::Offering(id),
                Actions::three(SendStop, SendStart(id), ReofferHinted),
            ),
            (Self::AwaitingDone(_), Some(id)) => (
                Self::Offering(id),
                Actions::two(SendStart(id), ReofferHinted),
            ),
            (Self::Offering(id), None) => match command {
                CommandId::Done => (Self::Idle, Actions::two(SendStop, ReleaseHinted)),
                _ => (Self::AwaitingDone(id), Actions::one(SendStop)),
            },
            (Self::Idle | Self::AwaitingDone(_), None) => match command {
                CommandId::Done => (Self::Idle, Actions::one(ReleaseHinted)),
                _ => (self, Actions::NONE),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::command::HintId;
    use super::*;
    use std::vec::Vec;

    const A: CommandId = CommandId::Hint(HintId::FIRST);
    const B: CommandId = CommandId::Hint(HintId::FIRST.successor());

    fn run(events: &[Event]) -> (State, Vec<Action>) {
        let mut state = State::default();
        let mut all = Vec::new();
        for event in events {
            let (next, actions) = state.step(*event);
            state = next;
            all.extend(actions);
        }
        (state, all)
    }

    fn hint_round(command: CommandId) -> HintRoundId {
        command.hint_round().unwrap()
    }

    #[test]
    fn a_whole_round() {
        let (state, actions) = run(&[
            Event::ConfigChanged(A),
            Event::Exhausted,
            Event::ConfigChanged(A),
            Event::ConfigChanged(CommandId::Stop),
            Event::ConfigChanged(CommandId::Done),
        ]);
        assert_eq!(state, State::Idle);
        assert_eq!(
            actions,
            [
                Action::SendStart(hint_round(A)),
                Action::SendStop,
                Action::ReleaseHinted
            ]
        );
    }

    #[test]
    fn r2_a_new_round_ends_the_old_one_before_it_starts() {
        let (state, actions) = run(&[Event::ConfigChanged(A), Event::ConfigChanged(B)]);
        assert_eq!(state, State::Offering(hint_round(B)));
        assert_eq!(
            actions,
            [
                Action::SendStart(hint_round(A)),
                Action::SendStop,
                Action::SendStart(hint_round(B)),
                Action::ReofferHinted
            ]
        );
    }

    /// The specification: the driver should supply pages for every id of 2 or greater.
    #[test]
    fn a_device_that_counts_its_rounds_from_two_is_answered() {
        let two = CommandId::from_number(2);
        let (state, actions) = run(&[Event::ConfigChanged(two), Event::Exhausted]);
        assert_eq!(state, State::AwaitingDone(hint_round(two)));
        assert_eq!(
            actions,
            [Action::SendStart(hint_round(two)), Action::SendStop]
        );
    }

    #[test]
    fn r16_done_and_reset_release_in_every_state() {
        for state in [
            State::Idle,
            State::Offering(hint_round(A)),
            State::AwaitingDone(hint_round(A)),
        ] {
            for event in [Event::ConfigChanged(CommandId::Done), Event::Reset] {
                let (next, actions) = state.step(event);
                assert_eq!(next, State::Idle);
                assert_eq!(actions.into_iter().last(), Some(Action::ReleaseHinted));
            }
        }
    }
}
