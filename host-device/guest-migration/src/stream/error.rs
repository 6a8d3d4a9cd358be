// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of a stream.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::destination_error::DestinationError;
use super::format_error::Fault;
use super::Address;
use crate::PageRun;

/// Why a stream ended early.
///
/// Cheap to clone: every call after the first failure returns a copy of the same error.
#[derive(Debug, Clone, Error)]
pub enum StreamError {
    /// The caller cancelled the stream, or dropped the writer before its end.
    #[error("stream was cancelled")]
    Cancelled,
    /// The sender cannot connect to the address or open it.
    #[error("cannot send to {address}: {source}")]
    Connect {
        /// The address.
        address: Address,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// The receiver cannot listen at the address, open it or accept a connection.
    #[error("cannot receive at {address}: {source}")]
    Listen {
        /// The address.
        address: Address,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// Too few channels connected before the timeout.
    #[error("only {there} of {wanted} channels connected within {timeout:?}")]
    MissingChannels {
        /// Number of channels that connected.
        there: usize,
        /// Number of channels in the header, or 1 if no channel connected.
        wanted: usize,
        /// How long the receiver waited for the missing channel.
        timeout: Duration,
    },
    /// The options contradict each other, or exceed the limits of the format.
    #[error("{0}")]
    Options(String),
    /// A system call or library call failed that has no variant of its own.
    #[error("{doing}: {source}")]
    System {
        /// Description of the failure.
        doing: &'static str,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// The transport failed.
    #[error("channel {channel}, byte {offset}: {doing} failed: {source}")]
    Transport {
        /// The channel.
        channel: u16,
        /// Bytes of the channel's stream before the failure.
        offset: u64,
        /// The operation that failed.
        doing: &'static str,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// The peer closed the connection.
    #[error("channel {channel}, byte {offset}: peer closed the connection")]
    Closed {
        /// The channel.
        channel: u16,
        /// Bytes of the channel's stream before the end of the connection.
        offset: u64,
    },
    /// The peer is connected, but made no progress before the timeout.
    #[error("channel {channel}, byte {offset}: {doing} made no progress for {timeout:?}")]
    Stalled {
        /// The channel.
        channel: u16,
        /// Bytes of the channel's stream before the wait.
        offset: u64,
        /// The operation that waited.
        doing: &'static str,
        /// The timeout.
        timeout: Duration,
    },
    /// The receiver refused the stream, with this message.
    #[error("receiver refused the stream: {0}")]
    Refused(String),
    /// The receiver accepted the stream and failed later, with this message.
    #[error("receiver failed: {0}")]
    ReceiverFailed(String),
    /// The receiver sent an invalid or unexpected answer.
    #[error("channel {channel}: receiver sent an invalid answer: {fault}")]
    Answer {
        /// The channel.
        channel: u16,
        /// The fault in the answer.
        fault: Fault,
    },
    /// The stream violates the format.
    #[error("channel {channel}, byte {offset}: {fault}")]
    Malformed {
        /// The channel.
        channel: u16,
        /// Offset in the channel's stream where the faulty header, record or trailing data begins, in bytes.
        offset: u64,
        /// The fault in the stream.
        fault: Fault,
    },
    /// The memory files do not fit the stream, or cannot be used.
    #[error(transparent)]
    Destination(Arc<DestinationError>),
    /// The guest memory to send cannot be read.
    #[error("guest memory cannot be read: {pages} pages from page {first} of RAM block {block}: {source}")]
    Memory {
        /// Index of the RAM block.
        block: usize,
        /// The first page.
        first: u64,
        /// Number of pages.
        pages: u64,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// The caller passed a run that is not in the layout, or bytes of another length than the run.
    #[error("{pages} pages from page {first} of RAM block {block}, given with {bytes} bytes, are not in the layout")]
    InvalidRun {
        /// Index of the RAM block.
        block: usize,
        /// The first page.
        first: u64,
        /// Number of pages.
        pages: u64,
        /// Number of bytes that the caller passed, or 0 if the call takes none.
        bytes: usize,
    },
    /// The content of the memory files differs from the sender's guest memory.
    #[error("digest of the memory files is {here:032x}, the sender's is {there:032x}: received pages differ from the source")]
    ContentMismatch {
        /// The content digest of the memory files.
        here: u128,
        /// The content digest in the sender's final record.
        there: u128,
    },
}

impl From<DestinationError> for StreamError {
    fn from(error: DestinationError) -> Self {
        Self::Destination(Arc::new(error))
    }
}

/// Returns the error for a run that is not in the layout, or that does not have the length of `bytes`.
pub(super) fn invalid_run(run: PageRun, bytes: usize) -> StreamError {
    StreamError::InvalidRun {
        block: run.block,
        first: run.first,
        pages: run.pages,
        bytes,
    }
}
