// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the model.

use std::collections::VecDeque;

use shared_abi::command::{CommandId, HintId};
use shared_abi::hinting;

use crate::instance::{Instance, Mutation};
use crate::migration::Migration;

/// The owner of a page.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PageState {
    /// The page is free, and its content does not matter.
    Free,
    /// The page belongs to the driver, which has hinted it.
    Hinted,
    /// The page belongs to the driver, which frees it when its buffer is used.
    ReleasePending,
    /// The page is in use, and its content must be preserved.
    Used,
}

/// A page of the guest.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Page {
    /// The owner of the page.
    pub state: PageState,
    /// The content of the page.
    pub value: u8,
}

/// A message on the free page queue.
///
/// A real free block or STOP does not name its hint round, and the device derives it from the order of messages. The
/// model stores the hint round that the driver meant, to check the device.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Message {
    /// The start of a hint round.
    Start(HintId),
    /// A free block of one page.
    FreeBlock {
        /// The page.
        page: usize,
        /// The hint round that the driver meant.
        hint_round: HintId,
    },
    /// The end of a hint round.
    Stop {
        /// The hint round that the driver meant.
        hint_round: HintId,
    },
}

/// Violations of rules that have happened.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Violations {
    /// R2: a STOP or a free block of one hint round counted for another.
    pub hint_rounds_mixed: bool,
    /// R8: a command id was issued while the driver still used it.
    pub id_reused: bool,
    /// R17: the device changed a page that did not belong to the driver.
    pub page_corrupted: bool,
}

/// One state of the model.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ModelState {
    /// The guest's pages.
    pub pages: Vec<Page>,
    /// Number of steps that the guest's kernel may still take.
    pub guest_steps: u8,
    /// How often the guest's driver may still be unloaded.
    pub resets: u8,
    /// Whether the guest is paused.
    pub paused: bool,
    /// The state machine of hinting in the driver.
    pub driver: hinting::driver::State,
    /// Hinted pages that the driver must reoffer before it offers free pages, one bit each.
    pub offer_again: u8,
    /// Whether the driver has yet to read config space after a change.
    pub config_changed: bool,
    /// The free page queue.
    pub queue: VecDeque<Message>,
    /// The state machine of hinting in the device.
    pub device: hinting::device::State,
    /// A page whose hint was applied, and which the device must zero before it returns the buffer.
    pub pending_discard: Option<usize>,
    /// The migration.
    pub migration: Migration,
    /// Violations of rules.
    pub violations: Violations,
}

impl ModelState {
    /// Returns the initial states: each number of pages in use, from none to all but one.
    ///
    /// The other pages are free, with the content of an earlier use.
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
            // The second command id is the first one after the wrap.
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

    /// Returns whether a buffer of this page is in flight.
    pub fn in_flight(&self, page: usize) -> bool {
        self.pending_discard == Some(page)
            || self.queue.iter().any(
                |message| matches!(message, Message::FreeBlock { page: of, .. } if *of == page),
            )
    }

    /// Passes `event` to the device's state machine, and records a change of config space.
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

    /// Frees the pages in [`PageState::ReleasePending`] whose buffers are used.
    pub(crate) fn settle_releases(&mut self) {
        for page in 0..self.pages.len() {
            if self.pages[page].state == PageState::ReleasePending && !self.in_flight(page) {
                self.pages[page].state = PageState::Free;
            }
        }
    }
}
