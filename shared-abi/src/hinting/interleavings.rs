// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Both machines together, in any order of events.
//!
//! The world between them is modelled as it is: config space is one word that may change several
//! times before the driver looks at it, and the free page queue is a sequence that arrives late but
//! in order. Every block that the driver offers carries the *epoch* in which it was offered, counted
//! up by every sync, start, stop and reset, and every STOP the round that it was meant for: the truth
//! that the machines have to guess right. Now and then a driver lies.

use super::super::command::{CommandId, HintId, RoundId};
use super::{device, driver};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::vec::Vec;

#[derive(Clone, Copy, Debug)]
enum Step {
    Start,
    Stop,
    Done,
    SyncStarts,
    SyncEnds,
    DriverReadsConfig,
    DriverOffers,
    DriverExhausted,
    DriverSpeaksOfAnIdThatWasNeverIssued,
    DeviceTakes,
    DriverReset,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Message {
    Start(HintId),
    Block { epoch: u64, round: HintId },
    Stop { round: HintId },
}

fn hint_id(round: RoundId) -> HintId {
    HintId::new(round.number()).expect("R8: the device issued an id out of range")
}

#[derive(Default)]
struct World {
    device: device::State,
    driver: driver::State,
    config_changed: bool,
    queue: VecDeque<Message>,
    /// Blocks that the driver holds, and how many of them to offer again.
    held: usize,
    to_offer_again: usize,
    /// Counted up whenever hints given so far become worthless.
    epoch: u64,
    /// Ids that were issued and that the driver may still speak of.
    live: Vec<HintId>,
    finished: Option<HintId>,
    used: usize,
}

impl World {
    fn tell_device(&mut self, event: device::Event) -> Option<device::Action> {
        let before = self.device.command();
        let (next, action) = self.device.step(event);
        self.device = next;
        let shown = self.device.command();
        assert_eq!(
            action == Some(device::Action::NotifyConfig),
            before != shown && event != device::Event::Reset,
            "the driver is told of a change, and of nothing else: {event:?}"
        );
        if let (CommandId::Hint(id), true) = (shown, shown != before) {
            assert!(!self.live.contains(&id), "R8: {id:?} was reused");
            self.live.push(id);
        }
        self.config_changed |= before != shown;
        action
    }

    fn tell_driver(&mut self, event: driver::Event) {
        let before = self.driver;
        let (next, actions) = self.driver.step(event);
        self.driver = next;
        for action in actions {
            match action {
                driver::Action::SendStart(id) => {
                    self.queue.push_back(Message::Start(hint_id(id)));
                }
                driver::Action::OfferHeld => self.to_offer_again = self.held,
                driver::Action::SendStop => {
                    let round = hint_id(before.offering().expect("STOP without a round"));
                    self.queue.push_back(Message::Stop { round });
                }
                driver::Action::ReleaseHeld => {
                    self.held = 0;
                    self.to_offer_again = 0;
                }
            }
        }
    }

    fn driver_offers(&mut self) {
        let Some(round) = self.driver.offering().map(hint_id) else {
            return;
        };
        if self.to_offer_again > 0 {
            self.to_offer_again -= 1;
        } else {
            self.held += 1;
        }
        let epoch = self.epoch;
        self.queue.push_back(Message::Block { epoch, round });
    }

    /// A whole round, start to STOP, of an id that is far from all that were issued.
    fn driver_lies(&mut self) {
        let far = self.device.next_id().number() ^ 0x4000_0000;
        let round = HintId::new(far).unwrap();
        let epoch = self.epoch;
        self.queue.extend([
            Message::Start(round),
            Message::Block { epoch, round },
            Message::Stop { round },
        ]);
    }

    fn device_takes(&mut self) {
        match self.queue.pop_front() {
            None => {}
            Some(Message::Start(id)) => {
                let action = self.tell_device(device::Event::Command(CommandId::Hint(id)));
                let started = action == Some(device::Action::RoundStarted(id));
                assert!(!started || self.live.contains(&id), "{id:?} is not wanted");
                self.forget_before(id);
            }
            Some(Message::Stop { round }) => {
                let action = self.tell_device(device::Event::Command(CommandId::Stop));
                if let Some(device::Action::RoundFinished(id)) = action {
                    assert_eq!(id, round, "R2: the STOP of one round ended another");
                    self.finished = Some(id);
                }
                self.live.retain(|live| *live != round);
            }
            Some(Message::Block { epoch, round }) => {
                if let Some(device::Action::UseBlock(id)) = self.tell_device(device::Event::Block) {
                    assert_eq!(epoch, self.epoch, "R6: a hint from before a sync was used");
                    assert_eq!(round, id, "R2: a hint of another round was used");
                    self.used += 1;
                }
            }
        }
    }

    /// The driver has started `id`: it will not speak of older ones any more.
    fn forget_before(&mut self, id: HintId) {
        if let Some(at) = self.live.iter().position(|live| *live == id) {
            self.live.drain(..at);
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Start => {
                if self.device.phase() != device::Phase::Syncing {
                    self.epoch += 1;
                }
                self.tell_device(device::Event::Start);
            }
            Step::Stop => {
                self.epoch += 1;
                self.tell_device(device::Event::Stop);
            }
            Step::Done => {
                self.epoch += 1;
                self.tell_device(device::Event::Done);
            }
            Step::SyncStarts => {
                self.epoch += 1;
                self.tell_device(device::Event::SyncStarts);
            }
            Step::SyncEnds => {
                self.tell_device(device::Event::SyncEnds);
            }
            Step::DriverReadsConfig => {
                if core::mem::take(&mut self.config_changed) {
                    let command = self.device.command();
                    self.tell_driver(driver::Event::Config(command));
                }
            }
            Step::DriverOffers => self.driver_offers(),
            Step::DriverExhausted => self.tell_driver(driver::Event::Exhausted),
            Step::DriverSpeaksOfAnIdThatWasNeverIssued => self.driver_lies(),
            Step::DeviceTakes => self.device_takes(),
            Step::DriverReset => {
                self.epoch += 1;
                self.queue.clear();
                self.live.clear();
                self.tell_driver(driver::Event::Reset);
                self.tell_device(device::Event::Reset);
                self.config_changed = false;
                assert_eq!(self.held, 0, "R16: a reset returns everything");
            }
        }
    }

    /// Lets everything that is on its way arrive.
    fn settle(&mut self) {
        self.take(Step::DriverReadsConfig);
        while !self.queue.is_empty() {
            self.take(Step::DeviceTakes);
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => Just(Step::Start),
        1 => Just(Step::Stop),
        1 => Just(Step::Done),
        1 => Just(Step::SyncStarts),
        2 => Just(Step::SyncEnds),
        5 => Just(Step::DriverReadsConfig),
        8 => Just(Step::DriverOffers),
        1 => Just(Step::DriverExhausted),
        1 => Just(Step::DriverSpeaksOfAnIdThatWasNeverIssued),
        10 => Just(Step::DeviceTakes),
        1 => Just(Step::DriverReset),
    ];
    prop::collection::vec(step, 0..120)
}

fn first_ids() -> impl Strategy<Value = HintId> {
    prop_oneof![
        Just(HintId::FIRST),
        (0u32..8).prop_map(|n| HintId::new(u32::MAX - n).unwrap()),
    ]
}

fn run(first: HintId, steps: &[Step]) -> World {
    let mut world = World {
        device: device::State::with_next_id(first),
        ..World::default()
    };
    for step in steps {
        world.take(*step);
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The assertions are in the world: stale words end nothing, late hints are not used, ids are
    /// not reused.
    #[test]
    fn r2_r6_r8_hold_in_any_interleaving(first in first_ids(), steps in steps()) {
        run(first, &steps);
    }

    #[test]
    fn r16_done_returns_everything_in_any_interleaving(first in first_ids(), steps in steps()) {
        let mut world = run(first, &steps);
        world.take(Step::SyncEnds);
        world.take(Step::Start);
        world.settle();
        world.take(Step::DriverOffers);
        world.take(Step::Done);
        world.settle();
        prop_assert_eq!(world.held, 0);
        prop_assert_eq!(world.driver, driver::State::Idle);
    }

    /// The machines are not safe by doing nothing: whatever came before, a new round that is left
    /// alone uses every block that the driver holds and offers.
    #[test]
    fn a_round_that_is_left_alone_uses_every_block(
        first in first_ids(),
        steps in steps(),
        blocks in 1usize..20,
    ) {
        let mut world = run(first, &steps);
        world.take(Step::SyncEnds);
        world.take(Step::Start);
        world.settle();
        let (used, again) = (world.used, world.to_offer_again);
        for _ in 0..again + blocks {
            world.take(Step::DriverOffers);
        }
        world.take(Step::DriverExhausted);
        world.settle();
        prop_assert_eq!(world.used - used, again + blocks);
        prop_assert_eq!(again + blocks, world.held);
        prop_assert_eq!(world.finished, world.device.phase().id());
    }
}
