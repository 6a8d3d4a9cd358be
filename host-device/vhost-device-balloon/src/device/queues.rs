// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtqueues: takes requests, processes them, and returns their buffers. The caller holds the device's lock.

use guest_migration::HintError;
use shared_abi::command::CommandId;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use tracing::{debug, warn};
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::connection::QueueCounters;
use super::pending_request::{PendingRequest, Work};
use super::queue_numbers::{meaning, Meaning};
use super::request::{MemoryGuard, Request, RequestError, Segment, MAX_SEGMENTS};
use super::{hinting, pfn, stats, Device};
use crate::memory::{Part, ReleaseError};
use crate::vring::{NotificationSuppression, Vring};

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
    /// The buffer with this head is returned to the driver. It is usually that of the chain.
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
}

impl QueueContext<'_> {
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

    /// Interrupts the driver, if buffers were returned and it wants to know.
    fn signal(&self) {
        if self.returned && self.vring.needs_notification().unwrap_or(true) {
            if let Err(error) = self.vring.signal_used_queue() {
                debug!(
                    "{} queue: interrupt to the driver failed: {error}",
                    self.queue.name()
                );
            }
        }
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
        let Some(memory) = self.connection.as_ref().and_then(|it| it.memory.clone()) else {
            return false;
        };
        let more = self.drain(queue, index, vring, &memory);
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
    fn drain(
        &mut self,
        queue: Queue,
        index: usize,
        vring: &Vring,
        memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> bool {
        let mut context = QueueContext {
            queue,
            index,
            vring,
            memory: memory.memory(),
            budget: DRAIN_BUDGET,
            returned: false,
        };
        let more = loop {
            // The driver need not notify while the device processes the queue. Errors are ignored here: if these words
            // cannot be written, the ring cannot be read either, and that error is recorded.
            if self.suppression != NotificationSuppression::Never {
                let _ = vring.disable_notification();
            }
            match self.drain_available(&mut context) {
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
        context.signal();
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
            match outcome {
                ChainOutcome::Keep => {}
                ChainOutcome::Return(head) => self.give_back(context, head),
                ChainOutcome::Pending(request) => self.set_pending(context.index, Some(request)),
            }
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
        let features = self.negotiated_features.unwrap_or_default();
        let connection = self.connection.as_ref();
        let vring = connection.and_then(|it| it.vrings.get(index)).cloned();
        let memory = connection.and_then(|it| it.memory.as_ref().map(|it| it.memory()));
        let (Some(queue), Some(vring), Some(memory)) =
            (Queue::from_index(index, features), vring, memory)
        else {
            return false;
        };
        let mut context = QueueContext {
            queue,
            index,
            vring: &vring,
            memory,
            budget: DRAIN_BUDGET,
            returned: false,
        };
        let finished = self.continue_request(&mut context);
        context.signal();
        !finished
    }

    /// Continues the pending request of the queue, and returns its buffer at the end. Returns whether none is left.
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
        self.give_back(context, request.head);
        true
    }

    /// Processes the pieces of a request until the budget is exhausted. Returns whether none is left.
    fn process_pieces(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &mut PendingRequest,
    ) -> bool {
        let discards = self.discards_hinted();
        let bytes_per_unit = match request.work {
            Work::Hint if !discards => HINTED_BYTES_PER_UNIT,
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
                        Work::Hint => {}
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
                    let result: Result<(), RequestError> = match request.work {
                        Work::Hint => {
                            let discard = discards.then_some(&self.ram);
                            self.hinting.hint(part, discard)
                        }
                        Work::Inflate => self.ram.release(part).map_err(Into::into).map(|bytes| {
                            self.bytes_released = self.bytes_released.saturating_add(bytes);
                        }),
                        Work::Report => self.ram.release(part).map_err(Into::into).map(|bytes| {
                            self.bytes_reported = self.bytes_reported.saturating_add(bytes);
                        }),
                    };
                    if let Err(error) = result {
                        request.fail(error);
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
            Queue::Deflate => {
                self.handle_deflate(context, &request)?;
                Ok(ChainOutcome::Return(head))
            }
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

    /// Handles an inflate request: the memory of the pages is released to the host.
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
    ) -> Result<(), RequestError> {
        let count = self.read_pfns(context, request)?;
        self.pages_deflated = self.pages_deflated.saturating_add(count);
        Ok(())
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
        let mut allowance = match self.discards_hinted() {
            true => hinting::MAX_DISCARD,
            false => u64::MAX,
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

    /// Handles a free page report: the memory of the blocks is released to the host. The guest may use the blocks again
    /// once their buffer is returned.
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
