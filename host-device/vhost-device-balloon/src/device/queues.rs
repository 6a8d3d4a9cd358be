// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtqueues: takes requests, processes them, and returns their buffers. The caller holds the device's lock.

use shared_abi::command::CommandId;
use shared_abi::features::Features;
use shared_abi::page::PFN_SHIFT;
use shared_abi::queue::Queue;
use tracing::debug;
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::connection::QueueCounters;
use super::request::{MemoryGuard, Request, RequestError};
use super::{pfn, stats, Device};
use crate::vring::{NotificationSuppression, Vring};

/// Work units per turn of a queue. Roughly the number of memory ranges that are processed before other queues and QMP
/// clients get a turn.
const DRAIN_BUDGET: usize = 1 << 14;

/// The number of discarded bytes that cost roughly as much as one memory range.
const BYTES_PER_WORK_UNIT: u64 = 1 << 16;

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
    fn spend(&mut self, work: usize) {
        self.budget = self.budget.saturating_sub(work);
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
        let features = self.negotiated_features.unwrap_or_default();
        let (Some(queue), Some(vring)) = (Queue::from_index(index, features), vrings.get(index))
        else {
            debug!("queue {index} does not exist with the negotiated features; kick ignored");
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
        if context.returned && vring.needs_notification().unwrap_or(true) {
            if let Err(error) = vring.signal_used_queue() {
                tracing::debug!(
                    "{} queue: interrupt to the driver failed: {error}",
                    queue.name()
                );
            }
        }
        more
    }

    fn drain_available(&mut self, context: &mut QueueContext<'_>) -> DrainOutcome {
        let mut taken = false;
        while context.budget > 0 {
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
            let give_back = self.process_chain(context, chain).unwrap_or_else(|error| {
                self.guest_errors.record(context.queue, &error);
                Some(head)
            });
            let Some(head) = give_back else {
                continue;
            };
            // The device writes to no buffer, so the used length is 0 for both directions.
            match context.vring.add_used(head, 0) {
                Ok(()) => context.returned = true,
                Err(source) => {
                    let error = RequestError::Return { head, source };
                    self.guest_errors.record(context.queue, &error);
                }
            }
        }
        DrainOutcome::BudgetExhausted
    }

    /// Processes one chain. Returns the head of the buffer to return, if any. This is usually the buffer of the chain.
    fn process_chain(
        &mut self,
        context: &mut QueueContext<'_>,
        chain: DescriptorChain<MemoryGuard>,
    ) -> Result<Option<u16>, RequestError> {
        let head = chain.head_index();
        let request = Request::parse(chain)?;
        match context.queue {
            Queue::Inflate => self.handle_inflate(context, &request)?,
            Queue::Deflate => self.handle_deflate(context, &request)?,
            Queue::Stats => return self.handle_stats(context, &request, head),
            Queue::FreePage => self.handle_free_page(context, &request)?,
            Queue::Reporting => self.handle_report(context, &request)?,
        }
        Ok(Some(head))
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
        context.spend(self.buffer.len() >> PFN_SHIFT);
        Ok((self.buffer.len() / pfn::PFN_BYTES) as u64)
    }

    /// Handles an inflate request: releases the memory of the pages to the host.
    fn handle_inflate(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
    ) -> Result<(), RequestError> {
        let count = self.read_pfns(context, request)?;
        self.pages_inflated = self.pages_inflated.saturating_add(count);
        let ranges = pfn::ranges(&self.buffer);
        context.spend(ranges.len());
        let mut result = Ok(());
        for range in ranges {
            match self.ram.release(range) {
                Ok(bytes) => self.bytes_released = self.bytes_released.saturating_add(bytes),
                Err(error) => result = result.and(Err(error.into())),
            }
        }
        result
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

    /// Handles new statistics, and keeps their buffer. Returns the buffer that was kept before, if any.
    fn handle_stats(
        &mut self,
        context: &QueueContext<'_>,
        request: &Request,
        head: u16,
    ) -> Result<Option<u16>, RequestError> {
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
        Ok(before)
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
    ) -> Result<(), RequestError> {
        if request.starts_writable() {
            let segments = request.writable()?;
            context.spend(segments.len());
            let before = self.hinting.bytes_discarded();
            let discard = self.discards_hinted().then_some(&self.ram);
            let result = self.hinting.handle_free_block(segments, discard);
            let discarded = self.hinting.bytes_discarded().saturating_sub(before);
            context.spend(usize::try_from(discarded / BYTES_PER_WORK_UNIT).unwrap_or(usize::MAX));
            return result;
        }
        let expected = "a command id of 4 bytes";
        request.read(&context.memory, &mut self.buffer, 4, 4, expected)?;
        // An empty request contains no command id.
        if let Some(Ok(bytes)) = self.buffer.get(..4).map(<[u8; 4]>::try_from) {
            let cmd_id = CommandId::from_number(u32::from_le_bytes(bytes));
            let changes = self.hinting.handle_cmd_id(cmd_id);
            self.publish_changes(changes);
        }
        Ok(())
    }

    /// Handles a free page report: releases the memory of the blocks to the host. The guest may use the blocks again
    /// once their buffer is returned.
    fn handle_report(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
    ) -> Result<(), RequestError> {
        let segments = request.writable()?;
        if self.poison_val().is_some_and(|value| value != 0) {
            // The device "MUST NOT modify the content of a reported page to a value other than poison_val", and a
            // hole reads as zeros.
            return Ok(());
        }
        context.spend(segments.len());
        let mut result = Ok(());
        for segment in segments {
            let end = segment.address.saturating_add(u64::from(segment.length));
            match self.ram.release(segment.address..end) {
                Ok(bytes) => self.bytes_reported = self.bytes_reported.saturating_add(bytes),
                Err(error) => result = result.and(Err(error.into())),
            }
        }
        result
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
