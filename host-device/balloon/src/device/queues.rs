// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The queues: taking requests, doing what they ask for, returning the buffers.

use shared_abi::command::CommandId;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::request::{MemoryGuard, Request, RequestError};
use super::{pages, stats, Device};

/// Roughly how many ranges of memory are handled before other queues, and operators, get their turn.
const TURN: usize = 1 << 14;

/// How a look at a queue ended.
enum Pass {
    /// There was nothing more to take; `taken` says whether there was anything at all.
    Empty { taken: bool },
    /// The turn is over, and there may be more.
    TurnOver,
    /// The ring cannot be read. The driver's next notification is another try.
    Broken,
}

/// What becomes of a buffer that was served.
struct Served {
    /// The buffer to return now, if any: usually the one that came.
    give_back: Option<u16>,
    /// How many ranges of memory it took.
    work: usize,
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
        vring: &VringRwLock,
        memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> bool {
        let memory = memory.memory();
        let mut budget = TURN;
        let mut returned = false;
        let more = loop {
            // The driver need not notify while the queue is being looked at anyway. Where these words cannot
            // be written, the ring cannot be read either, and that is reported.
            let _ = vring.disable_notification();
            match self.pass(queue, index, vring, &memory, &mut budget, &mut returned) {
                Pass::TurnOver => break true,
                Pass::Broken => {
                    let _ = vring.enable_notification();
                    break false;
                }
                Pass::Empty { taken } => {
                    // Something may have come before notifications were on again. If nothing could be taken,
                    // what is there cannot be taken at all.
                    if !vring.enable_notification().unwrap_or(false) || !taken {
                        break false;
                    }
                }
            }
        };
        if returned && vring.needs_notification().unwrap_or(true) {
            if let Err(error) = vring.signal_used_queue() {
                tracing::debug!("{} queue: the driver was not told: {error}", queue.name());
            }
        }
        more
    }

    fn pass(
        &mut self,
        queue: Queue,
        index: usize,
        vring: &VringRwLock,
        memory: &MemoryGuard,
        budget: &mut usize,
        returned: &mut bool,
    ) -> Pass {
        let mut taken = false;
        while *budget > 0 {
            let chain = match next_chain(vring, memory) {
                Ok(Some(chain)) => chain,
                Ok(None) => return Pass::Empty { taken },
                Err(error @ RequestError::NoSuchDescriptor { .. }) => {
                    // There is no buffer that could be returned.
                    self.complaints.add(queue, &error);
                    *budget -= 1;
                    taken = true;
                    continue;
                }
                Err(error) => {
                    self.complaints.add(queue, &error);
                    return Pass::Broken;
                }
            };
            taken = true;
            self.count(index, |counters| counters.requests += 1);
            let head = chain.head_index();
            let served = self.serve(queue, chain, memory).unwrap_or_else(|error| {
                self.complaints.add(queue, &error);
                Served {
                    give_back: Some(head),
                    work: 1,
                }
            });
            if let Some(head) = served.give_back {
                // The device writes to no buffer: a length of 0 is the truth for both directions.
                match vring.add_used(head, 0) {
                    Ok(()) => *returned = true,
                    Err(source) => self
                        .complaints
                        .add(queue, &RequestError::Return { head, source }),
                }
            }
            *budget = budget.saturating_sub(served.work.max(1));
        }
        Pass::TurnOver
    }

    fn serve(
        &mut self,
        queue: Queue,
        chain: DescriptorChain<MemoryGuard>,
        memory: &GuestMemoryMmap,
    ) -> Result<Served, RequestError> {
        let head = chain.head_index();
        let request = Request::parse(chain)?;
        let work = match queue {
            Queue::Inflate => self.inflate(&request, memory)?,
            Queue::Deflate => self.deflate(&request, memory)?,
            Queue::Stats => {
                let give_back = self.take_stats(&request, memory, head)?;
                return Ok(Served { give_back, work: 1 });
            }
            Queue::FreePage => self.free_page(&request, memory)?,
            Queue::Reporting => self.reported(&request)?,
        };
        Ok(Served {
            give_back: Some(head),
            work,
        })
    }

    fn read_pfns(
        &mut self,
        request: &Request,
        memory: &GuestMemoryMmap,
    ) -> Result<u64, RequestError> {
        request.read(
            memory,
            &mut self.buffer,
            pages::PFN_BYTES,
            pages::PFN_BYTES * pages::MAX_PFNS,
            "an array of at most 65536 page numbers of 4 bytes",
        )?;
        Ok((self.buffer.len() / pages::PFN_BYTES) as u64)
    }

    /// Pages go into the balloon: their memory goes back to the host.
    fn inflate(
        &mut self,
        request: &Request,
        memory: &GuestMemoryMmap,
    ) -> Result<usize, RequestError> {
        let count = self.read_pfns(request, memory)?;
        self.pages_inflated = self.pages_inflated.saturating_add(count);
        let ranges = pages::ranges(&self.buffer);
        let work = ranges.len();
        let mut result = Ok(work);
        for range in ranges {
            match self.ram.release(range) {
                Ok(bytes) => self.bytes_released = self.bytes_released.saturating_add(bytes),
                Err(error) => result = result.and(Err(error.into())),
            }
        }
        result
    }

    /// Pages come out of the balloon. The host gives memory again when the guest writes to it.
    fn deflate(
        &mut self,
        request: &Request,
        memory: &GuestMemoryMmap,
    ) -> Result<usize, RequestError> {
        let count = self.read_pfns(request, memory)?;
        self.pages_deflated = self.pages_deflated.saturating_add(count);
        Ok(1)
    }

    /// Statistics come, and their buffer stays. Returns the buffer that stayed until now.
    fn take_stats(
        &mut self,
        request: &Request,
        memory: &GuestMemoryMmap,
        head: u16,
    ) -> Result<Option<u16>, RequestError> {
        let expected = "a list of at most 64 statistics of 10 bytes";
        request.read(
            memory,
            &mut self.buffer,
            shared_abi::stats::Stat::SIZE,
            stats::MAX_BYTES,
            expected,
        )?;
        let before = self.stats.take(&self.buffer, head);
        if before.is_some() {
            self.complaints
                .add(Queue::Stats, &RequestError::SecondStatsBuffer);
        }
        Ok(before)
    }

    /// A command id or a block of free pages.
    fn free_page(
        &mut self,
        request: &Request,
        memory: &GuestMemoryMmap,
    ) -> Result<usize, RequestError> {
        if request.starts_writable() {
            let segments = request.writable()?;
            let usable = self.hints_count();
            self.hinting.block_came(segments, usable)?;
            return Ok(segments.len());
        }
        let expected = "a command id of 4 bytes";
        request.read(memory, &mut self.buffer, 4, 4, expected)?;
        // Nothing at all is no command id either.
        if let Some(Ok(bytes)) = self.buffer.get(..4).map(<[u8; 4]>::try_from) {
            let command = CommandId::from_number(u32::from_le_bytes(bytes));
            let changes = self.hinting.command_came(command);
            self.pass_on(changes);
        }
        Ok(1)
    }

    /// Blocks that the guest reports as free by itself: their memory goes back to the host, and the guest may
    /// use it again as soon as the buffer is returned.
    fn reported(&mut self, request: &Request) -> Result<usize, RequestError> {
        let segments = request.writable()?;
        if self.poison().is_some_and(|value| value != 0) {
            // The guest relies on finding its pattern there, and a hole reads as zeros.
            return Ok(1);
        }
        let mut result = Ok(segments.len());
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
    fn poison(&self) -> Option<u32> {
        self.negotiated
            .is_some_and(|features| features.contains(Features::PAGE_POISON))
            .then_some(self.config.poison_val)
    }

    /// Whether hints may count (R3).
    ///
    /// A page that is not sent reads as zeros at the destination. Without page poison, or with the value 0,
    /// a guest has no more to expect of a free page than that. With another value it does: the specification
    /// lets a driver that negotiated page poison rely on its hinted pages holding either what they held or
    /// `poison_val` once DONE has been shown, and zeros are neither. The dirty bitmap cannot say "fill this
    /// page with a pattern", so such a page has to be sent, and the hint counts for nothing.
    fn hints_count(&self) -> bool {
        self.poison().is_none_or(|value| value == 0)
    }
}

/// The next chain of the queue, if it runs and is not empty.
fn next_chain(
    vring: &VringRwLock,
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
