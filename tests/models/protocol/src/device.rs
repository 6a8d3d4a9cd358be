// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device: what it takes from the queue goes through the real state machine, and what that lets through
//! clears a dirty bit.

use shared_abi::command::{CommandId, HintId};
use shared_abi::hinting::device::{Action, Event};

use crate::instance::{Broken, Instance};
use crate::world::{Message, State, World};

/// What the device may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// It takes the next message. A block that is not to be made zero is returned at once.
    Take,
    /// It makes the page in its hand zero and returns the buffer.
    DiscardAndReturn,
}

pub(crate) fn steps(world: &World, mut step: impl FnMut(Step)) {
    if world.in_hand.is_some() {
        step(Step::DiscardAndReturn);
    } else if !world.queue.is_empty() {
        step(Step::Take);
    }
}

pub(crate) fn take(instance: &Instance, world: &mut World, step: Step) {
    match step {
        Step::Take => {
            if let Some(message) = world.queue.pop_front() {
                comes(instance, world, message);
            }
        }
        Step::DiscardAndReturn => {
            if let Some(page) = world.in_hand.take() {
                let drivers = matches!(world.pages[page].state, State::Held | State::Releasing);
                world.sins.page_harmed |= !drivers;
                world.pages[page].value = 0;
            }
        }
    }
    world.settle_releases();
}

fn comes(instance: &Instance, world: &mut World, message: Message) {
    let wanted = world.device.phase().id();
    match message {
        Message::Start(id) => {
            let id = match (instance.broken, wanted) {
                (Broken::AnyStartIsTheWantedOne, Some(wanted)) => wanted,
                _ => id,
            };
            world.tell_device(start(id));
        }
        Message::Stop { round } => {
            if let (Broken::AnyStopIsTheWantedOne, Some(wanted)) = (instance.broken, wanted) {
                world.tell_device(start(wanted));
            }
            let action = world.tell_device(Event::Command(CommandId::Stop));
            if let Some(Action::RoundFinished(id)) = action {
                world.sins.rounds_mixed |= id != round;
            }
        }
        Message::Block { page, round } => {
            if let Some(Action::UseBlock(id)) = world.tell_device(Event::Block) {
                world.sins.rounds_mixed |= id != round;
                world.migration.hinted(instance, page);
                if instance.discards {
                    world.in_hand = Some(page);
                }
            }
        }
    }
}

fn start(id: HintId) -> Event {
    Event::Command(CommandId::Hint(id))
}
