// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest: a model of its kernel, and of its driver around the real state machine.

use shared_abi::command::{HintId, HintRoundId};
use shared_abi::hinting::{device, driver};

use crate::instance::{Driver, Instance};
use crate::state::{Message, ModelState, PageState};

/// A step of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Writes a page. A free page is allocated first.
    Write {
        /// The page.
        page: usize,
        /// The new content.
        value: u8,
    },
    /// Frees a page in use.
    Free(usize),
    /// The kernel reclaims a hinted page.
    Reclaim(usize),
    /// The driver reads config space.
    ReadConfig,
    /// The driver offers a page on the free page queue.
    Offer(usize),
    /// The driver has no more free pages, or keeps the rest, and ends the hint round.
    Exhausted,
    /// The driver is unloaded.
    Unload,
}

pub(crate) fn enabled_steps(instance: &Instance, state: &ModelState, mut step: impl FnMut(Step)) {
    let room = state.queue.len() < instance.queue;
    let offering = state.driver.offering().is_some();
    for (page, now) in state.pages.iter().enumerate() {
        if state.guest_steps > 0 {
            match now.state {
                // The old content is included: a write of the same content is the interesting case.
                PageState::Free => {
                    (0..instance.values).for_each(|value| step(Step::Write { page, value }))
                }
                PageState::Used => {
                    let others = (0..instance.values).filter(|value| *value != now.value);
                    others.for_each(|value| step(Step::Write { page, value }));
                    step(Step::Free(page));
                }
                PageState::Hinted if can_reclaim(instance, state, page) => {
                    step(Step::Reclaim(page))
                }
                PageState::Hinted | PageState::ReleasePending => {}
            }
        }
        if offering && room && offerable(state, page) {
            step(Step::Offer(page));
        }
    }
    if state.config_changed && room {
        step(Step::ReadConfig);
    }
    if offering && room {
        step(Step::Exhausted);
    }
    if state.resets > 0 && state.pending_discard.is_none() {
        step(Step::Unload);
    }
}

/// Returns whether the driver may offer the page. Hinted pages that it must reoffer come before free pages.
fn offerable(state: &ModelState, page: usize) -> bool {
    match state.pages[page].state {
        PageState::Free => state.offer_again == 0,
        PageState::Hinted => state.offer_again & (1 << page) != 0 && !state.in_flight(page),
        PageState::Used | PageState::ReleasePending => false,
    }
}

fn can_reclaim(instance: &Instance, state: &ModelState, page: usize) -> bool {
    match instance.driver {
        Driver::Owning => !state.in_flight(page),
        Driver::Reusing => true,
    }
}

pub(crate) fn apply(instance: &Instance, state: &mut ModelState, step: Step) {
    match step {
        Step::Write { page, value } => {
            state.guest_steps -= 1;
            write(state, page, value);
            state.pages[page].state = PageState::Used;
        }
        Step::Free(page) => {
            state.guest_steps -= 1;
            state.pages[page].state = PageState::Free;
        }
        Step::Reclaim(page) => {
            state.guest_steps -= 1;
            state.offer_again &= !(1 << page);
            match instance.driver {
                // The new owner may rely on the zeros.
                Driver::Owning => {
                    write(state, page, 0);
                    state.pages[page].state = PageState::Used;
                }
                Driver::Reusing => state.pages[page].state = PageState::Free,
            }
        }
        Step::ReadConfig => {
            state.config_changed = false;
            let command = state.device.command();
            notify_driver(instance, state, driver::Event::ConfigChanged(command));
        }
        Step::Offer(page) => {
            let hint_round = state.driver.offering().expect("the driver offers");
            state.offer_again &= !(1 << page);
            state.pages[page].state = PageState::Hinted;
            let hint_round = hint_id(hint_round);
            state
                .queue
                .push_back(Message::FreeBlock { page, hint_round });
        }
        Step::Exhausted => notify_driver(instance, state, driver::Event::Exhausted),
        Step::Unload => {
            state.resets -= 1;
            state.queue.clear();
            notify_driver(instance, state, driver::Event::Reset);
            state.notify_device(device::Event::Reset);
            // The next driver reads config space.
            state.config_changed = true;
        }
    }
}

fn write(state: &mut ModelState, page: usize, value: u8) {
    state.pages[page].value = value;
    state.migration.written |= 1 << page;
}

fn notify_driver(instance: &Instance, state: &mut ModelState, event: driver::Event) {
    let before = state.driver;
    let (next, actions) = before.step(event);
    state.driver = next;
    for action in actions {
        match action {
            driver::Action::SendStart(id) => state.queue.push_back(Message::Start(hint_id(id))),
            driver::Action::SendStop => {
                let hint_round = hint_id(before.offering().expect("a STOP has a round"));
                state.queue.push_back(Message::Stop { hint_round });
            }
            driver::Action::ReofferHinted => {
                let hinted = |page: &usize| state.pages[*page].state == PageState::Hinted;
                state.offer_again = (0..state.pages.len())
                    .filter(hinted)
                    .fold(0, |mask, page| mask | 1 << page);
            }
            driver::Action::ReleaseHinted => {
                state.offer_again = 0;
                for page in &mut state.pages {
                    if page.state == PageState::Hinted {
                        page.state = match instance.driver {
                            Driver::Owning => PageState::ReleasePending,
                            Driver::Reusing => PageState::Free,
                        };
                    }
                }
                state.settle_releases();
            }
        }
    }
}

fn hint_id(hint_round: HintRoundId) -> HintId {
    HintId::new(hint_round.number()).expect("the device issues ids of the range for hinting")
}
