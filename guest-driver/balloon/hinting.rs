// SPDX-License-Identifier: GPL-2.0

//! Free page hinting: offers free blocks to the device on the free page queue.
//!
//! The state machine [`driver::State`] decides what to do; this file does it, in one work item. The
//! work item never sleeps to wait for the device. It reaps used buffers, fills the ring, notifies
//! the device once, and returns; the next interrupt starts it again. It checks for a new command id
//! before each free block, and a removal never waits for a used buffer. The work item also returns
//! when its budget is spent (256 free blocks or 5 ms) and queues itself again, so neither the
//! freezer nor a task that needs the lock waits for long.
//!
//! The queue owns a hinted block while it is in flight, [`HintedBlocks`] until DONE, and the page
//! allocator before and after that. No other owner can free a hinted block in flight, so the driver
//! keeps its promise `KEEPS_HINTED_UNTIL_RETURNED` by construction.
//!
//! The folder has the rest: [`poll`] runs the work item, and
//! [`notifiers`] pause the hint round or take hinted blocks from it.

mod budget;
mod notifiers;
mod poll;
#[cfg(CONFIG_KUNIT = "y")]
mod tests_rig;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, AtomicFlag, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::{Instant, Monotonic, Msecs};

use self::budget::{WorkBudget, MAX_KICK_DELAY, POLL_INTERVAL_MIN};
use super::config::BalloonConfig;
use super::counters::Counters;
use super::free_block_allocator::FreeBlockAllocator;
use super::hint_reserve::Limits;
use super::hinted_blocks::HintedBlocks;
use crate::mm::{page_alloc, HintedBlock};
use crate::shared_abi::command::CommandId;
use crate::shared_abi::hinting::driver::{self, Action, Event};
use crate::shared_abi::queue::Queue;
use crate::virtio::work::{self, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkQueue};
use crate::virtio::{AddError, AddFailure, Either, Outgoing, Virtqueue};

/// A buffer with a command id, little-endian.
type CmdIdBuffer = Outgoing<[u8; 4]>;

/// A buffer on the free page queue: a command id or a hinted block.
pub(crate) type HintBuffer = Either<CmdIdBuffer, HintedBlock>;

/// The number of command buffers: a STOP and a start for the current hint round, and for the
/// previous one, whose buffers may still be in flight.
const CMD_ID_BUFFERS: usize = 4;
/// The number of ring entries that hinted blocks leave free, so that a STOP can be sent at once.
const CMD_ID_RESERVED_ENTRIES: usize = 1;
/// The limit of memory in flight, as a divisor of the guest's memory: 1/4. A device that stops
/// using buffers withholds at most that much. The guest can reclaim hinted blocks whose buffers are
/// used.
const IN_FLIGHT_SHARE: usize = 4;

const WORK: u64 = 1;
const POLL: u64 = 2;

/// Free page hinting of one device.
#[pin_data]
pub(crate) struct Hinting {
    config: BalloonConfig,
    queue: Virtqueue<HintBuffer>,
    limits: Limits,
    /// Whether config space may contain a new command id. The driver reads the id only if this is
    /// set: QEMU's device shows STOP as soon as it has seen the start of a hint round, and does not
    /// mean it.
    cmd_id_changed: AtomicFlag,
    /// Whether the driver is being unbound or shut down. No free block is offered then.
    stopping: AtomicFlag,
    /// Whether the system sleeps or is about to. No free block is offered then.
    asleep: AtomicFlag,
    /// The number of memory ranges that are going offline. No free block is offered while there are
    /// any.
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
    /// The number of the current hint round. Wraps. Each hinted block is tagged with the hint round
    /// that offered it last.
    generation: u16,
    /// The number of the last hint round whose hinted blocks the device no longer needs (DONE).
    done: u16,
    /// The source of free blocks while a hint round runs.
    allocator: Option<FreeBlockAllocator>,
    /// Command ids to send, in this order.
    pending_cmd_ids: [Option<CommandId>; 2],
    /// The command buffers that are not in flight. Has capacity for all.
    spare: KVec<CmdIdBuffer>,
    in_flight_pages: usize,
    /// The number of buffers in flight of which the device was notified, if it uses buffers in
    /// order.
    kicked_buffers: usize,
    /// The number of buffers in flight of which the device was not notified yet.
    pending_kick: usize,
    /// The time of the last used buffer.
    last_used: Instant<Monotonic>,
    /// The time of the last notification.
    last_kick: Instant<Monotonic>,
    /// Whether memory was too short to add a buffer to the queue.
    short: bool,
    /// Whether a wait for the device timed out and the device has used no buffer since.
    timed_out: bool,
    /// The time when the hint round started.
    began: Instant<Monotonic>,
    /// The next polling interval of the timer.
    poll_interval: Msecs,
}

impl_has_delayed_work! {
    impl HasDelayedWork<1> for Hinting { self.work }
    impl HasDelayedWork<2> for Hinting { self.poll }
}

impl Hinting {
    /// Creates the hinting state of a device, with no hint round. Hinting stays within `limits`.
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
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

    /// Returns the free page queue.
    pub(crate) fn queue(&self) -> &Virtqueue<HintBuffer> {
        &self.queue
    }

    /// Returns the hinted blocks, which the guest reclaims if it is short of memory.
    pub(crate) fn hinted_blocks(&self) -> Arc<HintedBlocks> {
        self.hinted_blocks.clone()
    }

    /// Handles a config change: the device may show a new command id. Any context but NMI.
    pub(crate) fn cmd_id_changed(self: &Arc<Self>) {
        self.cmd_id_changed.store(true, Relaxed);
        self.wake();
    }

    /// Handles an interrupt of the free page queue. Any context but NMI.
    pub(crate) fn used(self: &Arc<Self>) {
        self.wake();
    }

    /// Queues the work item, unless it is queued or disabled.
    fn wake(self: &Arc<Self>) {
        work::enqueue::<Self, WORK>(self);
    }

    /// Disables all work items permanently. May sleep, but does not wait for the device.
    ///
    /// Hinted blocks in flight are recovered after the device reset, by
    /// [`detach_unused`](Self::detach_unused).
    pub(crate) fn disable(self: &Arc<Self>) {
        self.stopping.store(true, Relaxed);
        work::disable::<Self, POLL>(self);
        work::disable::<Self, WORK>(self);
        self.hinted_blocks.disable();
    }

    /// Returns whether the hint round is paused.
    fn is_paused(&self) -> bool {
        self.asleep.load(Relaxed) || self.offlining.load(Relaxed) > 0
    }

    /// Ends the hint round after a device reset and returns all hinted blocks to the page
    /// allocator.
    ///
    /// Hinted blocks without DONE are cleared if the page allocator does not initialise pages. The
    /// queue may get a new ring afterwards. May sleep and take long.
    pub(crate) fn detach_unused(&self) {
        let mut inner = self.inner.lock();
        while let Some(buffer) = self.queue.detach_unused_buf() {
            match buffer {
                Either::Left(command) => {
                    // Cannot fail: `spare` has capacity for all command buffers.
                    let _ = inner.spare.push_within_capacity(command);
                }
                // Clearing takes long, so `free_all` below does it, without the lock.
                Either::Right(block) => self.hinted_blocks.insert(block),
            }
        }
        // Not by `Event::Reset`: its action `ReleaseHinted` would free hinted blocks with their
        // content.
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

    /// Takes back used buffers. Returns whether there were any.
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
                    // Cannot fail: `spare` has capacity for all command buffers.
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

    /// Returns whether the work item has to read a command id, or has to stop.
    ///
    /// While a command id is waiting to be sent, a new one is not read. The next used buffer starts
    /// the work item again, or the timer does.
    fn has_pending_event(&self, inner: &HintingInner) -> bool {
        let may_handle_cmd_id = inner.all_sent() && self.cmd_id_changed.load(Relaxed);
        may_handle_cmd_id || self.stopping.load(Relaxed)
    }

    /// Files a hinted block whose buffer the device has used.
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

    /// Reads the command id if it may have changed, and steps the state machine.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the queue is broken or the device is unbound.
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

    /// Sends the pending command ids. Returns whether all were sent.
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

    /// Offers free blocks until the ring is full, the limit of memory in flight is reached, an
    /// event is pending, hinting pauses, the budget is spent, or no free block is left.
    fn offer(&self, inner: &mut HintingInner, budget: &mut WorkBudget) -> Result {
        let limit = page_alloc::managed_pages() / IN_FLIGHT_SHARE;
        // A ring of one entry has no entry to spare.
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

    /// Frees released hinted blocks until none is left, an event is pending, or the budget is
    /// spent.
    fn release(&self, inner: &HintingInner, budget: &mut WorkBudget) {
        while !self.has_pending_event(inner)
            && !budget.is_spent()
            && self.hinted_blocks.release_one()
        {
            budget.blocks = budget.blocks.saturating_sub(1);
            work::cond_resched();
        }
    }

    /// Ends the hint round: no free block is left to offer.
    fn finish(&self, inner: &mut HintingInner) {
        self.step(inner, Event::Exhausted);
        self.counters.rounds_finished.add(1);
        self.counters.last_round_us.set(inner.age_us());
    }

    /// Notifies the device of buffers that it does not know of yet.
    fn notify(&self, inner: &mut HintingInner) {
        if inner.pending_kick > 0 {
            inner.kicked_buffers += inner.pending_kick;
            inner.pending_kick = 0;
            inner.last_kick = Instant::now();
            self.counters.kicked(Queue::FreePage, self.queue.kick());
        }
    }

    /// Does everything that is possible now, within `budget`.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the queue is broken or the device is unbound.
    fn process(&self, inner: &mut HintingInner, budget: &mut WorkBudget) -> Result {
        inner.short = false;
        self.reap_used(inner);
        let mut all_sent = self.send_cmd_ids(inner)?;
        if all_sent {
            // Only if no command id is waiting for room, because a new one must not overtake it.
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

impl HintingInner {
    /// Handles a buffer that could not be added to the queue. With a full ring, hinting waits for
    /// used buffers; without memory, for the timer.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the queue is broken or the device is unbound.
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

    /// Returns the time since the hint round started, in microseconds.
    fn age_us(&self) -> u64 {
        self.began.elapsed().as_micros_ceil().max(0) as u64
    }

    /// Returns whether no command id is waiting to be sent.
    fn all_sent(&self) -> bool {
        self.pending_cmd_ids[0].is_none()
    }

    fn any_in_flight(&self) -> bool {
        self.kicked_buffers > 0 || self.pending_kick > 0
    }

    /// Counts a used buffer.
    fn count_used(&mut self) {
        let count = if self.kicked_buffers > 0 {
            &mut self.kicked_buffers
        } else {
            &mut self.pending_kick
        };
        *count = count.saturating_sub(1);
    }

    fn queue_cmd_id(&mut self, command: CommandId) {
        // A slot is free: `step` runs only after all command ids were sent, and queues at most two.
        if let Some(slot) = self.pending_cmd_ids.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(command);
        }
    }

    /// Returns whether the device no longer needs the hinted blocks of hint round `generation`
    /// (DONE).
    fn is_done(&self, generation: u16) -> bool {
        self.generation.wrapping_sub(generation) >= self.generation.wrapping_sub(self.done)
    }
}

#[kunit_tests(virtio_balloon_rs_hinting)]
mod tests {
    use super::tests_rig::*;
    use super::*;
    use crate::mm::Shrink;

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
            // R16: the hinted blocks are kept until DONE.
            assert_eq!(rig.hinted_blocks.count(), BLOCKS * 4);
            rig.command(DONE);
            assert!(rig.settle()?.is_empty());
            assert_eq!(rig.hinted_blocks.count(), 0);
            assert_eq!(rig.counters.zeroed_pages.get(), 0);
        }
        Ok(())
    }

    /// R2: the old hint round is stopped, and its hinted blocks are offered again.
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
}
