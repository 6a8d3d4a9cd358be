// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtqueues: takes requests, processes them, and returns their buffers. The caller holds the device's lock.

use guest_migration::HintError;
use shared_abi::command::CommandId;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use tracing::warn;
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::connection::QueueCounters;
use super::hinting::Discard;
use super::pending_request::{PendingRequest, Work};
use super::queue_numbers::{meaning, Meaning};
use super::releases::Releases;
use super::request::{MemoryGuard, Request, RequestError, Segment, MAX_SEGMENTS};
use super::{hinting, pfn, stats, Device};
use crate::memory::{Part, ReleaseError};
use crate::vring::{Interrupt, NotificationSuppression, Vring};

/// Work units per turn of a queue. A unit is the work of about one system call. Between two turns the device's lock is
/// free, so this also limits how long QMP clients wait for it.
pub(super) const DRAIN_BUDGET: usize = 1 << 10;

/// The number of released bytes that cost as much as a system call.
const RELEASED_BYTES_PER_UNIT: u64 = 1 << 16;

/// The number of hinted bytes whose dirty bits cost as much as a system call.
const HINTED_BYTES_PER_UNIT: u64 = 1 << 28;

/// The number of descriptors that cost as much as a system call.
const SEGMENTS_PER_UNIT: usize = 16;

/// The number of page frame numbers whose reading and sorting costs as much as a system call.
const PFNS_PER_UNIT: usize = 256;

/// What becomes of a chain.
enum ChainOutcome {
    /// The buffer with this head is returned to the driver at once. It is usually that of the chain.
    Return(u16),
    /// The device keeps the buffer.
    Keep,
    /// The request has ranges to process.
    Pending(PendingRequest),
}

/// How a pass over the available buffers ended.
enum DrainOutcome {
    /// No more buffers are available. `taken` tells whether the pass took any.
    Empty { taken: bool },
    /// The budget of the turn is exhausted. More buffers may be available.
    BudgetExhausted,
    /// The ring cannot be read. The driver's next notification starts another attempt.
    Broken,
}

/// The context of one turn of a queue.
struct QueueContext<'a> {
    queue: Queue,
    index: usize,
    vring: &'a Vring,
    memory: MemoryGuard,
    /// The rest of [`DRAIN_BUDGET`].
    budget: usize,
    /// Whether a buffer was returned to the driver.
    returned: bool,
    /// The memory to release before the turn ends.
    releases: Releases,
}

impl<'a> QueueContext<'a> {
    fn new(
        queue: Queue,
        index: usize,
        vring: &'a Vring,
        memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> Self {
        Self {
            queue,
            index,
            vring,
            memory: memory.memory(),
            budget: DRAIN_BUDGET,
            returned: false,
            releases: Releases::default(),
        }
    }

    fn spend(&mut self, units: usize) {
        self.budget = self.budget.saturating_sub(units);
    }

    /// Returns a request's buffer to the driver, and its error if that is not possible.
    fn give_back(&mut self, head: u16) -> Result<(), RequestError> {
        // The device writes to no buffer, so the used length is 0 for both directions.
        let used = self.vring.add_used(head, 0);
        self.returned |= used.is_ok();
        used.map_err(|source| RequestError::Return { head, source })
    }

    /// Returns an interrupt of the driver, if buffers were returned and it wants to know.
    fn interrupt(&self) -> Option<Interrupt> {
        let is_wanted = self.returned && self.vring.needs_notification().unwrap_or(true);
        is_wanted.then(|| self.vring.interrupt())
    }
}

impl Device {
    /// Gives the queue `index` a turn. Returns whether the queue needs another one.
    pub fn handle_queue(&mut self, index: usize, vrings: &[Vring]) -> bool {
        if let Some(connection) = &mut self.connection {
            if connection.vrings.is_empty() {
                connection.vrings = vrings.to_vec();
            }
        }
        self.detect_driver_restart();
        self.handle_driver_start();
        self.send_pending_config_change();
        let Some(vring) = vrings.get(index) else {
            return false;
        };
        let Some(queue) = self.queue_at(index, vrings) else {
            return false;
        };
        self.update_counters(index, |counters| counters.wakeups += 1);
        let more = self.with_stable_memory(|device, memory| {
            device.drain(QueueContext::new(queue, index, vring, memory))
        });
        let Some(more) = more else {
            if let Some(connection) = &mut self.connection {
                connection.postponed_queues |= 1 << index;
            }
            return false;
        };
        let avail_idx = vring.get_ref().get_queue().next_avail();
        self.update_counters(index, |counters| counters.last_avail_idx = Some(avail_idx));
        more
    }

    /// Returns the queue that the driver means by `index`, and remembers its index.
    fn queue_at(&mut self, index: usize, vrings: &[Vring]) -> Option<Queue> {
        let features = self.negotiated_features.unwrap_or_default();
        let mut started = [false; Queue::MAX_COUNT];
        for (started, vring) in started.iter_mut().zip(vrings) {
            *started = vring.get_ref().get_queue().ready();
        }
        let queue = match meaning(index, self.offered_features, features, &started) {
            Meaning::Queue(queue) => Some(queue),
            Meaning::Unclear(queue) => {
                warn!(
                    "queue {index} can be one of several queues of a driver with the features {features}; it is \
                     taken as {}, as Linux numbers them",
                    queue.map_or("none of them", Queue::name)
                );
                queue
            }
            Meaning::None => {
                warn!("queue {index} does not exist with the features {features}: kick ignored");
                None
            }
        };
        let connection = self.connection.as_mut()?;
        for (number, at) in connection.queues.iter_mut().enumerate() {
            if number == index {
                *at = queue;
            } else if *at == queue {
                // The driver was taken for one that numbers the queues in another way.
                *at = None;
            }
        }
        queue
    }

    /// Returns the index of `queue`. Until the driver uses it, this is the index that Linux gives it.
    pub(super) fn index_of(&self, queue: Queue) -> Option<usize> {
        let features = self.negotiated_features?;
        let connection = self.connection.as_ref()?;
        let used = connection.queues.iter().position(|it| *it == Some(queue));
        used.or_else(|| {
            let index = queue.index(features)?;
            let is_other = connection.queues.get(index).copied().flatten().is_some();
            (!is_other).then_some(index)
        })
    }

    fn update_counters(&mut self, index: usize, change: impl FnOnce(&mut QueueCounters)) {
        if let Some(counters) = self
            .connection
            .as_mut()
            .and_then(|connection| connection.counters.get_mut(index))
        {
            change(counters);
        }
    }

    /// Takes requests from the queue until it is empty or the budget is exhausted. Returns whether
    /// more may be available.
    ///
    /// The device never polls (R1): an empty queue ends the turn, and the driver's next notification starts another.
    fn drain(&mut self, mut context: QueueContext<'_>) -> bool {
        let vring = context.vring;
        let more = loop {
            // The driver need not notify while the device processes the queue. Errors are ignored here: if these words
            // cannot be written, the ring cannot be read either, and that error is recorded.
            if self.suppression != NotificationSuppression::Never {
                let _ = vring.disable_notification();
            }
            let outcome = self.drain_available(&mut context);
            self.release_and_return(&mut context);
            match outcome {
                DrainOutcome::BudgetExhausted => break true,
                DrainOutcome::Broken => {
                    let _ = vring.enable_notification();
                    break false;
                }
                DrainOutcome::Empty { taken } => {
                    // A buffer may have become available before notifications were enabled again. If the last pass
                    // took nothing, another one cannot take that buffer either.
                    if !vring.enable_notification().unwrap_or(false) || !taken {
                        break false;
                    }
                }
            }
        };
        self.interrupts.extend(context.interrupt());
        more
    }

    fn drain_available(&mut self, context: &mut QueueContext<'_>) -> DrainOutcome {
        let mut taken = false;
        loop {
            if !self.continue_request(context) || context.budget == 0 {
                return DrainOutcome::BudgetExhausted;
            }
            context.spend(1);
            let chain = match next_chain(context.vring, &context.memory) {
                Ok(Some(chain)) => chain,
                Ok(None) => return DrainOutcome::Empty { taken },
                Err(error @ RequestError::NoSuchDescriptor { .. }) => {
                    // The head does not exist, so there is no buffer to return.
                    self.guest_errors.record(context.queue, &error);
                    taken = true;
                    continue;
                }
                Err(error) => {
                    self.guest_errors.record(context.queue, &error);
                    return DrainOutcome::Broken;
                }
            };
            taken = true;
            self.update_counters(context.index, |counters| counters.requests += 1);
            let head = chain.head_index();
            let outcome = self.process_chain(context, chain).unwrap_or_else(|error| {
                self.guest_errors.record(context.queue, &error);
                ChainOutcome::Return(head)
            });
            if self.memory_fault().is_some() {
                // The session ends. What the rings and requests contain is not from the driver.
                return DrainOutcome::Broken;
            }
            match outcome {
                ChainOutcome::Keep => {}
                ChainOutcome::Return(head) => self.give_back(context, head),
                ChainOutcome::Pending(request) => self.set_pending(context.index, Some(request)),
            }
        }
    }

    /// Releases the memory that the turn has collected, and then returns the buffers of its requests.
    fn release_and_return(&mut self, context: &mut QueueContext<'_>) {
        self.release_collected(context.queue, &mut context.releases);
        for head in context.releases.take_buffers() {
            self.give_back(context, head);
        }
    }

    fn give_back(&mut self, context: &mut QueueContext<'_>, head: u16) {
        if let Err(error) = context.give_back(head) {
            self.guest_errors.record(context.queue, &error);
        }
    }

    fn set_pending(&mut self, index: usize, request: Option<PendingRequest>) {
        let connection = self.connection.as_mut();
        if let Some(place) = connection.and_then(|it| it.pending_requests.get_mut(index)) {
            *place = request;
        }
    }

    fn take_pending(&mut self, index: usize) -> Option<PendingRequest> {
        let connection = self.connection.as_mut()?;
        connection.pending_requests.get_mut(index)?.take()
    }

    /// Continues the request of the queue `index` that its last turn has left, after the queue was stopped. Returns
    /// whether another call is needed. The guest may reuse the memory of the request when none is.
    pub fn finish_request(&mut self, index: usize) -> bool {
        let connection = self.connection.as_ref();
        let vring = connection.and_then(|it| it.vrings.get(index)).cloned();
        let queue = connection.and_then(|it| it.queues.get(index).copied().flatten());
        let (Some(queue), Some(vring)) = (queue, vring) else {
            return false;
        };
        let finished = self.with_stable_memory(|device, memory| {
            let mut context = QueueContext::new(queue, index, &vring, memory);
            let finished = device.continue_request(&mut context);
            device.release_and_return(&mut context);
            device.interrupts.extend(context.interrupt());
            finished
        });
        finished == Some(false)
    }

    /// Continues the pending request of the queue. Its buffer is returned at its end, or after the release of its memory
    /// at the end of the turn. Returns whether no request is left.
    fn continue_request(&mut self, context: &mut QueueContext<'_>) -> bool {
        let Some(mut request) = self.take_pending(context.index) else {
            return true;
        };
        if request.work == Work::Hint && !self.hinting.accepts_free_block() {
            // The hint round has ended. What is left of the block is no hint.
            request.pieces.clear();
            self.hinting.ignore_free_block();
        } else if !self.process_pieces(context, &mut request) {
            self.set_pending(context.index, Some(request));
            return false;
        } else if request.work == Work::Hint {
            self.hinting.end_free_block(request.error.is_none());
        }
        if let Some(error) = &request.error {
            self.guest_errors.record(context.queue, error);
        }
        match request.work {
            Work::Inflate | Work::Report => context.releases.add_buffer(request.head),
            Work::Deflate | Work::Hint => self.give_back(context, request.head),
        }
        true
    }

    /// Processes the pieces of a request until the budget is exhausted. Returns whether none is left.
    fn process_pieces(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &mut PendingRequest,
    ) -> bool {
        if request.work == Work::Hint {
            self.poll_pinning();
        }
        let discard = self.hint_discard();
        let bytes_per_unit = match request.work {
            Work::Hint if discard.is_none() => HINTED_BYTES_PER_UNIT,
            _ => RELEASED_BYTES_PER_UNIT,
        };
        while let Some(piece) = request.pieces.front_mut() {
            if context.budget == 0 {
                return false;
            }
            let most = bytes_per_unit.saturating_mul(context.budget as u64);
            match self.ram.first_part(&piece.rest, most) {
                None => {
                    let (start, outside) = (piece.start, piece.outside);
                    let length = piece.rest.end.saturating_sub(start);
                    request.pieces.pop_front();
                    match request.work {
                        Work::Hint if outside == length && length > 0 => {
                            request.fail(HintError::Outside { start, length });
                        }
                        Work::Hint | Work::Deflate => {}
                        _ if outside > 0 => request.fail(ReleaseError::Outside {
                            start,
                            bytes: outside,
                        }),
                        _ => {}
                    }
                    continue;
                }
                Some(Part::Outside(part)) => {
                    context.spend(1);
                    piece.rest.start = part.end;
                    piece.outside = piece.outside.saturating_add(part.end - part.start);
                    continue;
                }
                Some(Part::Inside(part)) => {
                    let units = (part.end - part.start) / bytes_per_unit;
                    context.spend(
                        usize::try_from(units)
                            .unwrap_or(usize::MAX)
                            .saturating_add(1),
                    );
                    piece.rest.start = part.end;
                    match request.work {
                        Work::Hint => {
                            let discard = discard.map(|spares_rest| Discard {
                                ram: &mut self.ram,
                                spares_rest,
                            });
                            if let Err(error) = self.hinting.hint(part, discard) {
                                request.fail(error);
                            }
                        }
                        Work::Deflate => self.partial_pages.deflate(&self.ram, &part),
                        Work::Inflate => context.releases.add_inflated(part),
                        Work::Report => context.releases.add_reported(part),
                    }
                }
            }
        }
        true
    }

    /// Processes one chain.
    fn process_chain(
        &mut self,
        context: &mut QueueContext<'_>,
        chain: DescriptorChain<MemoryGuard>,
    ) -> Result<ChainOutcome, RequestError> {
        let head = chain.head_index();
        let request = Request::parse(chain);
        let segments = request.as_ref().map_or(MAX_SEGMENTS, Request::num_segments);
        context.spend(segments / SEGMENTS_PER_UNIT);
        let request = request?;
        match context.queue {
            Queue::Inflate => self.handle_inflate(context, &request, head),
            Queue::Deflate => self.handle_deflate(context, &request, head),
            Queue::Stats => self.handle_stats(context, &request, head),
            Queue::FreePage => self.handle_free_page(context, &request, head),
            Queue::Reporting => self.handle_report(&request, head),
        }
    }

    /// Reads the page frame numbers of a request into `self.buffer`, and returns their number.
    fn read_pfns(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
    ) -> Result<u64, RequestError> {
        request.read(
            &context.memory,
            &mut self.buffer,
            pfn::PFN_BYTES,
            pfn::PFN_BYTES * pfn::MAX_PFNS,
            "an array of at most 65536 PFNs of 4 bytes",
        )?;
        let count = self.buffer.len() / pfn::PFN_BYTES;
        context.spend(count / PFNS_PER_UNIT);
        Ok(count as u64)
    }

    /// Handles an inflate request: the memory of the pages is released to the host, at the end of the turn.
    fn handle_inflate(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
        head: u16,
    ) -> Result<ChainOutcome, RequestError> {
        let count = self.read_pfns(context, request)?;
        self.pages_inflated = self.pages_inflated.saturating_add(count);
        let ranges = pfn::ranges(&self.buffer);
        let pending = PendingRequest::new(head, Work::Inflate, ranges);
        Ok(ChainOutcome::Pending(pending))
    }

    /// Handles a deflate request. The host allocates memory again when the guest writes to the pages.
    fn handle_deflate(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
        head: u16,
    ) -> Result<ChainOutcome, RequestError> {
        let count = self.read_pfns(context, request)?;
        self.pages_deflated = self.pages_deflated.saturating_add(count);
        if self.partial_pages.is_empty() {
            return Ok(ChainOutcome::Return(head));
        }
        let ranges = pfn::ranges(&self.buffer);
        let pending = PendingRequest::new(head, Work::Deflate, ranges);
        Ok(ChainOutcome::Pending(pending))
    }

    /// Handles new statistics, and keeps their buffer. The buffer that was kept before is returned, if there is one.
    fn handle_stats(
        &mut self,
        context: &QueueContext<'_>,
        request: &Request,
        head: u16,
    ) -> Result<ChainOutcome, RequestError> {
        let expected = "a list of at most 64 statistics of 10 bytes";
        request.read(
            &context.memory,
            &mut self.buffer,
            shared_abi::stats::Stat::SIZE,
            stats::MAX_BYTES,
            expected,
        )?;
        let before = self.stats.update(&self.buffer, head);
        if before.is_some() {
            self.guest_errors
                .record(Queue::Stats, &RequestError::SecondStatsBuffer);
        }
        Ok(before.map_or(ChainOutcome::Keep, ChainOutcome::Return))
    }

    /// Handles a command id or a block of free pages.
    ///
    /// Hints count whatever the value of `poison_val` (R3). A page that is not sent reads as zeros at the destination,
    /// not as `poison_val`. The specification allows this: the driver "MUST treat the content of all hinted pages as
    /// uninitialized memory" and, if it reuses a page before DONE, initialises the page. Linux writes its poison
    /// pattern when it frees pages. That is after the hint, and the write makes the pages dirty again. Reported pages
    /// are different: see [`handle_report`](Self::handle_report).
    ///
    /// For the same reason the device may discard a hinted page, which then reads as zeros whatever the value of
    /// `poison_val`. This requires the driver's promise to keep the page until its buffer is returned (R17):
    /// uninitialised memory has no content to preserve. Without the promise nothing is discarded, because the guest
    /// may already use the page again.
    fn handle_free_page(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
        head: u16,
    ) -> Result<ChainOutcome, RequestError> {
        if request.starts_writable() {
            return Ok(self.handle_free_block(request.writable()?, head));
        }
        let expected = "a command id of 4 bytes";
        request.read(&context.memory, &mut self.buffer, 4, 4, expected)?;
        // An empty request contains no command id.
        if let Some(Ok(bytes)) = self.buffer.get(..4).map(<[u8; 4]>::try_from) {
            let cmd_id = CommandId::from_number(u32::from_le_bytes(bytes));
            let changes = self.hinting.handle_cmd_id(cmd_id);
            self.publish_changes(changes);
        }
        Ok(ChainOutcome::Return(head))
    }

    /// Handles a block of free pages. With discarding, what exceeds [`hinting::MAX_DISCARD`] is left out.
    fn handle_free_block(&mut self, segments: &[Segment], head: u16) -> ChainOutcome {
        if !self.hinting.accepts_free_block() {
            self.hinting.ignore_free_block();
            return ChainOutcome::Return(head);
        }
        let mut allowance = match self.hint_discard() {
            Some(_) => hinting::MAX_DISCARD,
            None => u64::MAX,
        };
        let (mut ranges, mut error) = (Vec::with_capacity(segments.len()), None);
        for segment in segments {
            let start = segment.address;
            let length = u64::from(segment.length).min(allowance);
            allowance -= length;
            match start.checked_add(length) {
                Some(end) => ranges.push(start..end),
                None => {
                    error.get_or_insert(HintError::Wraps { start, length });
                }
            }
        }
        let mut pending = PendingRequest::new(head, Work::Hint, ranges);
        pending.error = error.map(Into::into);
        ChainOutcome::Pending(pending)
    }

    /// Returns whether hinted blocks are discarded, and if so, whether pages that cannot be discarded are not sent either.
    ///
    /// A migration that finds written pages by their content relies on discarding from its start: if that is inhibited
    /// later, hints do nothing. Any other migration sees the writes to a page, whether it was discarded or not.
    fn hint_discard(&self) -> Option<bool> {
        let needs_discard = self.claim.as_ref().is_some_and(|it| it.hints_need_discard);
        (needs_discard || self.discards_hinted()).then_some(!needs_discard)
    }

    /// Handles a free page report: the memory of the blocks is released to the host, at the end of the turn. The guest
    /// may use the blocks again once their buffer is returned.
    fn handle_report(
        &mut self,
        request: &Request,
        head: u16,
    ) -> Result<ChainOutcome, RequestError> {
        let segments = request.writable()?;
        if self.poison_val().is_some_and(|value| value != 0) {
            // The device "MUST NOT modify the content of a reported page to a value other than poison_val", and a
            // hole reads as zeros.
            return Ok(ChainOutcome::Return(head));
        }
        let ranges = segments.iter().map(|segment| {
            segment.address..segment.address.saturating_add(u64::from(segment.length))
        });
        let pending = PendingRequest::new(head, Work::Report, ranges);
        Ok(ChainOutcome::Pending(pending))
    }

    /// Returns the value that the guest fills free pages with, if page poison is negotiated.
    pub(super) fn poison_val(&self) -> Option<u32> {
        self.negotiated_features
            .is_some_and(|features| features.contains(Features::PAGE_POISON))
            .then_some(self.config.poison_val)
    }
}

/// Returns the next available chain, if the queue runs and is not empty.
fn next_chain(
    vring: &Vring,
    memory: &MemoryGuard,
) -> Result<Option<DescriptorChain<MemoryGuard>>, RequestError> {
    let mut vring = vring.get_mut();
    if !vring.is_enabled() {
        return Ok(None);
    }
    let queue = vring.get_queue_mut();
    if !queue.ready() {
        return Ok(None);
    }
    let size = queue.size();
    let chain = queue
        .iter(memory.clone())
        .map_err(RequestError::Ring)?
        .next();
    match chain {
        Some(chain) if chain.head_index() >= size => Err(RequestError::NoSuchDescriptor {
            head: chain.head_index(),
            size,
        }),
        other => Ok(other),
    }
}
