// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device: it passes messages from the queue to the real state machine. A free block that the state machine accepts
//! clears a dirty bit.

use shared_abi::command::{CommandId, HintId};
use shared_abi::hinting::device::{Action, Event};

use crate::instance::{Instance, Mutation};
use crate::state::{Message, ModelState, PageState};

/// A step of the device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Processes the next message. Returns a free block at once, unless it must be zeroed.
    TakeBuffer,
    /// Zeroes the pending page and returns its buffer.
    DiscardAndReturn,
}

pub(crate) fn enabled_steps(state: &ModelState, mut step: impl FnMut(Step)) {
    if state.pending_discard.is_some() {
        step(Step::DiscardAndReturn);
    } else if !state.queue.is_empty() {
        step(Step::TakeBuffer);
    }
}

pub(crate) fn apply(instance: &Instance, state: &mut ModelState, step: Step) {
    match step {
        Step::TakeBuffer => {
            if let Some(message) = state.queue.pop_front() {
                handle_message(instance, state, message);
            }
        }
        Step::DiscardAndReturn => {
            if let Some(page) = state.pending_discard.take() {
                let drivers = matches!(
                    state.pages[page].state,
                    PageState::Hinted | PageState::ReleasePending
                );
                state.violations.page_corrupted |= !drivers;
                state.pages[page].value = 0;
            }
        }
    }
    state.settle_releases();
}

fn handle_message(instance: &Instance, state: &mut ModelState, message: Message) {
    let wanted = state.device.phase().id();
    match message {
        Message::Start(id) => {
            let id = match (instance.mutation, wanted) {
                (Mutation::AcceptAnyStart, Some(wanted)) => wanted,
                _ => id,
            };
            state.notify_device(start_event(id));
        }
        Message::Stop { hint_round } => {
            if let (Mutation::AcceptAnyStop, Some(wanted)) = (instance.mutation, wanted) {
                state.notify_device(start_event(wanted));
            }
            let action = state.notify_device(Event::Command(CommandId::Stop));
            if let Some(Action::HintRoundFinished(id)) = action {
                state.violations.hint_rounds_mixed |= id != hint_round;
            }
        }
        Message::FreeBlock { page, hint_round } => {
            if let Some(Action::UseFreeBlock(id)) = state.notify_device(Event::FreeBlock) {
                state.violations.hint_rounds_mixed |= id != hint_round;
                state.migration.hinted(instance, page);
                if instance.discards {
                    state.pending_discard = Some(page);
                }
            }
        }
    }
}

fn start_event(id: HintId) -> Event {
    Event::Command(CommandId::Hint(id))
}
