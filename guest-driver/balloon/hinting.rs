// SPDX-License-Identifier: GPL-2.0

//! Free page hinting.
//!
//! What to do is decided by the contract's state machine, [`driver::State`]; here it is done. One
//! work item does it. It never waits for the device: it collects what the device has used, fills
//! the ring, notifies the device once, and returns; the device's interrupt starts it again. So a
//! new command is noticed within one ring's worth of work, and a removal never has to wait for an
//! answer.
//!
//! An interrupt costs the guest an exit, and a device that is at work returns the next blocks
//! within microseconds. So the work item watches the ring for a moment before it asks for one: as
//! long as the device keeps up, a round needs no interrupt; the ring is kept full meanwhile, and the
//! device is notified when it is through with nearly all that it was notified of (if it wants to be:
//! one that is at work looks by itself).
//!
//! The kernel's own driver takes no interrupt from this queue at all, and so there are devices
//! whose interrupts nobody ever missed: QEMU's (11.1, TCG) serves the queue in an I/O thread, and
//! from there none arrives. Therefore, while buffers are in flight, a timer looks after them too,
//! less and less often.
//!
//! A block is owned by the queue while it is in flight, by [`Held`] until the device is done with
//! it, and by the page allocator before and after. There is no other way, so the feature
//! `KEEPS_HINTED_UNTIL_RETURNED` is kept by construction.

use kernel::prelude::*;
use kernel::processor::cpu_relax;
use kernel::sync::atomic::{AtomicFlag, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::{msecs_to_jiffies, Delta, Instant, Monotonic, Msecs};

use super::config::BalloonConfig;
use super::counters::Counters;
use super::held::Held;
use super::reserve::{Harvest, Limits};
use crate::mm::{state, LentBlock};
use crate::shared_abi::command::CommandId;
use crate::shared_abi::hinting::driver::{self, Action, Event};
use crate::shared_abi::queue::Queue;
use crate::virtio::work::{self, impl_has_task, new_task, Run, Task, WorkQueue};
use crate::virtio::{AddError, Either, Outgoing, Virtqueue};

/// A command id as the device reads it: little-endian.
type Command = Outgoing<[u8; 4]>;

/// What travels on the free page queue.
pub(crate) type HintBuffer = Either<Command, LentBlock>;

/// How many command buffers there are: a stop and a start for the current round and for the last,
/// which the device may not have returned yet.
const COMMANDS: usize = 4;
/// The entries of the ring that blocks leave free, so that a stop can be sent at once.
const COMMAND_ENTRIES: usize = 1;
/// The part of all memory that may be in flight at a time. A device that stops answering keeps no
/// more from the guest; what has come back, the guest can take.
const IN_FLIGHT_SHARE: usize = 4;

/// If the page allocator is so slow that filling the ring takes longer than this (it may have to
/// clear each block), the device is notified on the way, to work meanwhile.
const UNNOTICED: Delta = Delta::from_millis(100);
/// How long to wait for an interrupt before looking without one: doubled as long as nothing comes,
/// from the one to the other.
const LOOK_MIN: Msecs = 8;
const LOOK_MAX: Msecs = 1024;

/// How long the ring is watched without anything coming back, before an interrupt is asked for.
const WATCH: Delta = Delta::from_micros(500);

const TURN: u64 = 1;
const LOOK: u64 = 2;

/// The driver's side of free page hinting.
#[pin_data]
pub(crate) struct Hinting {
    config: BalloonConfig,
    queue: Virtqueue<HintBuffer>,
    limits: Limits,
    /// The device may show a new command id. It is read only then: QEMU's device shows STOP again
    /// once a round has started, and does not mean it.
    command_changed: AtomicFlag,
    /// The driver goes: no more is offered.
    stopping: AtomicFlag,
    #[pin]
    round: Mutex<Round>,
    held: Arc<Held>,
    counters: Arc<Counters>,
    #[pin]
    work: Task<Self, TURN>,
    #[pin]
    look: Task<Self, LOOK>,
}

struct Round {
    machine: driver::State,
    /// Counts rounds; each block is tagged with that in which it was offered last.
    number: u16,
    /// The round up to which the device was done with all blocks when it last said so.
    done: u16,
    /// Where new blocks come from while blocks are being offered.
    harvest: Option<Harvest>,
    /// Commands that are to be sent, the first one first.
    outbox: [Option<CommandId>; 2],
    /// The command buffers that are not in flight. Has room for all.
    spare: KVec<Command>,
    in_flight_pages: usize,
    /// The buffers in flight of which the device was notified, as far as it uses them in order.
    noticed: usize,
    /// The others.
    unnoticed: usize,
    /// When the round began.
    began: Instant<Monotonic>,
    /// How long to wait for the next interrupt.
    patience: Msecs,
}

impl_has_task! {
    impl HasTask<1> for Hinting { self.work }
    impl HasTask<2> for Hinting { self.look }
}

impl Hinting {
    /// Offers nothing yet. What will be offered is within `limits`.
    ///
    /// May sleep. Fails with `ENOMEM`.
    pub(crate) fn new(
        config: BalloonConfig,
        work_queue: WorkQueue,
        counters: Arc<Counters>,
        limits: Limits,
    ) -> Result<Arc<Self>> {
        let mut spare = KVec::with_capacity(COMMANDS, GFP_KERNEL)?;
        for _ in 0..COMMANDS {
            spare.push(Command::new([0; 4], GFP_KERNEL)?, GFP_KERNEL)?;
        }
        let round = Round {
            machine: driver::State::default(),
            number: 0,
            done: 0,
            harvest: None,
            outbox: [None; 2],
            spare,
            in_flight_pages: 0,
            noticed: 0,
            unnoticed: 0,
            began: Instant::now(),
            patience: LOOK_MIN,
        };
        let hinting = try_pin_init!(Self {
            config,
            queue: Virtqueue::new(c"free-page")?,
            limits,
            command_changed: AtomicFlag::new(true),
            stopping: AtomicFlag::new(false),
            round <- new_mutex!(round, "Hinting::round"),
            held: Arc::pin_init(Held::new(counters.clone()), GFP_KERNEL)?,
            counters,
            work <- new_task!(work_queue.clone(), "Hinting::work"),
            look <- new_task!(work_queue, "Hinting::look"),
        });
        Arc::pin_init(hinting, GFP_KERNEL)
    }

    /// The free page queue.
    pub(crate) fn queue(&self) -> &Virtqueue<HintBuffer> {
        &self.queue
    }

    /// The blocks that the guest may take back when it is short of memory.
    pub(crate) fn held(&self) -> Arc<Held> {
        self.held.clone()
    }

    /// The device may show a new command id. Any context.
    pub(crate) fn command_changed(self: &Arc<Self>) {
        self.command_changed.store(true, Relaxed);
        self.wake();
    }

    /// The device has used buffers. Any context.
    pub(crate) fn used(self: &Arc<Self>) {
        self.wake();
    }

    /// Starts the work, unless it is queued already or disabled.
    fn wake(self: &Arc<Self>) {
        work::enqueue::<Self, TURN>(self);
    }

    /// Ends all work for good. May sleep, but does not wait for the device.
    ///
    /// Blocks in flight stay there, for the reset to bring back.
    pub(crate) fn disable(self: &Arc<Self>) {
        self.stopping.store(true, Relaxed);
        work::disable::<Self, LOOK>(self);
        work::disable::<Self, TURN>(self);
    }

    /// Forgets the round, and gives all blocks back to the guest, filled with zeroes. To be called
    /// after the device's reset, which may be followed by new queues.
    ///
    /// May sleep, and take long.
    pub(crate) fn recover(&self) {
        let mut round = self.round.lock();
        while let Some(buffer) = self.queue.detach() {
            match buffer {
                Either::Left(command) => {
                    // Its room is still there.
                    let _ = round.spare.push_within_capacity(command);
                }
                Either::Right(block) => {
                    self.held.give_back(block);
                }
            }
        }
        // What it would have done with the blocks has no sense without the device.
        round.machine = driver::State::default();
        round.harvest = None;
        round.outbox = [None; 2];
        round.done = round.number;
        round.in_flight_pages = 0;
        (round.noticed, round.unnoticed) = (0, 0);
        round.patience = LOOK_MIN;
        drop(round);
        self.held.give_up();
    }

    /// Takes back the buffers that the device has used. Returns whether there was any.
    fn collect(&self, round: &mut Round) -> bool {
        let mut any = false;
        while let Some((buffer, _)) = self.queue.pop() {
            any = true;
            round.patience = LOOK_MIN;
            round.came_back();
            match buffer {
                Either::Left(command) => {
                    // Its room is still there: commands are only ever taken and put back.
                    let _ = round.spare.push_within_capacity(command);
                }
                Either::Right(block) => {
                    let pages = block.block().pages();
                    round.in_flight_pages = round.in_flight_pages.saturating_sub(pages);
                    self.keep(round, block);
                }
            }
        }
        any
    }

    /// Whether the device may have something new to say, or the driver goes.
    fn has_news(&self) -> bool {
        self.command_changed.load(Relaxed) || self.stopping.load(Relaxed)
    }

    /// Finds the place of a block that the device has returned.
    fn keep(&self, round: &Round, block: LentBlock) {
        let tag = block.block().tag();
        if round.is_done(tag) {
            block.release();
        } else if tag == round.number {
            self.held.hold(block);
        } else {
            self.held.hold_again(block);
        }
    }

    /// Reads the command id, if it may have changed, and does what follows from it.
    fn obey(&self, round: &mut Round) -> Result {
        if self.command_changed.xchg(false, Relaxed) {
            let command = self.config.command()?;
            self.step(round, Event::Config(command));
        }
        Ok(())
    }

    fn step(&self, round: &mut Round, event: Event) {
        let (next, actions) = round.machine.step(event);
        round.machine = next;
        for action in actions {
            match action {
                Action::SendStart(id) => {
                    round.number = round.number.wrapping_add(1);
                    round.send(CommandId::from_number(id.number()));
                    round.harvest = Some(Harvest::new(self.limits, &self.counters));
                    round.began = Instant::now();
                    self.counters.round_started(id.number());
                    self.held.forget_claims();
                }
                Action::OfferHeld => self.held.offer_all_again(),
                Action::SendStop => {
                    round.harvest = None;
                    round.send(CommandId::Stop);
                    self.counters.round_stopped(round.age_us());
                }
                Action::ReleaseHeld => {
                    round.done = round.number;
                    self.held.release();
                }
            }
        }
    }

    /// Sends the commands that are to be sent. Returns whether all of them went.
    fn send_commands(&self, round: &mut Round) -> Result<bool> {
        while let [Some(command), next] = round.outbox {
            let Some(mut buffer) = round.spare.pop() else {
                return Ok(false);
            };
            *buffer = command.number().to_le_bytes();
            if let Err(AddError { buffer, failure }) = self.queue.add(Either::Left(buffer)) {
                if let Either::Left(buffer) = buffer {
                    let _ = round.spare.push_within_capacity(buffer);
                }
                return match failure {
                    crate::virtio::AddFailure::Full => Ok(false),
                    failure => Err(failure.into()),
                };
            }
            round.outbox = [next, None];
            round.unnoticed += 1;
        }
        Ok(true)
    }

    /// Offers blocks until the ring is full or enough of the memory is in flight, there is news, or
    /// no block is left.
    fn offer(&self, round: &mut Round) -> Result {
        let limit = state::managed_pages() / IN_FLIGHT_SHARE;
        let mut noticed: Instant<Monotonic> = Instant::now();
        while !self.has_news() {
            if round.in_flight_pages >= limit || self.queue.free_entries() <= COMMAND_ENTRIES {
                break;
            }
            let Some(harvest) = &mut round.harvest else {
                break;
            };
            let block = self.held.next_again().or_else(|| {
                let block = harvest.next(self.held.claimed(), &self.counters);
                block.map(LentBlock::new)
            });
            let Some(mut block) = block else {
                self.finish(round);
                break;
            };
            let earlier = block.block().tag();
            let (address, order, pages, bytes) = {
                let block = block.block();
                (block.address(), block.order(), block.pages(), block.size())
            };
            block.set_tag(round.number);
            if let Err(AddError { buffer, failure }) = self.queue.add(Either::Right(block)) {
                if let Either::Right(mut block) = buffer {
                    block.set_tag(earlier);
                    self.held.hold_again(block);
                }
                return Err(failure.into());
            }
            round.in_flight_pages += pages;
            round.unnoticed += 1;
            self.counters.hinted(address, order, bytes);
            work::give_way();
            if noticed.elapsed() > UNNOTICED {
                self.notify(round);
                noticed = Instant::now();
            }
        }
        Ok(())
    }

    /// Nothing is left to offer.
    fn finish(&self, round: &mut Round) {
        self.step(round, Event::Exhausted);
        self.counters.rounds_finished.add(1);
        self.counters.last_round_us.set(round.age_us());
    }

    /// Lets the device know of new buffers, if there are any.
    fn notify(&self, round: &mut Round) {
        if round.unnoticed > 0 {
            round.noticed += round.unnoticed;
            round.unnoticed = 0;
            self.counters.kicked(Queue::FreePage, self.queue.kick());
        }
    }

    /// Looks after the buffers in flight later, should no interrupt come.
    fn look_later(self: &Arc<Self>, round: &mut Round) {
        if !round.any_in_flight() {
            return;
        }
        let delay = msecs_to_jiffies(round.patience);
        round.patience = (round.patience * 2).min(LOOK_MAX);
        work::enqueue_delayed::<Self, LOOK>(self, delay);
    }

    /// Takes turns for as long as the device keeps up. On return nothing is in flight any more, or
    /// nothing has come back for a while; the device knows of everything. Fails if it is gone.
    fn turns(&self, round: &mut Round) -> Result {
        let mut last: Instant<Monotonic> = Instant::now();
        loop {
            let result = self.turn(round);
            if result.is_err() || round.notice_is_due() {
                self.notify(round);
            }
            result?;
            work::give_way();
            loop {
                if self.has_news() {
                    break;
                }
                if self.collect(round) {
                    last = Instant::now();
                    break;
                }
                if !round.any_in_flight() || last.elapsed() > WATCH {
                    self.notify(round);
                    return Ok(());
                }
                cpu_relax();
            }
            if self.stopping.load(Relaxed) {
                return Ok(());
            }
        }
    }

    /// One turn: everything that can be done now. Fails if the device is gone.
    fn turn(&self, round: &mut Round) -> Result {
        self.collect(round);
        let mut all_sent = self.send_commands(round)?;
        if all_sent {
            // Only then, lest a command overtakes one that is waiting for room.
            self.obey(round)?;
            all_sent = self.send_commands(round)?;
        }
        if all_sent {
            self.offer(round)?;
            self.send_commands(round)?;
        }
        Ok(())
    }
}

impl Round {
    /// Microseconds since the round began.
    fn age_us(&self) -> u64 {
        self.began.elapsed().as_micros_ceil().max(0) as u64
    }

    fn any_in_flight(&self) -> bool {
        self.noticed > 0 || self.unnoticed > 0
    }

    /// A buffer came back.
    fn came_back(&mut self) {
        let count = if self.noticed > 0 {
            &mut self.noticed
        } else {
            &mut self.unnoticed
        };
        *count = count.saturating_sub(1);
    }

    /// Whether the device should be notified now of what it does not know of. It would otherwise
    /// have nothing to do soon, or there is no more to come.
    fn notice_is_due(&self) -> bool {
        self.harvest.is_none() || self.noticed <= self.unnoticed / 8
    }

    fn send(&mut self, command: CommandId) {
        // Commands come from `step` only when the outbox is empty, and at most two at a time.
        if let Some(slot) = self.outbox.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(command);
        }
    }

    /// Whether the device has said that it is done with the blocks of the round with this number.
    fn is_done(&self, number: u16) -> bool {
        self.number.wrapping_sub(number) >= self.number.wrapping_sub(self.done)
    }
}

/// The work proper.
impl Run<1> for Hinting {
    fn run(this: Arc<Self>) {
        let mut round = this.round.lock();
        while !this.stopping.load(Relaxed) {
            this.queue.disable_callback();
            if this.turns(&mut round).is_err() {
                return;
            }
            let quiet = this.queue.enable_callback_delayed();
            if quiet && !this.has_news() {
                this.look_later(&mut round);
                return;
            }
        }
    }
}

/// What comes instead of an interrupt: the work proper.
impl Run<2> for Hinting {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}
