// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest: its kernel, and its driver around the real state machine.

use shared_abi::command::{HintId, RoundId};
use shared_abi::hinting::{device, driver};

use crate::instance::{Driver, Instance};
use crate::world::{Message, State, World};

/// What the guest may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// The kernel gives a free page to somebody, who fills it; or somebody writes a page that he has.
    Write {
        /// The page.
        page: usize,
        /// What is in it then.
        value: u8,
    },
    /// The kernel gets a page back.
    Free(usize),
    /// The kernel wants a page that the driver holds.
    TakeFromDriver(usize),
    /// The driver reads config space.
    ReadConfig,
    /// The driver offers a page.
    Offer(usize),
    /// The driver has no more pages, or wants to keep the rest.
    Exhausted,
    /// The driver is unloaded.
    Unload,
}

pub(crate) fn steps(instance: &Instance, world: &World, mut step: impl FnMut(Step)) {
    let room = world.queue.len() < instance.queue;
    let offering = world.driver.offering().is_some();
    for (page, now) in world.pages.iter().enumerate() {
        if world.guest_steps > 0 {
            match now.state {
                // The very bytes that it had before are the interesting ones.
                State::Free => {
                    (0..instance.values).for_each(|value| step(Step::Write { page, value }))
                }
                State::Used => {
                    let others = (0..instance.values).filter(|value| *value != now.value);
                    others.for_each(|value| step(Step::Write { page, value }));
                    step(Step::Free(page));
                }
                State::Held if may_take(instance, world, page) => step(Step::TakeFromDriver(page)),
                State::Held | State::Releasing => {}
            }
        }
        if offering && room && offerable(world, page) {
            step(Step::Offer(page));
        }
    }
    if world.config_changed && room {
        step(Step::ReadConfig);
    }
    if offering && room {
        step(Step::Exhausted);
    }
    if world.resets > 0 && world.in_hand.is_none() {
        step(Step::Unload);
    }
}

/// What the driver holds and was told to offer again comes before what is free.
fn offerable(world: &World, page: usize) -> bool {
    match world.pages[page].state {
        State::Free => world.offer_again == 0,
        State::Held => world.offer_again & (1 << page) != 0 && !world.in_flight(page),
        State::Used | State::Releasing => false,
    }
}

fn may_take(instance: &Instance, world: &World, page: usize) -> bool {
    match instance.driver {
        Driver::Owning => !world.in_flight(page),
        Driver::Reusing => true,
    }
}

pub(crate) fn take(instance: &Instance, world: &mut World, step: Step) {
    match step {
        Step::Write { page, value } => {
            world.guest_steps -= 1;
            write(world, page, value);
            world.pages[page].state = State::Used;
        }
        Step::Free(page) => {
            world.guest_steps -= 1;
            world.pages[page].state = State::Free;
        }
        Step::TakeFromDriver(page) => {
            world.guest_steps -= 1;
            world.offer_again &= !(1 << page);
            match instance.driver {
                // Somebody may rely on the zeros.
                Driver::Owning => {
                    write(world, page, 0);
                    world.pages[page].state = State::Used;
                }
                Driver::Reusing => world.pages[page].state = State::Free,
            }
        }
        Step::ReadConfig => {
            world.config_changed = false;
            let command = world.device.command();
            tell_driver(instance, world, driver::Event::Config(command));
        }
        Step::Offer(page) => {
            let round = world.driver.offering().expect("the driver offers");
            world.offer_again &= !(1 << page);
            world.pages[page].state = State::Held;
            let round = hint_id(round);
            world.queue.push_back(Message::Block { page, round });
        }
        Step::Exhausted => tell_driver(instance, world, driver::Event::Exhausted),
        Step::Unload => {
            world.resets -= 1;
            world.queue.clear();
            tell_driver(instance, world, driver::Event::Reset);
            world.tell_device(device::Event::Reset);
            // The next one reads what is there.
            world.config_changed = true;
        }
    }
}

fn write(world: &mut World, page: usize, value: u8) {
    world.pages[page].value = value;
    world.migration.written |= 1 << page;
}

fn tell_driver(instance: &Instance, world: &mut World, event: driver::Event) {
    let before = world.driver;
    let (next, actions) = before.step(event);
    world.driver = next;
    for action in actions {
        match action {
            driver::Action::SendStart(id) => world.queue.push_back(Message::Start(hint_id(id))),
            driver::Action::SendStop => {
                let round = hint_id(before.offering().expect("a STOP has a round"));
                world.queue.push_back(Message::Stop { round });
            }
            driver::Action::OfferHeld => {
                let held = |page: &usize| world.pages[*page].state == State::Held;
                world.offer_again = (0..world.pages.len())
                    .filter(held)
                    .fold(0, |mask, page| mask | 1 << page);
            }
            driver::Action::ReleaseHeld => {
                world.offer_again = 0;
                for page in &mut world.pages {
                    if page.state == State::Held {
                        page.state = match instance.driver {
                            Driver::Owning => State::Releasing,
                            Driver::Reusing => State::Free,
                        };
                    }
                }
                world.settle_releases();
            }
        }
    }
}

fn hint_id(round: RoundId) -> HintId {
    HintId::new(round.number()).expect("the device issues ids of the range for hinting")
}
