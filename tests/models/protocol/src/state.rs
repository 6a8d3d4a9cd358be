// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Everything that there is, at one moment.

use std::collections::VecDeque;

use shared_abi::command::{CommandId, HintId};
use shared_abi::hinting;

use crate::instance::{Instance, Mutation};
use crate::migration::Migration;

/// To whom a page belongs.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PageState {
    /// To nobody: what is in it matters to nobody.
    Free,
    /// To the driver, which has hinted it.
    Hinted,
    /// To the driver, which is to give it back as soon as its buffer has come back.
    ReleasePending,
    /// To somebody who has written it, and will miss what is in it.
    Used,
}

/// A page of the guest.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Page {
    /// To whom it belongs.
    pub state: PageState,
    /// What is in it.
    pub value: u8,
}

/// On the free page queue. What a block and a STOP were meant for is not in the real message: the device has
/// to guess it right, and the model knows.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Message {
    /// A round starts.
    Start(HintId),
    /// A page is free.
    FreeBlock {
        /// The page.
        page: usize,
        /// The round that the driver meant.
        hint_round: HintId,
    },
    /// A round ends.
    Stop {
        /// The round that the driver meant.
        hint_round: HintId,
    },
}

/// What must never happen, and did.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Violations {
    /// R2: a STOP or a block of one round counted for another.
    pub hint_rounds_mixed: bool,
    /// R8: an id was issued while the driver could still speak of it.
    pub id_reused: bool,
    /// R17: the device changed a page that was not the driver's.
    pub page_corrupted: bool,
}

/// One state of the model.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ModelState {
    /// The guest's pages.
    pub pages: Vec<Page>,
    /// Steps that its kernel may still take.
    pub guest_steps: u8,
    /// How often its driver may still be unloaded.
    pub resets: u8,
    /// The guest stands still.
    pub paused: bool,
    /// The driver's side of hinting.
    pub driver: hinting::driver::State,
    /// Pages that the driver is to offer again before others, a bit each.
    pub offer_again: u8,
    /// The driver has not yet seen what config space shows.
    pub config_changed: bool,
    /// From the driver to the device.
    pub queue: VecDeque<Message>,
    /// The device's side of hinting.
    pub device: hinting::device::State,
    /// A page whose hint was used, and which the device is to make zero before it returns the buffer.
    pub pending_discard: Option<usize>,
    /// The migration.
    pub migration: Migration,
    /// What went wrong.
    pub violations: Violations,
}

impl ModelState {
    /// The states in which everything begins: each page in use, or free with the bytes of an earlier use.
    pub(crate) fn initial_states(instance: &Instance) -> Vec<Self> {
        let used = |count: usize| {
            let page = |number| Page {
                state: if number < count {
                    PageState::Used
                } else {
                    PageState::Free
                },
                value: 1,
            };
            (0..instance.pages).map(page).collect()
        };
        let state = |pages| Self {
            pages,
            guest_steps: instance.guest_steps,
            resets: instance.resets,
            paused: false,
            driver: hinting::driver::State::default(),
            offer_again: 0,
            config_changed: false,
            queue: VecDeque::new(),
            // So that the second id is the one after the wrap.
            device: hinting::device::State::with_next_id(match instance.mutation {
                Mutation::ReuseIds => HintId::FIRST,
                _ => HintId::LAST,
            }),
            pending_discard: None,
            migration: Migration::idle(instance),
            violations: Violations::default(),
        };
        (0..instance.pages)
            .map(|count| state(used(count)))
            .collect()
    }

    /// Whether the device has a buffer of this page that it has not returned.
    pub fn in_flight(&self, page: usize) -> bool {
        self.pending_discard == Some(page)
            || self.queue.iter().any(
                |message| matches!(message, Message::FreeBlock { page: of, .. } if *of == page),
            )
    }

    /// Tells the device's machine, and passes on what it says about config space.
    pub(crate) fn notify_device(
        &mut self,
        event: hinting::device::Event,
    ) -> Option<hinting::device::Action> {
        let before = self.device.command();
        let (next, action) = self.device.step(event);
        self.device = next;
        let shown = self.device.command();
        if shown != before {
            self.config_changed = true;
            if let CommandId::Hint(id) = shown {
                self.violations.id_reused |= self.driver_uses_id(id);
            }
        }
        action
    }

    fn driver_uses_id(&self, id: HintId) -> bool {
        self.driver.offering() == Some(id.into())
            || self.queue.iter().any(|message| match *message {
                Message::Start(hint_round)
                | Message::Stop { hint_round }
                | Message::FreeBlock { hint_round, .. } => hint_round == id,
            })
    }

    /// Gives back what the driver was to give back and the device has returned.
    pub(crate) fn settle_releases(&mut self) {
        for page in 0..self.pages.len() {
            if self.pages[page].state == PageState::ReleasePending && !self.in_flight(page) {
                self.pages[page].state = PageState::Free;
            }
        }
    }
}
