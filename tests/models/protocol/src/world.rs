// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Everything that there is, at one moment.

use std::collections::VecDeque;

use shared_abi::command::{CommandId, HintId};
use shared_abi::hinting;

use crate::instance::{Broken, Instance};
use crate::migration::Migration;

/// To whom a page belongs.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum State {
    /// To nobody: what is in it matters to nobody.
    Free,
    /// To the driver, which has hinted it.
    Held,
    /// To the driver, which is to give it back as soon as its buffer has come back.
    Releasing,
    /// To somebody who has written it, and will miss what is in it.
    Used,
}

/// A page of the guest.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Page {
    /// To whom it belongs.
    pub state: State,
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
    Block {
        /// The page.
        page: usize,
        /// The round that the driver meant.
        round: HintId,
    },
    /// A round ends.
    Stop {
        /// The round that the driver meant.
        round: HintId,
    },
}

/// What must never happen, and did.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Sins {
    /// R2: a STOP or a block of one round counted for another.
    pub rounds_mixed: bool,
    /// R8: an id was issued while the driver could still speak of it.
    pub id_reused: bool,
    /// R17: the device changed a page that was not the driver's.
    pub page_harmed: bool,
}

/// One state of the model.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct World {
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
    pub in_hand: Option<usize>,
    /// The migration.
    pub migration: Migration,
    /// What went wrong.
    pub sins: Sins,
}

impl World {
    /// The states in which everything begins: each page in use, or free with the bytes of an earlier use.
    pub(crate) fn beginnings(instance: &Instance) -> Vec<Self> {
        let used = |count: usize| {
            let page = |number| Page {
                state: if number < count {
                    State::Used
                } else {
                    State::Free
                },
                value: 1,
            };
            (0..instance.pages).map(page).collect()
        };
        let world = |pages| Self {
            pages,
            guest_steps: instance.guest_steps,
            resets: instance.resets,
            paused: false,
            driver: hinting::driver::State::default(),
            offer_again: 0,
            config_changed: false,
            queue: VecDeque::new(),
            // So that the second id is the one after the wrap.
            device: hinting::device::State::with_next_id(match instance.broken {
                Broken::IdsBeginAgain => HintId::FIRST,
                _ => HintId::LAST,
            }),
            in_hand: None,
            migration: Migration::none(instance),
            sins: Sins::default(),
        };
        (0..instance.pages)
            .map(|count| world(used(count)))
            .collect()
    }

    /// Whether the device has a buffer of this page that it has not returned.
    pub fn in_flight(&self, page: usize) -> bool {
        self.in_hand == Some(page)
            || self
                .queue
                .iter()
                .any(|message| matches!(message, Message::Block { page: of, .. } if *of == page))
    }

    /// Tells the device's machine, and passes on what it says about config space.
    pub(crate) fn tell_device(
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
                self.sins.id_reused |= self.driver_may_speak_of(id);
            }
        }
        action
    }

    fn driver_may_speak_of(&self, id: HintId) -> bool {
        self.driver.offering() == Some(id.into())
            || self.queue.iter().any(|message| match *message {
                Message::Start(round) | Message::Stop { round } | Message::Block { round, .. } => {
                    round == id
                }
            })
    }

    /// Gives back what the driver was to give back and the device has returned.
    pub(crate) fn settle_releases(&mut self) {
        for page in 0..self.pages.len() {
            if self.pages[page].state == State::Releasing && !self.in_flight(page) {
                self.pages[page].state = State::Free;
            }
        }
    }
}
