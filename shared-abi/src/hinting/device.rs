// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The device's side of free page hinting.
//!
//! The driver's free page queue is ordered, and this machine leans on that: a start id says which
//! round the following blocks and the following STOP belong to. It remembers the round that the
//! queue *speaks of*, which may be an older one than the round that the device wants now.

use super::super::command::{CommandId, HintId};

/// The round that the device wants, and how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// No round is wanted. Config space shows STOP.
    Stopped,
    /// A dirty sync runs in the middle of a migration; a new id follows. Config space shows STOP.
    Syncing,
    /// This id was issued; the driver has not answered yet. Config space shows it.
    Requested(HintId),
    /// The driver has started this round; its blocks count. Config space shows the id.
    Started(HintId),
    /// The driver has no more blocks for this round. Config space shows the id.
    Finished(HintId),
    /// The device has no more use for hinted blocks. Config space shows DONE.
    Done,
}

impl Phase {
    /// The id of the round that is wanted, if one is.
    pub const fn id(self) -> Option<HintId> {
        match self {
            Self::Requested(id) | Self::Started(id) | Self::Finished(id) => Some(id),
            Self::Stopped | Self::Syncing | Self::Done => None,
        }
    }

    /// The command id that config space shows.
    pub const fn command(self) -> CommandId {
        match self {
            Self::Requested(id) | Self::Started(id) | Self::Finished(id) => CommandId::Hint(id),
            Self::Stopped | Self::Syncing => CommandId::Stop,
            Self::Done => CommandId::Done,
        }
    }
}

/// What the driver's queue speaks of at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum QueueRound {
    /// No round: none was started, or the last one was stopped.
    NotStarted,
    /// A round that this device issued.
    Issued(HintId),
    /// A start with an id that this device does not wait for; what follows it, up to the STOP,
    /// belongs to no round.
    Unknown,
}

/// The ids that the driver may still speak of, oldest and newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Outstanding {
    oldest: HintId,
    newest: HintId,
}

impl Outstanding {
    const fn contains(self, id: HintId) -> bool {
        id.steps_since(self.oldest) <= self.newest.steps_since(self.oldest)
    }
}

/// What happens to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A round is wanted: the first of a migration, or of another one that follows a cancelled one.
    Start,
    /// Hints are of no use now.
    Stop,
    /// Hinted blocks are of no more use at all: the migration has ended in whatever way.
    Done,
    /// The dirty bitmap is about to be synchronised: hints that were given before it are dead.
    SyncStarts,
    /// The dirty bitmap was synchronised: hints are wanted again, under a new id.
    SyncEnds,
    /// The driver sent this command id on the free page queue.
    Command(CommandId),
    /// The driver sent a block of free pages on the free page queue.
    FreeBlock,
    /// The driver reset the device, or is gone: its queues and what was on them are no more.
    Reset,
}

/// Why something that came from the driver was ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ignored {
    /// A start whose id is not one that the device waits for, a reserved id, or DONE.
    UnknownCommand(CommandId),
    /// A start of a round that is no longer wanted.
    StaleStart(HintId),
    /// The start of the round that already runs.
    RepeatedStart(HintId),
    /// The STOP of a round that is no longer wanted.
    StaleStop(HintId),
    /// A STOP with no start before it.
    StopWithoutStart,
    /// A block of a round that is no longer wanted, or of no round.
    StaleFreeBlock,
}

/// What the device shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Config space shows another command id: tell the driver.
    NotifyConfig,
    /// The driver has started this round.
    HintRoundStarted(HintId),
    /// The block that came is a hint of this round.
    UseFreeBlock(HintId),
    /// The driver has ended this round by itself: there are no more free blocks.
    HintRoundFinished(HintId),
    /// What came counts for nothing. Not an error as such: a round that was cut short leaves
    /// stale words on the queue.
    Ignore(Ignored),
    /// No id is free: the driver has not spoken of any of the last 2^31. No round was begun, and an
    /// earlier one was ended: tell the driver as for [`NotifyConfig`](Self::NotifyConfig).
    IdsExhausted,
}

/// The device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    phase: Phase,
    next: HintId,
    outstanding: Option<Outstanding>,
    queue_round: QueueRound,
}

impl Default for State {
    fn default() -> Self {
        Self::with_next_id(HintId::FIRST)
    }
}

impl State {
    /// A stopped device whose next round gets `next`: a fresh one, or one whose saved state says
    /// how far its ids had come.
    pub const fn with_next_id(next: HintId) -> Self {
        Self {
            phase: Phase::Stopped,
            next,
            outstanding: None,
            queue_round: QueueRound::NotStarted,
        }
    }

    /// The round that is wanted, and how far it has come.
    pub const fn phase(self) -> Phase {
        self.phase
    }

    /// The command id that config space shows.
    pub const fn command(self) -> CommandId {
        self.phase.command()
    }

    /// The id that the next round gets; part of the device's saved state.
    pub const fn next_id(self) -> HintId {
        self.next
    }

    /// Takes an event; gives the next state and what to do, if anything.
    #[must_use]
    pub const fn step(self, event: Event) -> (Self, Option<Action>) {
        match event {
            Event::Start => match self.phase {
                // The end of the sync brings the new id.
                Phase::Syncing => (self, None),
                _ => self.issue(),
            },
            Event::SyncEnds => match self.phase {
                Phase::Syncing => self.issue(),
                _ => (self, None),
            },
            Event::SyncStarts => match self.phase.id() {
                Some(_) => self.show(Phase::Syncing),
                None => (self, None),
            },
            // After DONE the driver holds nothing, and the specification wants DONE to stand.
            Event::Stop => match self.phase {
                Phase::Done => (self, None),
                _ => self.show(Phase::Stopped),
            },
            Event::Done => self.show(Phase::Done),
            Event::Command(CommandId::Hint(id)) => self.started(id),
            Event::Command(CommandId::Stop) => self.stopped(),
            Event::Command(command) => self.ignore(Ignored::UnknownCommand(command)),
            Event::FreeBlock => match (self.phase, self.queue_round) {
                (Phase::Started(wanted), QueueRound::Issued(id))
                    if wanted.number() == id.number() =>
                {
                    (self, Some(Action::UseFreeBlock(id)))
                }
                _ => self.ignore(Ignored::StaleFreeBlock),
            },
            Event::Reset => (Self::with_next_id(self.next), None),
        }
    }

    const fn ignore(self, why: Ignored) -> (Self, Option<Action>) {
        (self, Some(Action::Ignore(why)))
    }

    /// Moves to `phase`, and notifies if config space shows it by another command id.
    const fn show(mut self, phase: Phase) -> (Self, Option<Action>) {
        let changed = self.phase.command().number() != phase.command().number();
        self.phase = phase;
        (
            self,
            if changed {
                Some(Action::NotifyConfig)
            } else {
                None
            },
        )
    }

    /// Issues a new id, unless the driver may still speak of it.
    const fn issue(mut self) -> (Self, Option<Action>) {
        let id = self.next;
        let oldest = match self.outstanding {
            Some(outstanding) if outstanding.oldest.number() == id.number() => {
                self.phase = Phase::Stopped;
                return (self, Some(Action::IdsExhausted));
            }
            Some(outstanding) => outstanding.oldest,
            None => id,
        };
        self.outstanding = Some(Outstanding { oldest, newest: id });
        self.next = id.successor();
        self.show(Phase::Requested(id))
    }

    /// The driver has sent `id` as the start of a round.
    const fn started(mut self, id: HintId) -> (Self, Option<Action>) {
        let newest = match self.outstanding {
            Some(outstanding) if outstanding.contains(id) => outstanding.newest,
            _ => {
                self.queue_round = QueueRound::Unknown;
                return self.ignore(Ignored::UnknownCommand(CommandId::Hint(id)));
            }
        };
        // A driver goes through the ids in order, so it will not speak of an older one again.
        self.outstanding = Some(Outstanding { oldest: id, newest });
        self.queue_round = QueueRound::Issued(id);
        match self.phase {
            Phase::Requested(wanted) if wanted.number() == id.number() => {
                self.phase = Phase::Started(id);
                (self, Some(Action::HintRoundStarted(id)))
            }
            Phase::Started(wanted) if wanted.number() == id.number() => {
                self.ignore(Ignored::RepeatedStart(id))
            }
            _ => self.ignore(Ignored::StaleStart(id)),
        }
    }

    /// The driver has sent STOP: the end of the round that the queue speaks of, and of no other.
    const fn stopped(mut self) -> (Self, Option<Action>) {
        let queue_round = self.queue_round;
        self.queue_round = QueueRound::NotStarted;
        let id = match queue_round {
            QueueRound::Issued(id) => id,
            QueueRound::Unknown => {
                return self.ignore(Ignored::UnknownCommand(CommandId::Stop));
            }
            QueueRound::NotStarted => return self.ignore(Ignored::StopWithoutStart),
        };
        self.outstanding = match self.outstanding {
            Some(outstanding) if outstanding.newest.number() != id.number() => Some(Outstanding {
                oldest: id.successor(),
                newest: outstanding.newest,
            }),
            _ => None,
        };
        match self.phase {
            Phase::Started(wanted) if wanted.number() == id.number() => {
                self.phase = Phase::Finished(id);
                (self, Some(Action::HintRoundFinished(id)))
            }
            _ => self.ignore(Ignored::StaleStop(id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    const A: HintId = HintId::FIRST;
    const B: HintId = A.successor();

    fn start(id: HintId) -> Event {
        Event::Command(CommandId::Hint(id))
    }

    const STOP: Event = Event::Command(CommandId::Stop);

    fn run(mut state: State, events: &[Event]) -> (State, Vec<Action>) {
        let mut all = Vec::new();
        for event in events {
            let (next, action) = state.step(*event);
            state = next;
            all.extend(action);
        }
        (state, all)
    }

    #[test]
    fn a_whole_round() {
        let (state, actions) = run(
            State::default(),
            &[Event::Start, start(A), Event::FreeBlock, STOP, Event::Done],
        );
        assert_eq!(state.phase(), Phase::Done);
        assert_eq!(
            actions,
            [
                Action::NotifyConfig,
                Action::HintRoundStarted(A),
                Action::UseFreeBlock(A),
                Action::HintRoundFinished(A),
                Action::NotifyConfig
            ]
        );
    }

    #[test]
    fn r2_a_cancelled_round_followed_at_once_by_another() {
        let (state, actions) = run(
            State::default(),
            &[
                Event::Start,
                start(A),
                Event::Stop,
                Event::Start,
                // What the driver had already put on the queue for A:
                Event::FreeBlock,
                STOP,
                // And then its answer to B.
                start(B),
                Event::FreeBlock,
            ],
        );
        assert_eq!(state.phase(), Phase::Started(B));
        assert_eq!(
            actions[4..],
            [
                Action::Ignore(Ignored::StaleFreeBlock),
                Action::Ignore(Ignored::StaleStop(A)),
                Action::HintRoundStarted(B),
                Action::UseFreeBlock(B)
            ]
        );
    }

    #[test]
    fn r2_unknown_ids_end_nothing_and_their_blocks_count_for_nothing() {
        let foreign = HintId::LAST;
        let (state, actions) = run(
            State::default(),
            &[
                Event::Start,
                start(A),
                Event::Command(CommandId::Reserved(77)),
                Event::FreeBlock,
                start(foreign),
                Event::FreeBlock,
                STOP,
                Event::FreeBlock,
            ],
        );
        assert_eq!(state.phase(), Phase::Started(A));
        let used = actions
            .iter()
            .filter(|action| **action == Action::UseFreeBlock(A))
            .count();
        assert_eq!(used, 1);
    }

    #[test]
    fn r6_a_sync_kills_the_id_and_brings_a_new_one() {
        let (state, actions) = run(
            State::default(),
            &[
                Event::Start,
                start(A),
                Event::SyncStarts,
                Event::FreeBlock,
                Event::SyncEnds,
                Event::FreeBlock,
            ],
        );
        assert_eq!(state.phase(), Phase::Requested(B));
        assert_eq!(
            actions[2..],
            [
                Action::NotifyConfig,
                Action::Ignore(Ignored::StaleFreeBlock),
                Action::NotifyConfig,
                Action::Ignore(Ignored::StaleFreeBlock)
            ]
        );
    }

    #[test]
    fn r6_a_sync_without_a_round_changes_nothing() {
        for events in [&[][..], &[Event::Done], &[Event::Start, Event::Stop]] {
            let (before, _) = run(State::default(), events);
            let (after, actions) = run(before, &[Event::SyncStarts, Event::SyncEnds]);
            assert_eq!(after, before);
            assert_eq!(actions, []);
        }
    }

    #[test]
    fn r8_an_id_is_not_reused_before_its_stop_was_seen() {
        let full = State {
            outstanding: Some(Outstanding {
                oldest: B,
                newest: A,
            }),
            next: B,
            phase: Phase::Requested(A),
            queue_round: QueueRound::Issued(B),
        };
        let (refused, actions) = run(full, &[Event::Start]);
        assert_eq!(actions, [Action::IdsExhausted]);
        assert_eq!(refused.phase(), Phase::Stopped);
        // The STOP of B sets it free.
        let (issued, actions) = run(refused, &[STOP, Event::Start]);
        assert_eq!(issued.phase(), Phase::Requested(B));
        assert_eq!(
            actions,
            [Action::Ignore(Ignored::StaleStop(B)), Action::NotifyConfig]
        );
    }

    #[test]
    fn r8_ids_stay_in_range_across_the_wrap() {
        let (state, _) = run(
            State::with_next_id(HintId::LAST),
            &[Event::Start, Event::Start],
        );
        assert_eq!(state.phase(), Phase::Requested(HintId::FIRST));
    }

    #[test]
    fn stop_after_done_leaves_done_standing() {
        let (state, actions) = run(State::default(), &[Event::Done, Event::Stop]);
        assert_eq!(state.command(), CommandId::Done);
        assert_eq!(actions, [Action::NotifyConfig]);
    }
}
