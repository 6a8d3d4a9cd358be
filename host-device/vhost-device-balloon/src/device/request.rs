// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a driver puts on a queue, checked.
//!
//! A descriptor chain is the guest's word and may be anything: a loop, longer than memory, pointing nowhere.
//! [`Request::parse`] looks at it once and gives a value of bounded size that went through to its end; the
//! accessors check the direction and read through the bounds of guest memory.

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::ReleaseError;

/// The most descriptors in one chain: the longest queue that is offered.
pub const MAX_SEGMENTS: usize = super::MAX_QUEUE_SIZE as usize;

/// The guest memory of a load guard, as chains hold it.
pub type MemoryGuard = vm_memory::GuestMemoryLoadGuard<GuestMemoryMmap>;

/// What is wrong with what the driver sent. Each is the guest's fault, but for [`RequestError::Release`].
#[derive(Debug, Error)]
pub enum RequestError {
    /// The ring itself cannot be read.
    #[error("the available ring is unusable: {0}")]
    Ring(virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("the buffer of descriptor {head} cannot be returned: {source}")]
    Return {
        /// Index of the chain's first descriptor.
        head: u16,
        /// What the queue says.
        source: virtio_queue::Error,
    },
    /// A chain starts behind the end of the descriptor table.
    #[error("descriptor {head} does not exist: the queue has {size}")]
    NoSuchDescriptor {
        /// Index of the chain's first descriptor.
        head: u16,
        /// Length of the queue.
        size: u16,
    },
    /// A chain loops, leaves the descriptor table, or lies outside memory.
    #[error("the chain at descriptor {head} does not end: it breaks after {segments} segments, last at {address:#x}")]
    BrokenChain {
        /// Index of the chain's first descriptor.
        head: u16,
        /// How many segments could be read.
        segments: usize,
        /// Guest physical address of the last of them; 0 if there is none.
        address: u64,
    },
    /// More descriptors than a chain may have.
    #[error("the chain at descriptor {head} has more than {MAX_SEGMENTS} segments")]
    TooManySegments {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A buffer that the device should read is for writing, or the other way round.
    #[error("the buffer at {address:#x} of {length:#x} bytes has the wrong direction")]
    WrongDirection {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// The length makes no sense for this queue.
    #[error("the request at {address:#x} has {length:#x} bytes, which is not {expected}")]
    BadLength {
        /// Guest physical address of the first segment.
        address: u64,
        /// Bytes in all segments.
        length: u64,
        /// What it should have been.
        expected: &'static str,
    },
    /// A buffer cannot be read.
    #[error("the buffer at {address:#x} of {length:#x} bytes is not in guest memory")]
    Unreadable {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// A hint was refused.
    #[error(transparent)]
    Hint(#[from] guest_migration::HintError),
    /// Memory could not be given back.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// The driver gave a second statistics buffer while the device still has one.
    #[error("a second statistics buffer came before the first was returned")]
    SecondStatsBuffer,
}

/// A piece of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Guest physical address. Not checked.
    pub address: u64,
    /// Bytes. Not checked.
    pub length: u32,
    writable: bool,
}

/// A descriptor chain that has an end: at least one segment, at most [`MAX_SEGMENTS`].
#[derive(Clone, Debug)]
pub struct Request {
    segments: Vec<Segment>,
}

impl Request {
    /// Follows a chain to its end.
    ///
    /// # Errors
    ///
    /// If it has no proper end, or too late a one.
    pub fn parse(chain: DescriptorChain<MemoryGuard>) -> Result<Self, RequestError> {
        let head = chain.head_index();
        let mut segments = Vec::new();
        let mut complete = false;
        for descriptor in chain {
            if segments.len() == MAX_SEGMENTS {
                return Err(RequestError::TooManySegments { head });
            }
            segments.push(Segment {
                address: descriptor.addr().raw_value(),
                length: descriptor.len(),
                writable: descriptor.is_write_only(),
            });
            complete = !descriptor.has_next();
        }
        if !complete {
            return Err(RequestError::BrokenChain {
                head,
                segments: segments.len(),
                address: segments.last().map_or(0, |last| last.address),
            });
        }
        Ok(Self { segments })
    }

    /// Whether the first segment is one that the device writes to.
    pub fn starts_writable(&self) -> bool {
        self.segments.first().is_some_and(|first| first.writable)
    }

    /// The segments, if all of them are for the device to write to.
    ///
    /// # Errors
    ///
    /// Names the first that is not.
    pub fn writable(&self) -> Result<&[Segment], RequestError> {
        self.all(true)
    }

    /// Reads the request, all of whose segments must be for the device to read, into `buffer`.
    ///
    /// # Errors
    ///
    /// If a segment has the other direction or is not in guest memory, or if there are more than `limit`
    /// bytes or no whole number of `unit` bytes; `expected` says so in words.
    pub fn read(
        &self,
        memory: &GuestMemoryMmap,
        buffer: &mut Vec<u8>,
        unit: usize,
        limit: usize,
        expected: &'static str,
    ) -> Result<(), RequestError> {
        let segments = self.all(false)?;
        let length: u64 = segments
            .iter()
            .map(|segment| u64::from(segment.length))
            .sum();
        let bad_length = || RequestError::BadLength {
            address: segments.first().map_or(0, |first| first.address),
            length,
            expected,
        };
        let total = usize::try_from(length).map_err(|_| bad_length())?;
        if total > limit || total % unit != 0 {
            return Err(bad_length());
        }
        buffer.clear();
        buffer.resize(total, 0);
        let mut rest = buffer.as_mut_slice();
        for segment in segments {
            let (part, after) = rest.split_at_mut((segment.length as usize).min(rest.len()));
            memory
                .read_slice(part, GuestAddress(segment.address))
                .map_err(|_| RequestError::Unreadable {
                    address: segment.address,
                    length: segment.length,
                })?;
            rest = after;
        }
        Ok(())
    }

    fn all(&self, writable: bool) -> Result<&[Segment], RequestError> {
        match self
            .segments
            .iter()
            .find(|segment| segment.writable != writable)
        {
            Some(segment) => Err(RequestError::WrongDirection {
                address: segment.address,
                length: segment.length,
            }),
            None => Ok(&self.segments),
        }
    }
}
