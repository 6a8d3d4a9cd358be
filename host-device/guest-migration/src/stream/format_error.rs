// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Violations of the format.

use thiserror::Error;

use super::format::{MESSAGE_MAX, VERSION};
use crate::PAGE_SIZE;

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
