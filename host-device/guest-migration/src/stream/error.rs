// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of a stream.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::format::{MESSAGE_MAX, VERSION};
use super::Address;
use crate::PAGE_SIZE;

/// Why a stream ended early.
///
/// Cheap to clone: every call after the first failure returns a copy of the same error.
#[derive(Debug, Clone, Error)]
pub enum StreamError {
    /// The caller cancelled the stream, or dropped the writer before its end.
    #[error("the stream was cancelled")]
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
    #[error("{there} of {wanted} channels were connected within {timeout:?}")]
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
    #[error("channel {channel}, byte {offset}: the other side has closed the connection")]
    Closed {
        /// The channel.
        channel: u16,
        /// Bytes of the channel's stream before the end of the connection.
        offset: u64,
    },
    /// The peer is connected, but made no progress before the timeout.
    #[error("channel {channel}, byte {offset}: {doing}: nothing went on for {timeout:?}")]
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
    #[error("the receiver refuses the stream: {0}")]
    Refused(String),
    /// The receiver accepted the stream and failed later, with this message.
    #[error("the receiver has given up: {0}")]
    ReceiverFailed(String),
    /// The receiver sent an invalid or unexpected answer.
    #[error("channel {channel}: the receiver's answer makes no sense: {fault}")]
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
    #[error("cannot read {pages} pages from page {first} of block {block} on: {source}")]
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
    #[error("{pages} pages from page {first} of block {block} on, given with {bytes} bytes, are not pages of the layout")]
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
    #[error("the memory files' digest is {here:032x}, the sender's {there:032x}: some page is not as it was sent")]
    ContentMismatch {
        /// The content digest of the memory files.
        here: u128,
        /// The content digest in the sender's final record.
        there: u128,
    },
}

/// A violation of the format in a stream or an answer.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[allow(missing_docs)] // The messages describe the variants.
pub enum Fault {
    #[error("the stream begins with {0:02x?}: this is not a stream of memory pages")]
    Magic([u8; 8]),
    #[error("the stream is of version {0}, this receiver knows version {VERSION} only")]
    Version(u32),
    #[error("the header says that it has {0} bytes, which no header has")]
    HeaderLength(u32),
    #[error("the header is damaged: its check value does not fit")]
    HeaderChecksum,
    #[error("the header has bytes that belong to nothing")]
    HeaderContent,
    #[error("pages of {0} bytes; this receiver knows pages of {PAGE_SIZE} bytes only")]
    PageSize(u32),
    #[error("the header has the flags {0:#x}, of which some are unknown")]
    HeaderFlags(u32),
    #[error("it is channel {channel} of {channels}, which cannot be")]
    Channels { channel: u16, channels: u16 },
    #[error("the header has {0} blocks, which is none or too many")]
    RamBlockCount(u32),
    #[error("the name of block {0} is empty, too long, not UTF-8, or taken")]
    RamBlockName(u32),
    #[error("block {block} has {pages} pages, which is none or too many")]
    RamBlockPages { block: u32, pages: u64 },
    #[error("the sender waits for answers, which cannot be given here")]
    OneWay,
    #[error("its header is not that of the other channels' migration")]
    OtherMigration,
    #[error("there was a channel {0} already")]
    DuplicateChannel(u16),
    #[error("the stream ends before its header does")]
    TruncatedHeader,
    #[error("the stream ends without its final record")]
    MissingFinalRecord,
    #[error("the stream ends inside a record")]
    TruncatedRecord,
    #[error("the record is damaged, or out of its place: its check value does not fit")]
    RecordChecksum,
    #[error("the record has the number {0}, expected was {1}")]
    Sequence(u64, u64),
    #[error("there is no record of kind {0}")]
    RecordKind(u8),
    #[error("a record of kind {kind} has the flags {flags:#x}")]
    Flags { kind: u8, flags: u8 },
    #[error("the record is for block {0}, which does not exist")]
    RamBlock(u16),
    #[error("the record is for {pages} pages from page {first} on, the block has {has}")]
    Outside { first: u64, pages: u64, has: u64 },
    #[error("the record has {0} pages, which is none or too many")]
    Pages(u64),
    #[error("the record has {length} bytes for {pages} pages")]
    Length { length: u32, pages: u64 },
    #[error("a field is not zero that must be")]
    Reserved,
    #[error("the pages' check value does not fit: they were changed on the way")]
    PayloadChecksum,
    #[error("the compressed pages cannot be unpacked into {pages} pages: {why}")]
    Compressed { pages: u64, why: String },
    #[error("round {0} ends, expected was the end of round {1}")]
    IterationEnd(u64, u64),
    #[error("the final record says {said} {what}, there were {seen}")]
    Count {
        what: &'static str,
        said: u64,
        seen: u64,
    },
    #[error("the final records of the channels differ")]
    FinalRecordsDiffer,
    #[error("the digest of the stream in the final record does not fit")]
    StreamDigest,
    #[error("something follows the final record")]
    TrailingData,
    #[error("it is not an answer, or damaged")]
    AnswerFormat,
    #[error("an answer of kind {0} was not asked for")]
    AnswerKind(u8),
    #[error("its words have {0} bytes, more than {MESSAGE_MAX}")]
    AnswerMessage(u16),
}

/// Why a stream cannot be received into the memory files.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages describe the variants.
pub enum DestinationError {
    #[error("no memory file was given")]
    NoFile,
    #[error("two memory files were given for block '{0}'")]
    DuplicateFile(String),
    #[error("the stream has block '{block}', for which no memory file was given (given: {given})")]
    NoFileForBlock { block: String, given: String },
    #[error("the stream has {blocks} blocks ({names}), and only one memory file was given: give each as NAME=PATH")]
    NeedNames { blocks: usize, names: String },
    #[error("a memory file was given for block '{0}', which the stream has not")]
    UnusedFile(String),
    #[error("{} has {has} bytes, block '{block}' of the stream {wanted}: give a file of that size, or none that exists", path.display())]
    SizeMismatch {
        path: PathBuf,
        block: String,
        has: u64,
        wanted: u64,
    },
    #[error("{} is not a regular file: memory is received into files only", .0.display())]
    NotRegularFile(PathBuf),
    #[error("another receiver is at work on {}", .0.display())]
    Busy(PathBuf),
    #[error("the memory files could not be compared with the sender's memory")]
    DigestFailed,
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
}

impl From<DestinationError> for StreamError {
    fn from(error: DestinationError) -> Self {
        Self::Destination(Arc::new(error))
    }
}
