// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The driver's side of free page hinting.
//!
//! The driver *offers* blocks of free pages while a round runs, and *holds* the offered blocks
//! until the device says that it is done with them.

use super::super::command::{CommandId, HintRoundId};

/// Where the driver stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum State {
    /// No round since the device was last done; nothing is held.
    #[default]
    Idle,
    /// The start of this round was sent and blocks are being offered.
    Offering(HintRoundId),
    /// The stop of this round was sent; its blocks are held until the device is done.
    AwaitingDone(HintRoundId),
}

/// What happens to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Config space changed and shows this command id.
    ///
    /// To be fed only with what was read after a config change: QEMU's device shows STOP again as
    /// soon as it has seen the start of a round, without meaning the driver to stop.
    ConfigChanged(CommandId),
    /// There is no free block left that the driver may offer.
    Exhausted,
    /// The device was reset or is gone; nothing can be sent.
    Reset,
}

/// What the driver shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this id on the free page queue, and then offer free blocks.
    SendStart(HintRoundId),
    /// Offer the blocks that are still held from an earlier round again, before new ones.
    ///
    /// The new id may be the first of another migration, whose destination lacks those pages: DONE
    /// of the earlier one may have been overwritten in config space before the driver could read it.
    ReofferHinted,
    /// Offer no more, and send STOP on the free page queue.
    SendStop,
    /// Give every held block back to the guest, as soon as its buffer has come back.
    ReleaseHinted,
}

/// What the driver shall do, in this order: at most three things.
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
    /// The round whose blocks are being offered, if one runs.
    pub const fn offering(self) -> Option<HintRoundId> {
        match self {
            Self::Offering(id) => Some(id),
            Self::Idle | Self::AwaitingDone(_) => None,
        }
    }

    /// Takes an event; gives the next state and what to do.
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
            // The round that runs, or that has ended, still stands in config space.
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
