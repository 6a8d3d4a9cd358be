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
//! A block is owned by the queue while it is in flight, by [`HintedBlocks`] until the device is done with
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
use super::free_block_allocator::{FreeBlockAllocator, Limits};
use super::hinted_blocks::HintedBlocks;
use super::timeout;
use crate::mm::{page_alloc, HintedBlock, OnMemoryOffline, OnOutOfMemory, OnSystemSleep, Shrink};
use crate::shared_abi::command::CommandId;
use crate::shared_abi::hinting::driver::{self, Action, Event};
use crate::shared_abi::queue::Queue;
use crate::virtio::work::{
    self, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem, WorkQueue,
};
use crate::virtio::{AddError, AddFailure, Either, Outgoing, Virtqueue};

/// A command id as the device reads it: little-endian.
type CmdIdBuffer = Outgoing<[u8; 4]>;

/// What travels on the free page queue.
pub(crate) type HintBuffer = Either<CmdIdBuffer, HintedBlock>;

/// How many command buffers there are: a stop and a start for the current round and for the last,
/// which the device may not have returned yet.
const CMD_ID_BUFFERS: usize = 4;
/// The entries of the ring that blocks leave free, so that a stop can be sent at once.
const CMD_ID_RESERVED_ENTRIES: usize = 1;
/// The part of all memory that may be in flight at a time. A device that stops answering keeps no
/// more from the guest; what has come back, the guest can take.
const IN_FLIGHT_SHARE: usize = 4;

/// How much is done at a time: so many blocks, and so long.
const WORK_BUDGET_BLOCKS: usize = 256;
const WORK_BUDGET_TIME: Delta = Delta::from_millis(5);
/// How many pages of hinted blocks a task that found no memory gets at a time.
const OOM_PAGES: usize = 1024;

/// If the page allocator is so slow that filling the ring takes longer than this (it may have to
/// clear each block), the device is notified on the way, to work meanwhile.
const MAX_KICK_DELAY: Delta = Delta::from_millis(100);
/// How long to wait for an interrupt before looking without one: doubled as long as nothing comes,
/// from the one to the other.
const POLL_INTERVAL_MIN: Msecs = 8;
const POLL_INTERVAL_MAX: Msecs = 1024;

/// How long the ring is watched without anything coming back, before an interrupt is asked for.
const BUSY_POLL_BUDGET: Delta = Delta::from_micros(500);

const WORK: u64 = 1;
const POLL: u64 = 2;

/// The driver's side of free page hinting.
#[pin_data]
pub(crate) struct Hinting {
    config: BalloonConfig,
    queue: Virtqueue<HintBuffer>,
    limits: Limits,
    /// The device may show a new command id. It is read only then: QEMU's device shows STOP again
    /// once a round has started, and does not mean it.
    cmd_id_changed: AtomicFlag,
    /// The driver goes: no more is offered.
    stopping: AtomicFlag,
    /// The system sleeps, or is about to: nothing is offered.
    asleep: AtomicFlag,
    /// How many callers have memory on its way offline: nothing is offered meanwhile.
    offlining: Atomic<u32>,
    #[pin]
    inner: Mutex<HintingInner>,
    hinted_blocks: Arc<HintedBlocks>,
    counters: Arc<Counters>,
    #[pin]
    work: DelayedWork<Self, WORK>,
    #[pin]
    poll: DelayedWork<Self, POLL>,
}

struct HintingInner {
    machine: driver::State,
    /// Counts rounds; each block is tagged with that in which it was offered last.
    generation: u16,
    /// The round up to which the device was done with all blocks when it last said so.
    done: u16,
    /// Where new blocks come from while blocks are being offered.
    allocator: Option<FreeBlockAllocator>,
    /// Commands that are to be sent, the first one first.
    pending_cmd_ids: [Option<CommandId>; 2],
    /// The command buffers that are not in flight. Has room for all.
    spare: KVec<CmdIdBuffer>,
    in_flight_pages: usize,
    /// The buffers in flight of which the device was notified, as far as it uses them in order.
    kicked_buffers: usize,
    /// The others.
    pending_kick: usize,
    /// When the device last returned a buffer.
    last_used: Instant<Monotonic>,
    /// When the device was notified last.
    last_kick: Instant<Monotonic>,
    /// There was no memory to give the device a buffer.
    short: bool,
    /// A wait for the device timed out, and it has returned no buffer since.
    timed_out: bool,
    /// When the round began.
    began: Instant<Monotonic>,
    /// The interval at which the worker polls for used buffers.
    poll_interval: Msecs,
}

impl_has_delayed_work! {
    impl HasDelayedWork<1> for Hinting { self.work }
    impl HasDelayedWork<2> for Hinting { self.poll }
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
        let mut spare = KVec::with_capacity(CMD_ID_BUFFERS, GFP_KERNEL)?;
        for _ in 0..CMD_ID_BUFFERS {
            spare.push(CmdIdBuffer::new([0; 4], GFP_KERNEL)?, GFP_KERNEL)?;
        }
        let inner = HintingInner {
            machine: driver::State::default(),
            generation: 0,
            done: 0,
            allocator: None,
            pending_cmd_ids: [None; 2],
            spare,
            in_flight_pages: 0,
            kicked_buffers: 0,
            pending_kick: 0,
            last_used: Instant::now(),
            last_kick: Instant::now(),
            short: false,
            timed_out: false,
            began: Instant::now(),
            poll_interval: POLL_INTERVAL_MIN,
        };
        let hinting = try_pin_init!(Self {
            config,
            queue: Virtqueue::new(c"free-page")?,
            limits,
            cmd_id_changed: AtomicFlag::new(true),
            stopping: AtomicFlag::new(false),
            asleep: AtomicFlag::new(false),
            offlining: Atomic::new(0),
            inner <- new_mutex!(inner, "Hinting::inner"),
            hinted_blocks: Arc::pin_init(HintedBlocks::new(counters.clone(), work_queue.clone()), GFP_KERNEL)?,
            counters,
            work <- new_delayed_work!(work_queue.clone(), "Hinting::work"),
            poll <- new_delayed_work!(work_queue, "Hinting::poll"),
        });
        Arc::pin_init(hinting, GFP_KERNEL)
    }

    /// The free page queue.
    pub(crate) fn queue(&self) -> &Virtqueue<HintBuffer> {
        &self.queue
    }

    /// The blocks that the guest may take back when it is short of memory.
    pub(crate) fn hinted_blocks(&self) -> Arc<HintedBlocks> {
        self.hinted_blocks.clone()
    }

    /// The device may show a new command id. Any context.
    pub(crate) fn cmd_id_changed(self: &Arc<Self>) {
        self.cmd_id_changed.store(true, Relaxed);
        self.wake();
    }

    /// The device has used buffers. Any context.
    pub(crate) fn used(self: &Arc<Self>) {
        self.wake();
    }

    /// Starts the work, unless it is queued already or disabled.
    fn wake(self: &Arc<Self>) {
        work::enqueue::<Self, WORK>(self);
    }

    /// Ends all work for good. May sleep, but does not wait for the device.
    ///
    /// Blocks in flight stay there, for the reset to bring back.
    pub(crate) fn disable(self: &Arc<Self>) {
        self.stopping.store(true, Relaxed);
        work::disable::<Self, POLL>(self);
        work::disable::<Self, WORK>(self);
        self.hinted_blocks.disable();
    }

    /// Whether offering is paused.
    fn is_paused(&self) -> bool {
        self.asleep.load(Relaxed) || self.offlining.load(Relaxed) > 0
    }

    /// Waits until nothing is in flight any more. It [is paused](Self::is_paused); the device may
    /// keep a block, but not hold this up for long, nor time and again. Ends when the driver goes.
    fn wait_for_device(&self) {
        let since = Instant::now();
        while self.may_return_more(&mut self.inner.lock(), since) {
            fsleep(Delta::from_millis(1));
        }
    }

    /// Collects what the device has returned. Returns whether to wait for more; the caller waits since
    /// `since`.
    fn may_return_more(&self, inner: &mut HintingInner, since: Instant<Monotonic>) -> bool {
        self.reap_used(inner);
        let is_over = self.stopping.load(Relaxed) || self.queue.is_broken();
        if is_over || !inner.any_in_flight() {
            return false;
        }
        self.notify(inner);
        let waited = since.elapsed();
        let limit = timeout::host();
        inner.timed_out |= waited > limit && inner.last_used.elapsed() > limit;
        // The device makes progress; only this caller stops waiting.
        !inner.timed_out && waited <= timeout::total()
    }

    /// Goes on after a pause, unless there is another.
    fn resume(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        if inner.allocator.is_some() {
            // What was given back may be had again, in large blocks.
            inner.allocator = Some(FreeBlockAllocator::new(self.limits, &self.counters));
        }
        drop(inner);
        self.wake();
    }

    /// Forgets the round, and gives all blocks back to the guest, filled with zeroes. To be called
    /// after the device's reset, which may be followed by new queues.
    ///
    /// May sleep, and take long.
    pub(crate) fn detach_unused(&self) {
        let mut inner = self.inner.lock();
        while let Some(buffer) = self.queue.detach_unused_buf() {
            match buffer {
                Either::Left(command) => {
                    // Its room is still there.
                    let _ = inner.spare.push_within_capacity(command);
                }
                // To clear it takes time: that is done below, without the lock.
                Either::Right(block) => self.hinted_blocks.insert(block),
            }
        }
        // What it would have done with the blocks has no sense without the device.
        inner.machine = driver::State::default();
        inner.allocator = None;
        inner.pending_cmd_ids = [None; 2];
        inner.done = inner.generation;
        inner.in_flight_pages = 0;
        (inner.kicked_buffers, inner.pending_kick) = (0, 0);
        (inner.short, inner.timed_out) = (false, false);
        inner.poll_interval = POLL_INTERVAL_MIN;
        drop(inner);
        self.hinted_blocks.free_all();
    }

    /// Takes back the buffers that the device has used. Returns whether there was any.
    fn reap_used(&self, inner: &mut HintingInner) -> bool {
        let mut any = false;
        while let Some((buffer, _)) = self.queue.get_buf() {
            any = true;
            inner.timed_out = false;
            inner.last_used = Instant::now();
            inner.poll_interval = POLL_INTERVAL_MIN;
            inner.count_used();
            match buffer {
                Either::Left(command) => {
                    // Its room is still there: commands are only ever taken and put back.
                    let _ = inner.spare.push_within_capacity(command);
                }
                Either::Right(block) => {
                    let pages = block.block().pages();
                    inner.in_flight_pages = inner.in_flight_pages.saturating_sub(pages);
                    self.complete_block(inner, block);
                }
            }
        }
        any
    }

    /// Whether there is a new command id to read, or the driver goes.
    ///
    /// While a command waits for room, no command id is read: what may have changed is no news then.
    /// The device's answer starts the work again, or the timer does.
    fn has_pending_event(&self, inner: &HintingInner) -> bool {
        let may_handle_cmd_id = inner.all_sent() && self.cmd_id_changed.load(Relaxed);
        may_handle_cmd_id || self.stopping.load(Relaxed)
    }

    /// Finds the place of a block that the device has returned.
    fn complete_block(&self, inner: &HintingInner, block: HintedBlock) {
        let tag = block.block().tag();
        if inner.is_done(tag) {
            self.hinted_blocks.release_block(block);
        } else if tag == inner.generation {
            self.hinted_blocks.insert(block);
        } else {
            self.hinted_blocks.insert_to_reoffer(block);
        }
    }

    /// Reads the command id, if it may have changed, and does what follows from it.
    fn handle_cmd_id(&self, inner: &mut HintingInner) -> Result {
        if self.cmd_id_changed.xchg(false, Relaxed) {
            let command = self.config.free_page_hint_cmd_id()?;
            self.step(inner, Event::ConfigChanged(command));
        }
        Ok(())
    }

    fn step(&self, inner: &mut HintingInner, event: Event) {
        let (next, actions) = inner.machine.step(event);
        inner.machine = next;
        for action in actions {
            match action {
                Action::SendStart(id) => {
                    inner.generation = inner.generation.wrapping_add(1);
                    inner.queue_cmd_id(CommandId::from_number(id.number()));
                    inner.allocator = Some(FreeBlockAllocator::new(self.limits, &self.counters));
                    inner.began = Instant::now();
                    self.counters.hint_round_started(id.number());
                    self.hinted_blocks.decay_reclaimed();
                }
                Action::ReofferHinted => self.hinted_blocks.reoffer_all(),
                Action::SendStop => {
                    inner.allocator = None;
                    inner.queue_cmd_id(CommandId::Stop);
                    self.counters.hint_round_stopped(inner.age_us());
                }
                Action::ReleaseHinted => {
                    inner.done = inner.generation;
                    self.hinted_blocks.release();
                }
            }
        }
    }

    /// Sends the commands that are to be sent. Returns whether all of them went.
    fn send_cmd_ids(&self, inner: &mut HintingInner) -> Result<bool> {
        while let [Some(command), next] = inner.pending_cmd_ids {
            let Some(mut buffer) = inner.spare.pop() else {
                return Ok(false);
            };
            *buffer = command.number().to_le_bytes();
            if let Err(AddError { buffer, failure }) = self.queue.add(Either::Left(buffer)) {
                if let Either::Left(buffer) = buffer {
                    let _ = inner.spare.push_within_capacity(buffer);
                }
                inner.not_added(failure)?;
                return Ok(false);
            }
            inner.pending_cmd_ids = [next, None];
            inner.pending_kick += 1;
        }
        Ok(true)
    }

    /// Offers blocks until the ring is full or enough of the memory is in flight, there is news, or
    /// no block is left.
    fn offer(&self, inner: &mut HintingInner, budget: &mut WorkBudget) -> Result {
        let limit = page_alloc::managed_pages() / IN_FLIGHT_SHARE;
        // A ring of one entry has none to leave free.
        let left_free = CMD_ID_RESERVED_ENTRIES.min(self.queue.entries().saturating_sub(1));
        while !self.has_pending_event(inner) && !self.is_paused() && !budget.is_spent() {
            if inner.in_flight_pages >= limit || self.queue.free_entries() <= left_free {
                break;
            }
            let Some(allocator) = &mut inner.allocator else {
                break;
            };
            let block = self.hinted_blocks.next_to_reoffer().or_else(|| {
                let block = allocator.next(self.hinted_blocks.reclaimed(), &self.counters);
                block.map(HintedBlock::new)
            });
            let Some(mut block) = block else {
                self.finish(inner);
                break;
            };
            budget.blocks = budget.blocks.saturating_sub(1);
            let earlier = block.block().tag();
            let (address, order, pages, bytes) = {
                let block = block.block();
                (block.address(), block.order(), block.pages(), block.size())
            };
            block.set_tag(inner.generation);
            if let Err(AddError { buffer, failure }) = self.queue.add(Either::Right(block)) {
                if let Either::Right(mut block) = buffer {
                    block.set_tag(earlier);
                    self.hinted_blocks.insert_to_reoffer(block);
                }
                return inner.not_added(failure);
            }
            inner.in_flight_pages += pages;
            inner.pending_kick += 1;
            self.counters.hinted(address, order, bytes);
            work::cond_resched();
            if inner.last_kick.elapsed() > MAX_KICK_DELAY {
                self.notify(inner);
            }
        }
        Ok(())
    }

    /// Gives blocks back that the device is done with, while there is no news.
    fn release(&self, inner: &HintingInner, budget: &mut WorkBudget) {
        while !self.has_pending_event(inner)
            && !budget.is_spent()
            && self.hinted_blocks.release_one()
        {
            budget.blocks = budget.blocks.saturating_sub(1);
            work::cond_resched();
        }
    }

    /// Nothing is left to offer.
    fn finish(&self, inner: &mut HintingInner) {
        self.step(inner, Event::Exhausted);
        self.counters.rounds_finished.add(1);
        self.counters.last_round_us.set(inner.age_us());
    }

    /// Lets the device know of new buffers, if there are any.
    fn notify(&self, inner: &mut HintingInner) {
        if inner.pending_kick > 0 {
            inner.kicked_buffers += inner.pending_kick;
            inner.pending_kick = 0;
            inner.last_kick = Instant::now();
            self.counters.kicked(Queue::FreePage, self.queue.kick());
        }
    }

    /// Looks after the buffers in flight later, should no interrupt come; or after memory.
    fn schedule_poll(self: &Arc<Self>, inner: &mut HintingInner) {
        if !inner.any_in_flight() && !inner.short {
            return;
        }
        let delay = msecs_to_jiffies(inner.poll_interval);
        inner.poll_interval = (inner.poll_interval * 2).min(POLL_INTERVAL_MAX);
        work::enqueue_delayed::<Self, POLL>(self, delay);
    }

    /// Takes turns for as long as the device keeps up and there is a budget. On return nothing is in
    /// flight any more, or nothing has come back for a while, and the device knows of everything; or
    /// the budget is spent. Fails if the device is gone.
    fn busy_poll(&self, inner: &mut HintingInner, budget: &mut WorkBudget) -> Result {
        let mut last: Instant<Monotonic> = Instant::now();
        loop {
            let result = self.process(inner, budget);
            if result.is_err() || inner.is_kick_due() {
                self.notify(inner);
            }
            result?;
            work::cond_resched();
            loop {
                if budget.is_spent() {
                    return Ok(());
                }
                if self.has_pending_event(inner) {
                    break;
                }
                if self.reap_used(inner) {
                    last = Instant::now();
                    break;
                }
                if !inner.any_in_flight() || last.elapsed() > BUSY_POLL_BUDGET {
                    self.notify(inner);
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
    fn process(&self, inner: &mut HintingInner, budget: &mut WorkBudget) -> Result {
        inner.short = false;
        self.reap_used(inner);
        let mut all_sent = self.send_cmd_ids(inner)?;
        if all_sent {
            // Only then, lest a command overtakes one that is waiting for room.
            self.handle_cmd_id(inner)?;
            all_sent = self.send_cmd_ids(inner)?;
        }
        if all_sent {
            self.offer(inner, budget)?;
            self.send_cmd_ids(inner)?;
        }
        self.release(inner, budget);
        Ok(())
    }
}

/// What may be done at a time.
struct WorkBudget {
    blocks: usize,
    began: Instant<Monotonic>,
}

impl WorkBudget {
    fn new() -> Self {
        Self {
            blocks: WORK_BUDGET_BLOCKS,
            began: Instant::now(),
        }
    }

    fn is_spent(&self) -> bool {
        self.blocks == 0 || self.began.elapsed() > WORK_BUDGET_TIME
    }
}

impl HintingInner {
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
        self.pending_cmd_ids[0].is_none()
    }

    fn any_in_flight(&self) -> bool {
        self.kicked_buffers > 0 || self.pending_kick > 0
    }

    /// A buffer came back.
    fn count_used(&mut self) {
        let count = if self.kicked_buffers > 0 {
            &mut self.kicked_buffers
        } else {
            &mut self.pending_kick
        };
        *count = count.saturating_sub(1);
    }

    /// Whether the device should be notified now of what it does not know of. It would otherwise
    /// have nothing to do soon, or there is no more to come.
    fn is_kick_due(&self) -> bool {
        self.allocator.is_none() || self.kicked_buffers <= self.pending_kick / 8
    }

    fn queue_cmd_id(&mut self, command: CommandId) {
        // Commands come from `step` only when the outbox is empty, and at most two at a time.
        if let Some(slot) = self.pending_cmd_ids.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(command);
        }
    }

    /// Whether the device has said that it is done with the blocks of the round with this number.
    fn is_done(&self, generation: u16) -> bool {
        self.generation.wrapping_sub(generation) >= self.generation.wrapping_sub(self.done)
    }
}

impl Hinting {
    /// Works until there is nothing to do for the moment, or enough was done: then there is more to
    /// do, and this returns true.
    fn work(self: &Arc<Self>) -> bool {
        let mut inner = self.inner.lock();
        let mut budget = WorkBudget::new();
        while !self.stopping.load(Relaxed) {
            self.queue.disable_callback();
            if self.busy_poll(&mut inner, &mut budget).is_err() {
                break;
            }
            if budget.is_spent() {
                return true;
            }
            let quiet = self.queue.enable_callback_delayed();
            if quiet && !self.has_pending_event(&inner) {
                self.schedule_poll(&mut inner);
                break;
            }
        }
        false
    }
}

/// The work proper.
impl WorkItem<1> for Hinting {
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
        let inner = self.inner.lock();
        self.hinted_blocks.free_in_range(&range);
        drop(inner);
        self.offlining.fetch_sub(1, Relaxed);
        self.resume();
    }
}

/// Blocks that are with the device come back in a moment: no process is killed for want of them.
///
/// This runs within an allocation, perhaps one of the work item's own (some transports allocate to read
/// configuration space): so it takes the round's lock only if nobody has it.
impl OnOutOfMemory for Hinting {
    fn oom_notify(self: &Arc<Self>, already_freed: usize) -> usize {
        if already_freed > 0 {
            return 0;
        }
        let since: Instant<Monotonic> = Instant::now();
        let before = self.hinted_blocks.total_freed();
        // Pages that other tasks have given back since are free as well.
        let freed = || self.hinted_blocks.total_freed().wrapping_sub(before);
        loop {
            let may_come = match self.inner.try_lock() {
                Some(mut inner) => self.may_return_more(&mut inner, since),
                // Perhaps held by the very task that finds no memory.
                None => !self.stopping.load(Relaxed) && since.elapsed() < timeout::host(),
            };
            if freed() == 0 {
                self.hinted_blocks.scan(OOM_PAGES);
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
impl OnSystemSleep for Hinting {
    fn prepare_sleep(self: &Arc<Self>) {
        self.asleep.store(true, Relaxed);
        self.wait_for_device();
        self.hinted_blocks.free_all();
    }

    fn post_sleep(self: &Arc<Self>) {
        self.asleep.store(false, Relaxed);
        self.resume();
    }
}

/// What comes instead of an interrupt: the work proper.
impl WorkItem<2> for Hinting {
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
    use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};

    const STOP: u32 = 0;
    const DONE: u32 = 1;
    const FIRST: u32 = 0x8000_0000;

    /// What the device finds on the free page queue.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Found {
        Command(u32),
        /// A block of so many bytes.
        FreeBlock(u32),
    }

    /// The driver's hinting and its device, whose answers the test gives. It finds no free block: what it
    /// offers are blocks that are to be offered again.
    struct Rig {
        hinting: Arc<Hinting>,
        hinted_blocks: Arc<HintedBlocks>,
        counters: Arc<Counters>,
        // Last: the others have references to the device.
        bound: BoundTestDevice,
    }

    impl Rig {
        fn new(entries: usize) -> Result<Self> {
            let features = Features::FREE_PAGE_HINT.bits();
            let bound = BoundTestDevice::with_features(entries, features)?;
            let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
            let hinting = Hinting::new(
                BalloonConfig::new(bound.config()?),
                WorkQueue::new(c"kunit")?,
                counters.clone(),
                Limits::nothing(),
            )?;
            // The test does the work.
            work::disable::<Hinting, POLL>(&hinting);
            work::disable::<Hinting, WORK>(&hinting);
            let hinted_blocks = hinting.hinted_blocks();
            hinted_blocks.disable();
            bound.find_queues(&[hinting.queue()], CountingHandler::new()?)?;
            Ok(Self {
                hinting,
                hinted_blocks,
                counters,
                bound,
            })
        }

        /// Has so many blocks of four pages to be offered.
        fn provide(&self, blocks: usize) -> Result {
            for _ in 0..blocks {
                let block = PageBlock::try_alloc(2).ok_or(ENOMEM)?;
                self.hinted_blocks
                    .insert_to_reoffer(HintedBlock::new(block));
            }
            Ok(())
        }

        fn command(&self, id: u32) {
            let at = config::FREE_PAGE_HINT_CMD_ID;
            self.bound.device.set_config(at, id);
            self.hinting.cmd_id_changed();
        }

        /// Works until there is nothing to do. The device does nothing meanwhile.
        fn work(&self) {
            while self.hinting.work() {}
        }

        /// Lets the device use one buffer.
        fn answer(&self) -> Option<Found> {
            let chain = self.bound.device.pop_descriptor_chain(0)?;
            let segment = chain.segments.first()?;
            let found = if segment.writable {
                Found::FreeBlock(segment.length)
            } else {
                Found::Command(segment.first_word())
            };
            self.bound.device.add_used(0, chain.head, 0);
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
            self.hinting.detach_unused();
            assert_eq!(self.hinted_blocks.count(), 0);
        }
    }

    const BLOCK: Found = Found::FreeBlock(4 * 4096);

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
            assert_eq!(rig.hinted_blocks.count(), BLOCKS * 4);
            rig.command(DONE);
            assert!(rig.settle()?.is_empty());
            assert_eq!(rig.hinted_blocks.count(), 0);
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
            assert_eq!(rig.hinted_blocks.count(), BLOCKS * 4);
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
        assert!(rig.hinting.inner.lock().poll_interval > POLL_INTERVAL_MIN);
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
            assert!(done() - before <= WORK_BUDGET_BLOCKS);
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
        assert_eq!(rig.hinted_blocks.count(), 0);
        assert_eq!(rig.hinting.oom_notify(0), 4);
        assert_eq!(rig.hinting.oom_notify(0), 0);
        assert!(rig.hinting.inner.lock().timed_out);
        assert_eq!(rig.hinting.oom_notify(0), 0);
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.hinting.oom_notify(0), 4);
        assert_eq!(rig.counters.returned_pages.get(), 8);
        Ok(())
    }

    #[test]
    fn a_round_is_done_piece_by_piece() -> Result {
        const BLOCKS: usize = 2 * WORK_BUDGET_BLOCKS + 1;
        let rig = Rig::new(128)?;
        rig.bound.device.set_use_on_notify(true);
        rig.provide(BLOCKS)?;
        let offered = || rig.counters.hinted_blocks.get() as usize;
        let released = || BLOCKS - rig.hinted_blocks.count() / 4;
        rig.command(FIRST);
        assert!(pieces(&rig, offered) > 2);
        assert_eq!((offered(), rig.hinted_blocks.count()), (BLOCKS, BLOCKS * 4));
        rig.command(DONE);
        assert!(pieces(&rig, released) > 2);
        assert_eq!(rig.hinted_blocks.count(), 0);
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
        rig.bound.device.set_use_on_notify(true);
        rig.hinting.asleep.store(true, Relaxed);
        rig.work();
        rig.bound.device.set_use_on_notify(false);
        while rig.answer().is_some() {}
        rig.hinting.prepare_sleep();
        assert_eq!(rig.hinted_blocks.count(), 0);
        let offered = rig.counters.hinted_blocks.get();
        assert!(offered < 8);
        rig.provide(5)?;
        assert!(rig.settle()?.is_empty());
        assert_eq!(rig.counters.hinted_blocks.get(), offered);
        rig.hinting.post_sleep();
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
        rig.hinting.prepare_sleep();
        assert_eq!(rig.hinted_blocks.count(), 0);
        // It is not waited for a second time, before it answers.
        let awaits_device = || {
            let inner = &mut rig.hinting.inner.lock();
            rig.hinting.may_return_more(inner, Instant::now())
        };
        assert!(!awaits_device());
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        assert!(awaits_device());
        rig.hinting.post_sleep();
        // It resumes with what comes back.
        let found = rig.settle()?;
        assert_eq!(found.len(), in_flight + 1);
        assert_eq!(rig.hinted_blocks.count(), in_flight * 4);
        Ok(())
    }

    #[test]
    fn a_driver_that_goes_does_not_wait_for_the_device() -> Result {
        let rig = Rig::new(4)?;
        rig.provide(8)?;
        rig.command(FIRST);
        rig.work();
        let awaits_device = || {
            let inner = &mut rig.hinting.inner.lock();
            rig.hinting.may_return_more(inner, Instant::now())
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
        assert!(rig.hinted_blocks.count() < 8 * 4);
        rig.bound.reset();
        rig.hinting.detach_unused();
        assert_eq!(rig.hinted_blocks.count(), 0);
        let fills = page_alloc::allocator_fills_pages();
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
        assert_eq!(rig.hinted_blocks.count(), 0);
        assert_eq!(rig.answer(), Some(Found::Command(FIRST)));
        assert_eq!(rig.answer(), Some(BLOCK));
        assert_eq!(rig.hinting.oom_notify(0), 4);
        Ok(())
    }

    #[test]
    fn blocks_in_memory_that_goes_offline_go_back() -> Result {
        let rig = Rig::new(4)?;
        let block = PageBlock::try_alloc(2).ok_or(ENOMEM)?;
        let address = block.address();
        rig.hinted_blocks.insert_to_reoffer(HintedBlock::new(block));
        rig.provide(3)?;
        rig.command(FIRST);
        assert_eq!(rig.settle()?.len(), 6);
        rig.hinting.going_offline(address..address + 4096);
        assert_eq!(rig.hinted_blocks.count(), 12);
        // The round has ended, and nothing is offered.
        assert!(rig.settle()?.is_empty());
        rig.command(FIRST + 1);
        assert_eq!(rig.settle()?.len(), 5);
        Ok(())
    }
}
