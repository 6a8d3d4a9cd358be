// SPDX-License-Identifier: GPL-2.0

//! Free page hinting.
//!
//! What to do is decided by the contract's state machine, [`driver::State`]; here it is done. One
//! work item does it. It never waits for the device: it collects what the device has used, fills
//! the ring, notifies the device once, and returns; the device's interrupt starts it again. So a
//! new command is noticed within one ring's worth of work, and a removal never has to wait for an
//! answer. Nor does it work for long at a time: what is left of a round it leaves to the next time,
//! so that neither the freezer nor anybody else who needs the round waits.
//!
//! Before the system sleeps, and while memory goes offline, the round is *paused*: no block is
//! offered, those that are in flight are waited for, and those that are held go back. Then it goes
//! on, from the largest blocks again.
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

use core::ops::Range;

use kernel::prelude::*;
use kernel::processor::cpu_relax;
use kernel::sync::atomic::{Atomic, AtomicFlag, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::delay::fsleep;
use kernel::time::{msecs_to_jiffies, Delta, Instant, Monotonic, Msecs};

use super::config::BalloonConfig;
use super::counters::Counters;
use super::held::Held;
use super::reserve::{Harvest, Limits};
use super::timeout;
use crate::mm::{state, LentBlock, OnMemoryOffline, OnOutOfMemory, OnSleep, Shrink};
use crate::shared_abi::command::CommandId;
use crate::shared_abi::hinting::driver::{self, Action, Event};
use crate::shared_abi::queue::Queue;
use crate::virtio::work::{self, impl_has_task, new_task, Run, Task, WorkQueue};
use crate::virtio::{AddError, AddFailure, Either, Outgoing, Virtqueue};

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

/// How much is done at a time: so many blocks, and so long.
const TURNS_BLOCKS: usize = 256;
const TURNS_TIME: Delta = Delta::from_millis(5);
/// How many pages of hinted blocks a task that found no memory gets at a time.
const OOM_PAGES: usize = 1024;

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
    /// The system sleeps, or is about to: nothing is offered.
    asleep: AtomicFlag,
    /// How many callers have memory on its way offline: nothing is offered meanwhile.
    offlining: Atomic<u32>,
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
    /// When the device last returned a buffer.
    returned: Instant<Monotonic>,
    /// When the device was notified last.
    notified: Instant<Monotonic>,
    /// There was no memory to give the device a buffer.
    short: bool,
    /// A wait for the device timed out, and it has returned no buffer since.
    silent: bool,
    /// When the round began.
    began: Instant<Monotonic>,
    /// The interval at which the worker polls for used buffers.
    poll_interval: Msecs,
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
            returned: Instant::now(),
            notified: Instant::now(),
            short: false,
            silent: false,
            began: Instant::now(),
            poll_interval: LOOK_MIN,
        };
        let hinting = try_pin_init!(Self {
            config,
            queue: Virtqueue::new(c"free-page")?,
            limits,
            command_changed: AtomicFlag::new(true),
            stopping: AtomicFlag::new(false),
            asleep: AtomicFlag::new(false),
            offlining: Atomic::new(0),
            round <- new_mutex!(round, "Hinting::round"),
            held: Arc::pin_init(Held::new(counters.clone(), work_queue.clone()), GFP_KERNEL)?,
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
        self.held.disable();
    }

    /// Whether offering is paused.
    fn is_paused(&self) -> bool {
        self.asleep.load(Relaxed) || self.offlining.load(Relaxed) > 0
    }

    /// Waits until nothing is in flight any more. It [is paused](Self::is_paused); the device may
    /// keep a block, but not hold this up for long, nor time and again. Ends when the driver goes.
    fn wait_for_device(&self) {
        let since = Instant::now();
        while self.may_return_more(&mut self.round.lock(), since) {
            fsleep(Delta::from_millis(1));
        }
    }

    /// Collects what the device has returned. Returns whether to wait for more; the caller waits since
    /// `since`.
    fn may_return_more(&self, round: &mut Round, since: Instant<Monotonic>) -> bool {
        self.collect(round);
        let is_over = self.stopping.load(Relaxed) || self.queue.is_broken();
        if is_over || !round.any_in_flight() {
            return false;
        }
        self.notify(round);
        let waited = since.elapsed();
        let limit = timeout::host();
        round.silent |= waited > limit && round.returned.elapsed() > limit;
        // The device makes progress; only this caller stops waiting.
        !round.silent && waited <= timeout::total()
    }

    /// Goes on after a pause, unless there is another.
    fn go_on(self: &Arc<Self>) {
        let mut round = self.round.lock();
        if round.harvest.is_some() {
            // What was given back may be had again, in large blocks.
            round.harvest = Some(Harvest::new(self.limits, &self.counters));
        }
        drop(round);
        self.wake();
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
                // To clear it takes time: that is done below, without the lock.
                Either::Right(block) => self.held.hold(block),
            }
        }
        // What it would have done with the blocks has no sense without the device.
        round.machine = driver::State::default();
        round.harvest = None;
        round.outbox = [None; 2];
        round.done = round.number;
        round.in_flight_pages = 0;
        (round.noticed, round.unnoticed) = (0, 0);
        (round.short, round.silent) = (false, false);
        round.poll_interval = LOOK_MIN;
        drop(round);
        self.held.give_up();
    }

    /// Takes back the buffers that the device has used. Returns whether there was any.
    fn collect(&self, round: &mut Round) -> bool {
        let mut any = false;
        while let Some((buffer, _)) = self.queue.pop() {
            any = true;
            round.silent = false;
            round.returned = Instant::now();
            round.poll_interval = LOOK_MIN;
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

    /// Whether there is a new command id to read, or the driver goes.
    ///
    /// While a command waits for room, no command id is read: what may have changed is no news then.
    /// The device's answer starts the work again, or the timer does.
    fn has_news(&self, round: &Round) -> bool {
        let may_obey = round.all_sent() && self.command_changed.load(Relaxed);
        may_obey || self.stopping.load(Relaxed)
    }

    /// Finds the place of a block that the device has returned.
    fn keep(&self, round: &Round, block: LentBlock) {
        let tag = block.block().tag();
        if round.is_done(tag) {
            self.held.release_block(block);
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
                round.not_added(failure)?;
                return Ok(false);
            }
            round.outbox = [next, None];
            round.unnoticed += 1;
        }
        Ok(true)
    }

    /// Offers blocks until the ring is full or enough of the memory is in flight, there is news, or
    /// no block is left.
    fn offer(&self, round: &mut Round, budget: &mut Budget) -> Result {
        let limit = state::managed_pages() / IN_FLIGHT_SHARE;
        // A ring of one entry has none to leave free.
        let left_free = COMMAND_ENTRIES.min(self.queue.entries().saturating_sub(1));
        while !self.has_news(round) && !self.is_paused() && !budget.is_spent() {
            if round.in_flight_pages >= limit || self.queue.free_entries() <= left_free {
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
            budget.blocks = budget.blocks.saturating_sub(1);
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
                return round.not_added(failure);
            }
            round.in_flight_pages += pages;
            round.unnoticed += 1;
            self.counters.hinted(address, order, bytes);
            work::give_way();
            if round.notified.elapsed() > UNNOTICED {
                self.notify(round);
            }
        }
        Ok(())
    }

    /// Gives blocks back that the device is done with, while there is no news.
    fn release(&self, round: &Round, budget: &mut Budget) {
        while !self.has_news(round) && !budget.is_spent() && self.held.release_one() {
            budget.blocks = budget.blocks.saturating_sub(1);
            work::give_way();
        }
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
            round.notified = Instant::now();
            self.counters.kicked(Queue::FreePage, self.queue.kick());
        }
    }

    /// Looks after the buffers in flight later, should no interrupt come; or after memory.
    fn look_later(self: &Arc<Self>, round: &mut Round) {
        if !round.any_in_flight() && !round.short {
            return;
        }
        let delay = msecs_to_jiffies(round.poll_interval);
        round.poll_interval = (round.poll_interval * 2).min(LOOK_MAX);
        work::enqueue_delayed::<Self, LOOK>(self, delay);
    }

    /// Takes turns for as long as the device keeps up and there is a budget. On return nothing is in
    /// flight any more, or nothing has come back for a while, and the device knows of everything; or
    /// the budget is spent. Fails if the device is gone.
    fn turns(&self, round: &mut Round, budget: &mut Budget) -> Result {
        let mut last: Instant<Monotonic> = Instant::now();
        loop {
            let result = self.turn(round, budget);
            if result.is_err() || round.notice_is_due() {
                self.notify(round);
            }
            result?;
            work::give_way();
            loop {
                if budget.is_spent() {
                    return Ok(());
                }
                if self.has_news(round) {
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

    /// One turn: everything that can be done now, within `budget`. Fails if the device is gone.
    fn turn(&self, round: &mut Round, budget: &mut Budget) -> Result {
        round.short = false;
        self.collect(round);
        let mut all_sent = self.send_commands(round)?;
        if all_sent {
            // Only then, lest a command overtakes one that is waiting for room.
            self.obey(round)?;
            all_sent = self.send_commands(round)?;
        }
        if all_sent {
            self.offer(round, budget)?;
            self.send_commands(round)?;
        }
        self.release(round, budget);
        Ok(())
    }
}

/// What may be done at a time.
struct Budget {
    blocks: usize,
    began: Instant<Monotonic>,
}

impl Budget {
    fn new() -> Self {
        Self {
            blocks: TURNS_BLOCKS,
            began: Instant::now(),
        }
    }

    fn is_spent(&self) -> bool {
        self.blocks == 0 || self.began.elapsed() > TURNS_TIME
    }
}

impl Round {
    /// A buffer could not be added: fails if the device is gone. With a full ring the device's
    /// answer is waited for; without memory, some time.
    fn not_added(&mut self, failure: AddFailure) -> Result {
        match failure {
            AddFailure::Full => Ok(()),
            AddFailure::NoMemory => {
                self.short = true;
                Ok(())
            }
            AddFailure::Broken | AddFailure::Gone | AddFailure::Malformed => Err(ENODEV),
        }
    }

    /// Microseconds since the round began.
    fn age_us(&self) -> u64 {
        self.began.elapsed().as_micros_ceil().max(0) as u64
    }

    /// Whether no command waits for room on the ring, or for memory.
    fn all_sent(&self) -> bool {
        self.outbox[0].is_none()
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

impl Hinting {
    /// Works until there is nothing to do for the moment, or enough was done: then there is more to
    /// do, and this returns true.
    fn work(self: &Arc<Self>) -> bool {
        let mut round = self.round.lock();
        let mut budget = Budget::new();
        while !self.stopping.load(Relaxed) {
            self.queue.disable_callback();
            if self.turns(&mut round, &mut budget).is_err() {
                break;
            }
            if budget.is_spent() {
                return true;
            }
            let quiet = self.queue.enable_callback_delayed();
            if quiet && !self.has_news(&round) {
                self.look_later(&mut round);
                break;
            }
        }
        false
    }
}

/// The work proper.
impl Run<1> for Hinting {
    fn run(this: Arc<Self>) {
        if this.work() {
            this.wake();
        }
    }
}

/// Blocks in memory that goes offline are given back.
impl OnMemoryOffline for Hinting {
    fn going_offline(self: &Arc<Self>, range: Range<u64>) {
        self.offlining.fetch_add(1, Relaxed);
        self.wait_for_device();
        let round = self.round.lock();
        self.held.give_back_within(&range);
        drop(round);
        self.offlining.fetch_sub(1, Relaxed);
        self.go_on();
    }
}

/// Blocks that are with the device come back in a moment: no process is killed for want of them.
///
/// This runs within an allocation, perhaps one of the work item's own (some transports allocate to read
/// configuration space): so it takes the round's lock only if nobody has it.
impl OnOutOfMemory for Hinting {
    fn give_back(self: &Arc<Self>, already: usize) -> usize {
        if already > 0 {
            return 0;
        }
        let since: Instant<Monotonic> = Instant::now();
        let before = self.held.given_back();
        // Pages that other tasks have given back since are free as well.
        let freed = || self.held.given_back().wrapping_sub(before);
        loop {
            let may_come = match self.round.try_lock() {
                Some(mut round) => self.may_return_more(&mut round, since),
                // Perhaps held by the very task that finds no memory.
                None => !self.stopping.load(Relaxed) && since.elapsed() < timeout::host(),
            };
            if freed() == 0 {
                self.held.scan(OOM_PAGES);
            }
            if freed() > 0 || !may_come {
                break;
            }
            fsleep(Delta::from_millis(1));
        }
        // No interrupt comes for what was collected here.
        self.wake();
        freed()
    }
}

/// Hibernation needs memory for the image before it freezes the devices.
impl OnSleep for Hinting {
    fn prepare(self: &Arc<Self>) {
        self.asleep.store(true, Relaxed);
        self.wait_for_device();
        self.held.give_up();
    }

    fn over(self: &Arc<Self>) {
        self.asleep.store(false, Relaxed);
        self.go_on();
    }
}

/// What comes instead of an interrupt: the work proper.
impl Run<2> for Hinting {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

#[kunit_tests(virtio_balloon_rs_hinting)]
mod tests {
    use super::*;
    use crate::mm::{PageBlock, Shrink};
    use crate::shared_abi::config;
    use crate::shared_abi::features::Features;
    use crate::virtio::kunit_device::{Bound, Counter};

    const STOP: u32 = 0;
    const DONE: u32 = 1;
    const FIRST: u32 = 0x8000_0000;

    /// What the device finds on the free page queue.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Found {
        Command(u32),
        /// A block of so many bytes.
        Block(u32),
    }

    /// The driver's hinting and its device, whose answers the test gives. It finds no free block: what it
    /// offers are blocks that are to be offered again.
    struct Rig {
        hinting: Arc<Hinting>,
        held: Arc<Held>,
        counters: Arc<Counters>,
        // Last: the others have references to the device.
        bound: Bound,
    }

    impl Rig {
        fn new(entries: usize) -> Result<Self> {
            let features = Features::FREE_PAGE_HINT.bits();
            let bound = Bound::with_features(entries, features)?;
            let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
            let hinting = Hinting::new(
                BalloonConfig::new(bound.config()?),
                WorkQueue::new(c"kunit")?,
                counters.clone(),
                Limits::nothing(),
            )?;
            // The test does the work.
            work::disable::<Hinting, LOOK>(&hinting);
            work::disable::<Hinting, TURN>(&hinting);
            let held = hinting.held();
            held.disable();
            bound.find_queues(&[hinting.queue()], Counter::new()?)?;
            Ok(Self {
                hinting,
                held,
                counters,
                bound,
            })
        }

        /// Has so many blocks of four pages to be offered.
        fn provide(&self, blocks: usize) -> Result {
            for _ in 0..blocks {
                let block = PageBlock::take_free(2).ok_or(ENOMEM)?;
                self.held.hold_again(LentBlock::new(block));
            }
            Ok(())
        }

        fn command(&self, id: u32) {
            let at = config::FREE_PAGE_HINT_CMD_ID;
            self.bound.device.set_config(at, id);
            self.hinting.command_changed();
        }

        /// Works until there is nothing to do. The device does nothing meanwhile.
        fn work(&self) {
            while self.hinting.work() {}
        }

        /// Lets the device use one buffer.
        fn answer(&self) -> Option<Found> {
            let seen = self.bound.device.take(0)?;
            let segment = seen.segments.first()?;
            let found = if segment.writable {
                Found::Block(segment.length)
            } else {
                Found::Command(segment.first_word())
            };
            self.bound.device.give_back(0, seen.head, 0);
            Some(found)
        }

        /// Works, each time for one answer of the device, until there is nothing to do, and returns
        /// what the device has found.
        ///
        /// Whatever is with the device, its answer must come with an interrupt.
        fn settle(&self) -> Result<KVec<Found>> {
            let mut all = KVec::new();
            loop {
                self.work();
                let suppressed = self.bound.device.interrupts_suppressed(0);
                let Some(found) = self.answer() else {
                    break Ok(all);
                };
                assert!(!suppressed);
                all.push(found, GFP_KERNEL)?;
            }
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            self.hinting.disable();
            self.bound.reset();
            self.hinting.recover();
            assert_eq!(self.held.count(), 0);
        }
    }

    const BLOCK: Found = Found::Block(4 * 4096);

    #[test]
    fn a_ring_of_any_size_carries_a_whole_round() -> Result {
        const BLOCKS: usize = 20;
        for entries in [1, 2, 4] {
            let rig = Rig::new(entries)?;
            rig.provide(BLOCKS)?;
            rig.command(FIRST);
            let found = rig.settle()?;
            assert_eq!(found.len(), BLOCKS + 2);
            assert_eq!(found.first(), Some(&Found::Command(FIRST)));
            assert!(found[1..=BLOCKS].iter().all(|found| *found == BLOCK));
            assert_eq!(found.last(), Some(&Found::Command(STOP)));
            assert_eq!(rig.counters.rounds_finished.get(), 1);
            // R16: they are held until the device is done.
            assert_eq!(rig.held.count(), BLOCKS * 4);
            rig.command(DONE);
            assert!(rig.settle()?.is_empty());
            assert_eq!(rig.held.count(), 0);
            assert_eq!(rig.counters.zeroed_pages.get(), 0);
        }
        Ok(())
    }

    /// R2: the old round is stopped, and what it has offered is offered again.
    #[test]
    fn a_new_round_in_the_midst_of_another_is_a_whole_one_on_a_ring_of_any_size() -> Result {
        const BLOCKS: usize = 10;
        for entries in [1, 2, 4] {
            let rig = Rig::new(entries)?;
            rig.provide(BLOCKS)?;
            rig.command(FIRST);
            rig.work();
            assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
            for _ in 0..3 {
                rig.work();
                assert_eq!(rig.answer(), Some(BLOCK));
            }
            rig.command(FIRST + 1);
            let found = rig.settle()?;
            let mut found = found.iter().skip_while(|found| **found == BLOCK);
            assert_eq!(found.next(), Some(&Found::Command(STOP)));
            assert_eq!(found.next(), Some(&Found::Command(FIRST + 1)));
            let mut blocks = 0;
            let last = found.find(|found| {
                blocks += usize::from(**found == BLOCK);
                **found != BLOCK
            });
            assert_eq!((blocks, last), (BLOCKS, Some(&Found::Command(STOP))));
            assert_eq!(found.next(), None);
            assert_eq!(rig.held.count(), BLOCKS * 4);
        }
        Ok(())
    }

    /// The device has no room for the commands of the second round when the third is asked for.
    #[test]
    fn a_command_that_cannot_be_sent_leaves_nothing_to_do() -> Result {
        const BLOCKS: usize = 3;
        let rig = Rig::new(1)?;
        rig.provide(BLOCKS)?;
        rig.command(FIRST);
        rig.work();
        rig.command(FIRST + 1);
        rig.work();
        rig.command(FIRST + 2);
        // On a slow machine a run may end early, and want another.
        assert!((0..100).any(|_| !rig.hinting.work()));
        // The worker tries again after longer and longer times.
        assert!(rig.hinting.round.lock().poll_interval > LOOK_MIN);
        let found = rig.settle()?;
        let third = found
            .iter()
            .skip_while(|it| **it != Found::Command(FIRST + 2));
        assert_eq!(third.filter(|found| **found == BLOCK).count(), BLOCKS);
        assert_eq!(found.last(), Some(&Found::Command(STOP)));
        Ok(())
    }

    /// Works until there is nothing to do, and returns in how many pieces. In none of them may more
    /// blocks be `done` than are allowed.
    fn pieces(rig: &Rig, done: impl Fn() -> usize) -> usize {
        let mut pieces = 0;
        loop {
            let before = done();
            let more = rig.hinting.work();
            pieces += 1;
            assert!(done() - before <= TURNS_BLOCKS);
            if !more {
                break pieces;
            }
        }
    }

    /// What the device has used goes to a task that finds no memory, also before the work item runs; a
    /// device that keeps its buffers is waited for once.
    #[test]
    fn a_task_without_memory_gets_what_the_device_has_used() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(2)?;
        rig.command(FIRST);
        rig.work();
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        rig.work();
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.held.count(), 0);
        assert_eq!(rig.hinting.give_back(0), 4);
        assert_eq!(rig.hinting.give_back(0), 0);
        assert!(rig.hinting.round.lock().silent);
        assert_eq!(rig.hinting.give_back(0), 0);
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.hinting.give_back(0), 4);
        assert_eq!(rig.counters.returned_pages.get(), 8);
        Ok(())
    }

    #[test]
    fn a_round_is_done_piece_by_piece() -> Result {
        const BLOCKS: usize = 2 * TURNS_BLOCKS + 1;
        let rig = Rig::new(128)?;
        rig.bound.device.answer_at_once(true);
        rig.provide(BLOCKS)?;
        let offered = || rig.counters.hinted_blocks.get() as usize;
        let released = || BLOCKS - rig.held.count() / 4;
        rig.command(FIRST);
        assert!(pieces(&rig, offered) > 2);
        assert_eq!((offered(), rig.held.count()), (BLOCKS, BLOCKS * 4));
        rig.command(DONE);
        assert!(pieces(&rig, released) > 2);
        assert_eq!(rig.held.count(), 0);
        assert_eq!(rig.counters.rounds_finished.get(), 1);
        Ok(())
    }

    #[test]
    fn before_the_system_sleeps_blocks_go_back_and_none_is_offered() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        rig.work();
        assert_eq!(rig.answer(), Some(BLOCK));
        // Two more are with the device, which answers when it is notified.
        rig.bound.device.answer_at_once(true);
        rig.hinting.asleep.store(true, Relaxed);
        rig.work();
        rig.bound.device.answer_at_once(false);
        while rig.answer().is_some() {}
        rig.hinting.prepare();
        assert_eq!(rig.held.count(), 0);
        let offered = rig.counters.hinted_blocks.get();
        assert!(offered < 8);
        rig.provide(5)?;
        assert!(rig.settle()?.is_empty());
        assert_eq!(rig.counters.hinted_blocks.get(), offered);
        rig.hinting.over();
        let found = rig.settle()?;
        assert_eq!(found.len(), 6);
        assert_eq!(found.last(), Some(&Found::Command(STOP)));
        Ok(())
    }

    #[test]
    fn a_device_that_keeps_its_buffers_does_not_keep_the_system_awake() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        let in_flight = rig.counters.hinted_blocks.get() as usize;
        assert!(in_flight > 1);
        rig.hinting.prepare();
        assert_eq!(rig.held.count(), 0);
        // It is not waited for a second time, before it answers.
        let awaits_device = || {
            let round = &mut rig.hinting.round.lock();
            rig.hinting.may_return_more(round, Instant::now())
        };
        assert!(!awaits_device());
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        assert!(awaits_device());
        rig.hinting.over();
        // It resumes with what comes back.
        let found = rig.settle()?;
        assert_eq!(found.len(), in_flight + 1);
        assert_eq!(rig.held.count(), in_flight * 4);
        Ok(())
    }

    #[test]
    fn a_driver_that_goes_does_not_wait_for_the_device() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        let awaits_device = || {
            let round = &mut rig.hinting.round.lock();
            rig.hinting.may_return_more(round, Instant::now())
        };
        assert!(awaits_device());
        rig.hinting.disable();
        assert!(!awaits_device());
        Ok(())
    }

    #[test]
    fn after_a_reset_blocks_go_back_from_the_ring_too_without_their_content() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        rig.work();
        assert!(rig.held.count() < 8 * 4);
        rig.bound.reset();
        rig.hinting.recover();
        assert_eq!(rig.held.count(), 0);
        let fills = state::allocator_fills_pages();
        let zeroed = rig.counters.zeroed_pages.get();
        assert_eq!(zeroed, if fills { 0 } else { 8 * 4 });
        Ok(())
    }

    /// The device is done with the round, and returns what was still in flight only then.
    #[test]
    fn who_finds_no_memory_gets_what_the_device_returns_at_last() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        rig.command(DONE);
        rig.work();
        assert_eq!(rig.held.count(), 0);
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.hinting.give_back(0), 4);
        Ok(())
    }

    #[test]
    fn blocks_in_memory_that_goes_offline_go_back() -> Result {
        let rig = Rig::new(4)?;
        let block = PageBlock::take_free(2).ok_or(ENOMEM)?;
        let address = block.address();
        rig.held.hold_again(LentBlock::new(block));
        rig.provide(3)?;
        rig.command(FIRST);
        assert_eq!(rig.settle()?.len(), 6);
        rig.hinting.going_offline(address..address + 4096);
        assert_eq!(rig.held.count(), 12);
        // The round has ended, and nothing is offered.
        assert!(rig.settle()?.is_empty());
        rig.command(FIRST + 1);
        assert_eq!(rig.settle()?.len(), 5);
        Ok(())
    }
}
