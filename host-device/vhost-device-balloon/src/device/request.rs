// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Validated requests of the driver.
//!
//! The guest controls a descriptor chain, so the chain may loop, be longer than memory, or point anywhere.
//! [`Request::parse`] walks the chain once and returns a value of bounded size that holds the complete chain. The
//! accessors check the direction of segments, and read within the bounds of guest memory.

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::ReleaseError;

/// The largest queue size that is offered.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The most descriptors in one chain: the largest queue size that is offered.
pub const MAX_SEGMENTS: usize = MAX_QUEUE_SIZE as usize;

/// Guest memory, as descriptor chains hold it.
pub type MemoryGuard = vm_memory::GuestMemoryLoadGuard<GuestMemoryMmap>;

/// An error in a request. The guest causes all of these errors, except for [`ReleaseError::Punch`],
/// which the host causes.
#[derive(Debug, Error)]
pub enum RequestError {
    /// The available ring cannot be read.
    #[error("available ring cannot be read: {0}")]
    Ring(virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("descriptor {head} cannot be added to the used ring: {source}")]
    Return {
        /// Index of the chain's first descriptor.
        head: u16,
        /// The error of the queue.
        source: virtio_queue::Error,
    },
    /// A chain starts beyond the end of the descriptor table.
    #[error("descriptor {head} does not exist: queue size is {size}; request dropped")]
    NoSuchDescriptor {
        /// Index of the chain's first descriptor.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A chain loops, leaves the descriptor table, or is outside guest memory.
    #[error("descriptor chain {head} is broken after {segments} segments, the last one at {address:#x}; request dropped")]
    BrokenChain {
        /// Index of the chain's first descriptor.
        head: u16,
        /// The number of segments that could be read.
        segments: usize,
        /// Guest physical address of the last segment; 0 if there are no segments.
        address: u64,
    },
    /// A chain has more than [`MAX_SEGMENTS`] descriptors.
    #[error("descriptor chain {head} has more than {MAX_SEGMENTS} segments; request dropped")]
    TooManySegments {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A segment has the wrong direction: device-writable instead of device-readable, or vice versa.
    #[error("descriptor {address:#x}+{length} has the wrong direction; request dropped")]
    WrongDirection {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// The length is invalid for this queue.
    #[error("request at {address:#x} has {length} bytes, expected {expected}; request dropped")]
    BadLength {
        /// Guest physical address of the first segment.
        address: u64,
        /// Bytes in all segments.
        length: u64,
        /// The valid lengths, in words.
        expected: &'static str,
    },
    /// A segment is not in guest memory.
    #[error("descriptor {address:#x}+{length} is outside guest memory; request dropped")]
    Unreadable {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// A hint is invalid.
    #[error(transparent)]
    Hint(#[from] guest_migration::HintError),
    /// Memory cannot be released to the host.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// The driver sent a second statistics buffer while the device still held one.
    #[error(
        "second statistics buffer arrived before the first was returned; first buffer returned"
    )]
    SecondStatsBuffer,
}

/// A segment of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Guest physical address. Not checked.
    pub address: u64,
    /// Bytes. Not checked.
    pub length: u32,
    writable: bool,
}

/// A complete descriptor chain: at least one segment, at most [`MAX_SEGMENTS`].
#[derive(Clone, Debug)]
pub struct Request {
    segments: Vec<Segment>,
}

impl Request {
    /// Walks a chain to its end.
    ///
    /// # Errors
    ///
    /// If the chain is broken, or has more than [`MAX_SEGMENTS`] descriptors.
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

    /// Returns the number of segments.
    pub fn num_segments(&self) -> usize {
        self.segments.len()
    }

    /// Returns whether the first segment is device-writable.
    pub fn starts_writable(&self) -> bool {
        self.segments.first().is_some_and(|first| first.writable)
    }

    /// Returns the segments, if all of them are device-writable.
    ///
    /// # Errors
    ///
    /// The first segment that is not.
    pub fn writable(&self) -> Result<&[Segment], RequestError> {
        self.all(true)
    }

    /// Reads the request into `buffer`. All segments must be device-readable.
    ///
    /// # Errors
    ///
    /// If a segment is device-writable or not in guest memory. If the length is more than `limit` bytes, or is not a
    /// multiple of `unit` bytes; `expected` describes the valid lengths for the error.
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
