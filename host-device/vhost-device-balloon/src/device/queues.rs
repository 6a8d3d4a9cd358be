// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The queues: taking requests, doing what they ask for, returning the buffers.

use shared_abi::command::CommandId;
use shared_abi::features::Features;
use shared_abi::page::PFN_SHIFT;
use shared_abi::queue::Queue;
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::request::{MemoryGuard, Request, RequestError};
use super::{pfn, stats, Device};
use crate::vring::{NotificationSuppression, Vring};

/// Roughly how many ranges of memory are handled before other queues, and operators, get their turn.
const DRAIN_BUDGET: usize = 1 << 14;

/// How many bytes of memory take as long to give back as a range takes by itself, roughly.
const BYTES_PER_WORK_UNIT: u64 = 1 << 16;

/// How a look at a queue ended.
enum DrainOutcome {
    /// There was nothing more to take; `taken` says whether there was anything at all.
    Empty { taken: bool },
    /// The turn is over, and there may be more.
    BudgetExhausted,
    /// The ring cannot be read. The driver's next notification is another try.
    Broken,
}

/// One queue's turn.
struct QueueContext<'a> {
    queue: Queue,
    index: usize,
    vring: &'a Vring,
    memory: MemoryGuard,
    /// What is left of [`DRAIN_BUDGET`].
    budget: usize,
    /// Whether a buffer was returned.
    returned: bool,
}

impl QueueContext<'_> {
    fn spend(&mut self, work: usize) {
        self.budget = self.budget.saturating_sub(work);
    }
}

impl Device {
    /// Takes requests from the queue until it is empty or the turn is over. Returns whether there may be more.
    ///
    /// Nothing is waited for (R1): an empty queue ends the turn, and the driver's next notification begins
    /// another.
    pub(super) fn drain(
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
            // The driver need not notify while the queue is being looked at anyway. Where these words cannot
            // be written, the ring cannot be read either, and that is reported.
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
                    // Something may have come before notifications were on again. If nothing could be taken,
                    // what is there cannot be taken at all.
                    if !vring.enable_notification().unwrap_or(false) || !taken {
                        break false;
                    }
                }
            }
        };
        if context.returned && vring.needs_notification().unwrap_or(true) {
            if let Err(error) = vring.signal_used_queue() {
                tracing::debug!("{} queue: the driver was not told: {error}", queue.name());
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
                    // There is no buffer that could be returned.
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
            // The device writes to no buffer: a length of 0 is the truth for both directions.
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

    /// Does what a chain asks for. Returns the buffer that is to go back, if one is: usually this one.
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

    /// Reads the page numbers of a request into the buffer, and returns how many there are.
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
            "an array of at most 65536 page numbers of 4 bytes",
        )?;
        context.spend(self.buffer.len() >> PFN_SHIFT);
        Ok((self.buffer.len() / pfn::PFN_BYTES) as u64)
    }

    /// Pages go into the balloon: their memory goes back to the host.
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

    /// Pages come out of the balloon. The host gives memory again when the guest writes to it.
    fn handle_deflate(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
    ) -> Result<(), RequestError> {
        let count = self.read_pfns(context, request)?;
        self.pages_deflated = self.pages_deflated.saturating_add(count);
        Ok(())
    }

    /// Statistics come, and their buffer stays. Returns the buffer that stayed until now.
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

    /// A command id or a block of free pages.
    ///
    /// Page poison makes no difference to hints, whatever `poison_val` is (R3). A page that is not sent reads
    /// as zeros at the destination, not as `poison_val`; but the specification lets that be: the driver "MUST
    /// treat the content of all hinted pages as uninitialized memory" and, if it takes a page back before
    /// DONE, initialises it. Linux fills pages with its pattern when it frees them, which is after the hint,
    /// and the write makes them dirty again. (Reported pages are another matter: see
    /// [`handle_report`](Self::handle_report).)
    ///
    /// For the same reason a hinted page may be discarded here and read as zeros, whatever `poison_val` is, once the
    /// driver has promised to keep it until its buffer is returned (R17): uninitialised memory has no content that
    /// a device could spoil. Without that promise nothing is discarded, because the page may be in use again.
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
        // Nothing at all is no command id either.
        if let Some(Ok(bytes)) = self.buffer.get(..4).map(<[u8; 4]>::try_from) {
            let cmd_id = CommandId::from_number(u32::from_le_bytes(bytes));
            let changes = self.hinting.handle_cmd_id(cmd_id);
            self.publish_changes(changes);
        }
        Ok(())
    }

    /// Blocks that the guest reports as free by itself: their memory goes back to the host, and the guest may
    /// use it again as soon as the buffer is returned.
    fn handle_report(
        &mut self,
        context: &mut QueueContext<'_>,
        request: &Request,
    ) -> Result<(), RequestError> {
        let segments = request.writable()?;
        if self.poison_val().is_some_and(|value| value != 0) {
            // "MUST NOT modify the content of a reported page to a value other than poison_val", and a hole
            // reads as zeros.
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

    /// What the guest fills its free pages with, if it says so.
    pub(super) fn poison_val(&self) -> Option<u32> {
        self.negotiated_features
            .is_some_and(|features| features.contains(Features::PAGE_POISON))
            .then_some(self.config.poison_val)
    }
}

/// The next chain of the queue, if it runs and is not empty.
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
