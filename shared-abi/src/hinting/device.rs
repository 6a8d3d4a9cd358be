// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The state machine of free page hinting for the device.
//!
//! The free page queue is ordered, and the state machine relies on that: a start id determines the
//! hint round of the free blocks and of the STOP that follow it. The state machine tracks the
//! current hint round of the queue. It may be older than the hint round that the device wants now.

use super::super::command::{CommandId, HintId};

/// The phase of the hint round that the device wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The device wants no hints. Configuration space shows STOP.
    Stopped,
    /// A dirty sync is in progress during a migration. A new id follows. Configuration space shows
    /// STOP.
    Syncing,
    /// The device issued this id, and the driver has not started the hint round. Configuration
    /// space shows the id.
    Requested(HintId),
    /// The driver has started this hint round, and its free blocks are used. Configuration space
    /// shows the id.
    Started(HintId),
    /// The driver has no more free blocks for this hint round. Configuration space shows the id.
    Finished(HintId),
    /// The device no longer needs hinted blocks. Configuration space shows DONE.
    Done,
}

impl Phase {
    /// Returns the id of the hint round that the device wants, if there is one.
    pub const fn id(self) -> Option<HintId> {
        match self {
            Self::Requested(id) | Self::Started(id) | Self::Finished(id) => Some(id),
            Self::Stopped | Self::Syncing | Self::Done => None,
        }
    }

    /// Returns the command id that configuration space shows.
    pub const fn command(self) -> CommandId {
        match self {
            Self::Requested(id) | Self::Started(id) | Self::Finished(id) => CommandId::Hint(id),
            Self::Stopped | Self::Syncing => CommandId::Stop,
            Self::Done => CommandId::Done,
        }
    }
}

/// The current hint round of the free page queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum QueueRound {
    /// None: no hint round was started, or the last one was stopped.
    NotStarted,
    /// A hint round that this device issued.
    Issued(HintId),
    /// A hint round with an id that is not outstanding. Free blocks up to the next STOP belong to
    /// no hint round of this device.
    Unknown,
}

/// The outstanding ids: those that the driver may still send, from the oldest to the newest.
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

/// An event for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The device wants hints: for a migration that begins, or for one that follows a cancelled
    /// migration.
    Start,
    /// The device wants no hints now.
    Stop,
    /// The device no longer needs hinted blocks: the migration has completed, failed or been
    /// cancelled.
    Done,
    /// A dirty sync is about to begin. It invalidates all earlier hints.
    SyncStarts,
    /// The dirty sync has ended. The device wants hints again, with a new id.
    SyncEnds,
    /// The driver sent this command id on the free page queue.
    Command(CommandId),
    /// The driver sent a free block on the free page queue.
    FreeBlock,
    /// The driver reset the device or was removed. The queues and their buffers no longer exist.
    Reset,
}

/// The reason why a buffer of the driver was ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ignored {
    /// A start with an id that is not outstanding, the STOP after such a start, a reserved id, or
    /// DONE.
    UnknownCommand(CommandId),
    /// The start of a hint round that has ended, or that the device no longer wants.
    StaleStart(HintId),
    /// A repeated start of the current hint round.
    RepeatedStart(HintId),
    /// The STOP of a hint round that the device no longer wants.
    StaleStop(HintId),
    /// A STOP without a start before it.
    StopWithoutStart,
    /// A free block of a hint round that has not been started, has ended, or that the device no
    /// longer wants.
    StaleFreeBlock,
}

/// An action of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Configuration space shows another command id: notify the driver.
    NotifyConfig,
    /// The driver has started this hint round.
    HintRoundStarted(HintId),
    /// Use the free block as a hint of this hint round.
    UseFreeBlock(HintId),
    /// The driver has ended this hint round, because it has no more free blocks.
    HintRoundFinished(HintId),
    /// Ignore the buffer. This is not necessarily an error: a hint round that the device cancels
    /// may leave stale buffers in the queue.
    Ignore(Ignored),
    /// The next id is still outstanding: the driver has answered none of the last 2^31 ids. The
    /// device starts no hint round, and the phase is now [`Phase::Stopped`]: notify the driver as
    /// for [`NotifyConfig`](Self::NotifyConfig).
    IdsExhausted,
}

/// The state of the device.
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
    /// Creates a stopped device whose next hint round gets the id `next`: for a new device, or to
    /// restore a saved [`next_id`](Self::next_id).
    pub const fn with_next_id(next: HintId) -> Self {
        Self {
            phase: Phase::Stopped,
            next,
            outstanding: None,
            queue_round: QueueRound::NotStarted,
        }
    }

    /// Returns the phase of the hint round that the device wants.
    pub const fn phase(self) -> Phase {
        self.phase
    }

    /// Returns the command id that configuration space shows.
    pub const fn command(self) -> CommandId {
        self.phase.command()
    }

    /// Returns the id of the next hint round, which is part of the saved state of the device.
    pub const fn next_id(self) -> HintId {
        self.next
    }

    /// Takes an event, and returns the next state and an action, if there is one.
    #[must_use]
    pub const fn step(self, event: Event) -> (Self, Option<Action>) {
        match event {
            Event::Start => match self.phase {
                // The end of the dirty sync issues the new id.
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
            // After DONE the driver has no hinted blocks, and the specification requires the device
            // to keep showing DONE.
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

    /// Changes to `phase`, and notifies the driver if the command id in configuration space
    /// changes.
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

    /// Issues the next id, unless it is still outstanding.
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

    /// Handles the start of hint round `id` by the driver.
    const fn started(mut self, id: HintId) -> (Self, Option<Action>) {
        let newest = match self.outstanding {
            Some(outstanding) if outstanding.contains(id) => outstanding.newest,
            _ => {
                self.queue_round = QueueRound::Unknown;
                return self.ignore(Ignored::UnknownCommand(CommandId::Hint(id)));
            }
        };
        // A driver starts the ids in order, so it does not send an older one again.
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

    /// Handles a STOP by the driver: it ends the current hint round of the queue, and no other.
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
                // The driver had put these buffers into the queue for A.
                Event::FreeBlock,
                STOP,
                // The driver starts B.
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
        // The STOP of B makes its id available.
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
