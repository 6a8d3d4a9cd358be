// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Property tests of both state machines together, with events in any order.
//!
//! The model includes the path between driver and device: configuration space is one word, which
//! may change several times before the driver reads it. The free page queue delivers late, but in
//! order.
//!
//! The model also records the truth that the state machines have to determine:
//!
//! - Each free block carries the *epoch* in which it was offered. Each start of a dirty sync and
//!   each start, stop, DONE and reset begins a new epoch.
//! - Each STOP carries the hint round that it ends.
//!
//! Some drivers send ids that were never issued.

use super::super::command::{CommandId, HintId, HintRoundId};
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
    DriverSendsUnknownId,
    DeviceReceives,
    DriverReset,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Message {
    Start(HintId),
    FreeBlock { epoch: u64, round: HintId },
    Stop { round: HintId },
}

fn hint_id(round: HintRoundId) -> HintId {
    HintId::new(round.number()).expect("R8: the device issued an id out of range")
}

#[derive(Default)]
struct Model {
    device: device::State,
    driver: driver::State,
    config_changed: bool,
    queue: VecDeque<Message>,
    /// The number of hinted blocks of the driver, and how many of them the driver has to offer
    /// again.
    hinted: usize,
    to_reoffer: usize,
    /// Incremented when the hints so far become invalid.
    epoch: u64,
    /// Ids that were issued and that the driver may still send.
    outstanding: Vec<HintId>,
    finished: Option<HintId>,
    used: usize,
}

impl Model {
    fn step_device(&mut self, event: device::Event) -> Option<device::Action> {
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
            assert!(!self.outstanding.contains(&id), "R8: {id:?} was reused");
            self.outstanding.push(id);
        }
        self.config_changed |= before != shown;
        action
    }

    fn step_driver(&mut self, event: driver::Event) {
        let before = self.driver;
        let (next, actions) = self.driver.step(event);
        self.driver = next;
        for action in actions {
            match action {
                driver::Action::SendStart(id) => {
                    self.queue.push_back(Message::Start(hint_id(id)));
                }
                driver::Action::ReofferHinted => self.to_reoffer = self.hinted,
                driver::Action::SendStop => {
                    let round = hint_id(before.offering().expect("STOP without a round"));
                    self.queue.push_back(Message::Stop { round });
                }
                driver::Action::ReleaseHinted => {
                    self.hinted = 0;
                    self.to_reoffer = 0;
                }
            }
        }
    }

    fn driver_offers(&mut self) {
        let Some(round) = self.driver.offering().map(hint_id) else {
            return;
        };
        if self.to_reoffer > 0 {
            self.to_reoffer -= 1;
        } else {
            self.hinted += 1;
        }
        let epoch = self.epoch;
        self.queue.push_back(Message::FreeBlock { epoch, round });
    }

    /// Sends a whole hint round, from start to STOP, with an id far from all issued ids.
    fn driver_sends_unknown_id(&mut self) {
        let far = self.device.next_id().number() ^ 0x4000_0000;
        let round = HintId::new(far).unwrap();
        let epoch = self.epoch;
        self.queue.extend([
            Message::Start(round),
            Message::FreeBlock { epoch, round },
            Message::Stop { round },
        ]);
    }

    fn device_receives(&mut self) {
        match self.queue.pop_front() {
            None => {}
            Some(Message::Start(id)) => {
                let action = self.step_device(device::Event::Command(CommandId::Hint(id)));
                let started = action == Some(device::Action::HintRoundStarted(id));
                assert!(
                    !started || self.outstanding.contains(&id),
                    "{id:?} is not wanted"
                );
                self.retire_before(id);
            }
            Some(Message::Stop { round }) => {
                let action = self.step_device(device::Event::Command(CommandId::Stop));
                if let Some(device::Action::HintRoundFinished(id)) = action {
                    assert_eq!(id, round, "R2: the STOP of one round ended another");
                    self.finished = Some(id);
                }
                self.outstanding.retain(|outstanding| *outstanding != round);
            }
            Some(Message::FreeBlock { epoch, round }) => {
                if let Some(device::Action::UseFreeBlock(id)) =
                    self.step_device(device::Event::FreeBlock)
                {
                    assert_eq!(epoch, self.epoch, "R6: a hint from before a sync was used");
                    assert_eq!(round, id, "R2: a hint of another round was used");
                    self.used += 1;
                }
            }
        }
    }

    /// The driver has started `id`, so it does not send older ids again.
    fn retire_before(&mut self, id: HintId) {
        if let Some(at) = self
            .outstanding
            .iter()
            .position(|outstanding| *outstanding == id)
        {
            self.outstanding.drain(..at);
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Start => {
                if self.device.phase() != device::Phase::Syncing {
                    self.epoch += 1;
                }
                self.step_device(device::Event::Start);
            }
            Step::Stop => {
                self.epoch += 1;
                self.step_device(device::Event::Stop);
            }
            Step::Done => {
                self.epoch += 1;
                self.step_device(device::Event::Done);
            }
            Step::SyncStarts => {
                self.epoch += 1;
                self.step_device(device::Event::SyncStarts);
            }
            Step::SyncEnds => {
                self.step_device(device::Event::SyncEnds);
            }
            Step::DriverReadsConfig => {
                if core::mem::take(&mut self.config_changed) {
                    let command = self.device.command();
                    self.step_driver(driver::Event::ConfigChanged(command));
                }
            }
            Step::DriverOffers => self.driver_offers(),
            Step::DriverExhausted => self.step_driver(driver::Event::Exhausted),
            Step::DriverSendsUnknownId => self.driver_sends_unknown_id(),
            Step::DeviceReceives => self.device_receives(),
            Step::DriverReset => {
                self.epoch += 1;
                self.queue.clear();
                self.outstanding.clear();
                self.step_driver(driver::Event::Reset);
                self.step_device(device::Event::Reset);
                self.config_changed = false;
                assert_eq!(self.hinted, 0, "R16: a reset returns everything");
            }
        }
    }

    /// Delivers everything that is pending.
    fn settle(&mut self) {
        self.take(Step::DriverReadsConfig);
        while !self.queue.is_empty() {
            self.take(Step::DeviceReceives);
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
        1 => Just(Step::DriverSendsUnknownId),
        10 => Just(Step::DeviceReceives),
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

fn run(first: HintId, steps: &[Step]) -> Model {
    let mut model = Model {
        device: device::State::with_next_id(first),
        ..Model::default()
    };
    for step in steps {
        model.take(*step);
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The assertions are in the model: stale buffers end no hint round, late hints are not used,
    /// ids are not reused.
    #[test]
    fn r2_r6_r8_hold_in_any_interleaving(first in first_ids(), steps in steps()) {
        run(first, &steps);
    }

    #[test]
    fn r16_done_returns_everything_in_any_interleaving(first in first_ids(), steps in steps()) {
        let mut model = run(first, &steps);
        model.take(Step::SyncEnds);
        model.take(Step::Start);
        model.settle();
        model.take(Step::DriverOffers);
        model.take(Step::Done);
        model.settle();
        prop_assert_eq!(model.hinted, 0);
        prop_assert_eq!(model.driver, driver::State::Idle);
    }

    /// Liveness: after any history, an undisturbed hint round uses every hinted block that the
    /// driver offers.
    #[test]
    fn a_round_that_is_left_alone_uses_every_block(
        first in first_ids(),
        steps in steps(),
        blocks in 1usize..20,
    ) {
        let mut model = run(first, &steps);
        model.take(Step::SyncEnds);
        model.take(Step::Start);
        model.settle();
        let (used, again) = (model.used, model.to_reoffer);
        for _ in 0..again + blocks {
            model.take(Step::DriverOffers);
        }
        model.take(Step::DriverExhausted);
        model.settle();
        prop_assert_eq!(model.used - used, again + blocks);
        prop_assert_eq!(again + blocks, model.hinted);
        prop_assert_eq!(model.finished, model.device.phase().id());
    }
}
