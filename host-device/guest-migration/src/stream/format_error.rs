// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Violations of the format.

use thiserror::Error;

use super::format::{MESSAGE_MAX, VERSION};
use crate::PAGE_SIZE;

/// A violation of the format in a stream or an answer.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[allow(missing_docs)] // The messages describe the variants.
pub enum Fault {
    #[error("stream starts with {0:02x?}: not a stream of guest memory")]
    Magic([u8; 8]),
    #[error("stream has version {0}, this receiver supports version {VERSION} only")]
    Version(u32),
    #[error("header length of {0} bytes is invalid")]
    HeaderLength(u32),
    #[error("header checksum does not match: header is corrupt")]
    HeaderChecksum,
    #[error("header length does not match its content")]
    HeaderContent,
    #[error("page size is {0} bytes, this receiver supports {PAGE_SIZE} bytes only")]
    PageSize(u32),
    #[error("header flags {0:#x} are not supported")]
    HeaderFlags(u32),
    #[error("channel number {channel} of {channels} channels is invalid")]
    Channels { channel: u16, channels: u16 },
    #[error("header has an invalid number of RAM blocks: {0}")]
    RamBlockCount(u32),
    #[error("name of RAM block {0} is empty, too long, not UTF-8, or not unique")]
    RamBlockName(u32),
    #[error("RAM block {block} has an invalid number of pages: {pages}")]
    RamBlockPages { block: u32, pages: u64 },
    #[error("sender waits for answers, which this transport cannot carry")]
    OneWay,
    #[error("channel belongs to another migration")]
    OtherMigration,
    #[error("channel {0} is already connected")]
    DuplicateChannel(u16),
    #[error("stream ends inside its header")]
    TruncatedHeader,
    #[error("stream ends without its final record")]
    MissingFinalRecord,
    #[error("stream ends inside a record")]
    TruncatedRecord,
    #[error("record checksum does not match: record is corrupt or out of order")]
    RecordChecksum,
    #[error("record has number {0}, expected {1}")]
    Sequence(u64, u64),
    #[error("record kind {0} is unknown")]
    RecordKind(u8),
    #[error("record of kind {kind} has invalid flags {flags:#x}")]
    Flags { kind: u8, flags: u8 },
    #[error("record names RAM block {0}, which does not exist")]
    RamBlock(u16),
    #[error("record names {pages} pages from page {first}, but the RAM block has {has}")]
    Outside { first: u64, pages: u64, has: u64 },
    #[error("record has an invalid number of pages: {0}")]
    Pages(u64),
    #[error("record has an invalid length of {length} bytes for {pages} pages")]
    Length { length: u32, pages: u64 },
    #[error("reserved field is not zero")]
    Reserved,
    #[error("page checksum does not match: pages were corrupted in transit")]
    PayloadChecksum,
    #[error("compressed pages do not decompress to {pages} pages: {why}")]
    Compressed { pages: u64, why: String },
    #[error("iteration {0} ends, expected the end of iteration {1}")]
    IterationEnd(u64, u64),
    #[error("channels end after different numbers of iterations")]
    IterationsDiffer,
    #[error("final record has {said} {what}, the stream had {seen}")]
    Count {
        what: &'static str,
        said: u64,
        seen: u64,
    },
    #[error("final records of the channels differ")]
    FinalRecordsDiffer,
    #[error("stream digest in the final record does not match")]
    StreamDigest,
    #[error("data follows the final record")]
    TrailingData,
    #[error("it is not an answer, or it is corrupt")]
    AnswerFormat,
    #[error("answer of kind {0} is unexpected")]
    AnswerKind(u8),
    #[error("message has {0} bytes, more than {MESSAGE_MAX}")]
    AnswerMessage(u16),
}
