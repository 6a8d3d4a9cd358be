// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The format of a stream: encodes and decodes headers, records and answers as `docs/stream.md` describes them.
//!
//! This module does no I/O. Decoding checks lengths, flags and reserved fields. The decoder of a channel checks the
//! rest, which depends on the RAM blocks and on earlier records.

use xxhash_rust::xxh3::{xxh3_128, xxh3_64, xxh3_64_with_seed};

use super::error::Fault;
use crate::PAGE_SIZE;

/// The format version of a sent stream. A receiver accepts no other version.
pub const VERSION: u32 = 1;
/// The maximum number of channels of a stream.
pub const CHANNELS_MAX: u16 = 64;
/// The maximum number of pages in a record that carries page content.
pub const RECORD_PAGES: u64 = 256;
/// The maximum length of the message in a receiver's answer, in bytes.
pub const MESSAGE_MAX: u16 = 1024;

pub(super) const MAGIC: [u8; 8] = *b"\x8dPAGES\r\n";
/// Length of the first part of a stream header, in bytes: magic, version and header length. It is read first.
pub(super) const HEADER_START: usize = 16;
const HEADER_FIXED: usize = 64;
const NAME_MAX: usize = 255;
const BLOCKS_MAX: usize = 256;
/// The maximum number of pages of a RAM block: 16 TiB.
const BLOCK_PAGES_MAX: u64 = 1 << 32;
const CHECKSUM_SIZE: usize = 8;
const HEADER_MAX: usize = HEADER_FIXED + BLOCKS_MAX * (10 + NAME_MAX) + CHECKSUM_SIZE;
pub(super) const RECORD_HEADER_SIZE: usize = 48;
pub(super) const FINAL_SIZE: usize = 96;
pub(super) const ANSWER_FIXED: usize = 8;
const ANSWER_MAGIC: [u8; 4] = *b"\x8dANS";

/// Header flag: the sender waits for answers.
const HEADER_ANSWERS: u32 = 1;

/// Returns the size of `pages` pages, in bytes. Saturates, which cannot happen within the limits of the format.
pub(super) const fn page_bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE)
}

/// A cursor that takes little-endian integers from the front of a byte slice.
///
/// Each method returns `None` if too few bytes are left.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn u128(&mut self) -> Option<u128> {
        self.array().map(u128::from_le_bytes)
    }
}

/// A RAM block, as the stream header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RamBlockEntry {
    pub name: String,
    pub pages: u64,
}

/// The stream header, with which each channel begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StreamHeader {
    pub answers: bool,
    pub id: [u8; 16],
    pub channel: u16,
    pub channels: u16,
    pub seed: u64,
    pub blocks: Vec<RamBlockEntry>,
}

impl StreamHeader {
    /// Returns the encoded header and its checksum, which starts the checksum chain of the channel's records.
    ///
    /// Returns `None` if the header exceeds the limits of the format.
    pub fn encode(&self) -> Option<(Vec<u8>, u64)> {
        let names: usize = self.blocks.iter().map(|block| 10 + block.name.len()).sum();
        let length = HEADER_FIXED + names + CHECKSUM_SIZE;
        let mut bytes = Vec::with_capacity(length);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::try_from(length).ok()?.to_le_bytes());
        bytes.extend(u32::try_from(PAGE_SIZE).ok()?.to_le_bytes());
        let flags = if self.answers { HEADER_ANSWERS } else { 0 };
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.id);
        bytes.extend(self.channel.to_le_bytes());
        bytes.extend(self.channels.to_le_bytes());
        bytes.extend(u32::try_from(self.blocks.len()).ok()?.to_le_bytes());
        bytes.extend(self.seed.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        for block in &self.blocks {
            bytes.extend(block.pages.to_le_bytes());
            bytes.extend(u16::try_from(block.name.len()).ok()?.to_le_bytes());
            bytes.extend(block.name.bytes());
        }
        let check = xxh3_64(&bytes);
        bytes.extend(check.to_le_bytes());
        // The limits are checked in `decode` only. A header that passes can be read by every receiver.
        Self::decode(&bytes).ok()?;
        Some((bytes, check))
    }

    /// Returns the length of the header that begins with `start`, in bytes.
    ///
    /// `start` holds at least the first [`HEADER_START`] bytes. Fails if magic, version or length are invalid.
    pub fn length(start: &[u8]) -> Result<usize, Fault> {
        let mut fields = Fields(start);
        let (Some(magic), Some(version), Some(length)) =
            (fields.array::<8>(), fields.u32(), fields.u32())
        else {
            return Err(Fault::TruncatedHeader);
        };
        if magic != MAGIC {
            return Err(Fault::Magic(magic));
        }
        if version != VERSION {
            return Err(Fault::Version(version));
        }
        match usize::try_from(length) {
            Ok(bytes) if (HEADER_FIXED + CHECKSUM_SIZE..=HEADER_MAX).contains(&bytes) => Ok(bytes),
            _ => Err(Fault::HeaderLength(length)),
        }
    }

    /// Decodes a header. Returns it with its checksum, which starts the checksum chain of the channel's records.
    pub fn decode(bytes: &[u8]) -> Result<(Self, u64), Fault> {
        let length = Self::length(bytes)?;
        if bytes.len() != length {
            return Err(Fault::TruncatedHeader);
        }
        let (body, check) = bytes
            .split_at_checked(length - CHECKSUM_SIZE)
            .ok_or(Fault::TruncatedHeader)?;
        let check = Fields(check).u64().ok_or(Fault::TruncatedHeader)?;
        if xxh3_64(body) != check {
            return Err(Fault::HeaderChecksum);
        }
        let mut fields = Fields(body.get(HEADER_START..).ok_or(Fault::TruncatedHeader)?);
        Self::fields(&mut fields)
            .unwrap_or(Err(Fault::HeaderContent))
            .map(|header| (header, check))
    }

    /// Decodes the fields after the first [`HEADER_START`] bytes. Returns `None` if the bytes end too early.
    fn fields(fields: &mut Fields<'_>) -> Option<Result<Self, Fault>> {
        let page_size = fields.u32()?;
        if u64::from(page_size) != PAGE_SIZE {
            return Some(Err(Fault::PageSize(page_size)));
        }
        let flags = fields.u32()?;
        if flags & !HEADER_ANSWERS != 0 {
            return Some(Err(Fault::HeaderFlags(flags)));
        }
        let id = fields.array()?;
        let (channel, channels) = (fields.u16()?, fields.u16()?);
        if channel >= channels || channels > CHANNELS_MAX {
            return Some(Err(Fault::Channels { channel, channels }));
        }
        let count = fields.u32()?;
        let seed = fields.u64()?;
        if fields.u64()? != 0 {
            return Some(Err(Fault::Reserved));
        }
        if !(1..=BLOCKS_MAX).contains(&(count as usize)) {
            return Some(Err(Fault::RamBlockCount(count)));
        }
        let mut blocks: Vec<RamBlockEntry> = Vec::new();
        for block in 0..count {
            let pages = fields.u64()?;
            let length = usize::from(fields.u16()?);
            let name = String::from_utf8(fields.bytes(length)?.to_vec());
            if !(1..=BLOCK_PAGES_MAX).contains(&pages) {
                return Some(Err(Fault::RamBlockPages { block, pages }));
            }
            match name {
                Ok(name)
                    if (1..=NAME_MAX).contains(&length)
                        && blocks.iter().all(|other| other.name != name) =>
                {
                    blocks.push(RamBlockEntry { name, pages });
                }
                _ => return Some(Err(Fault::RamBlockName(block))),
            }
        }
        if !fields.0.is_empty() {
            return Some(Err(Fault::HeaderContent));
        }
        Some(Ok(Self {
            answers: flags & HEADER_ANSWERS != 0,
            id,
            channel,
            channels,
            seed,
            blocks,
        }))
    }
}

/// The kind of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordKind {
    Pages,
    Zeros,
    IterationEnd,
    Final,
}

impl RecordKind {
    const fn number(self) -> u8 {
        match self {
            Self::Pages => 1,
            Self::Zeros => 2,
            Self::IterationEnd => 3,
            Self::Final => 4,
        }
    }

    const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Pages),
            2 => Some(Self::Zeros),
            3 => Some(Self::IterationEnd),
            4 => Some(Self::Final),
            _ => None,
        }
    }
}

/// Record flag: the payload is compressed with zstd.
pub(super) const FLAG_ZSTD: u8 = 1;
/// Record flag: the payload has no checksum, because the sender handed it to the kernel without a copy.
pub(super) const FLAG_NO_CHECKSUM: u8 = 2;

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHeader {
    pub kind: RecordKind,
    pub flags: u8,
    pub block: u16,
    /// Length of the payload that follows the header, in bytes.
    pub length: u32,
    pub sequence: u64,
    /// The first page of the run. In an iteration end: the number of the iteration, from 1. In a final record: the
    /// number of iterations.
    pub first: u64,
    pub pages: u64,
    /// The checksum of the payload. 0 without a payload or with [`FLAG_NO_CHECKSUM`].
    pub payload_checksum: u64,
}

impl RecordHeader {
    /// Returns the encoded record header, and sets `chain` to its checksum.
    ///
    /// `chain` must be the checksum of the previous record header, or of the stream header before the first record.
    pub fn encode(&self, chain: &mut u64) -> [u8; RECORD_HEADER_SIZE] {
        let mut bytes = [0; RECORD_HEADER_SIZE];
        let words = [
            u64::from(self.kind.number())
                | u64::from(self.flags) << 8
                | u64::from(self.block) << 16
                | u64::from(self.length) << 32,
            self.sequence,
            self.first,
            self.pages,
            self.payload_checksum,
        ];
        for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        if let Some((body, check)) = bytes.split_last_chunk_mut::<CHECKSUM_SIZE>() {
            *chain = xxh3_64_with_seed(body, *chain);
            *check = chain.to_le_bytes();
        }
        bytes
    }

    /// Decodes a record header, and sets `chain` to its checksum.
    ///
    /// `chain` must be the checksum of the previous record header, or of the stream header before the first record. The
    /// record must have the sequence number `sequence`.
    pub fn decode(
        bytes: &[u8; RECORD_HEADER_SIZE],
        chain: &mut u64,
        sequence: u64,
    ) -> Result<Self, Fault> {
        let Some((body, check)) = bytes.split_last_chunk::<CHECKSUM_SIZE>() else {
            return Err(Fault::RecordChecksum);
        };
        let expected = xxh3_64_with_seed(body, *chain);
        if u64::from_le_bytes(*check) != expected {
            return Err(Fault::RecordChecksum);
        }
        *chain = expected;
        let head = Self::fields(&mut Fields(body)).unwrap_or(Err(Fault::RecordChecksum))?;
        if head.sequence != sequence {
            return Err(Fault::Sequence(head.sequence, sequence));
        }
        head.check().map(|()| head)
    }

    /// Decodes the fields before the checksum. Returns `None` if the bytes end too early.
    fn fields(fields: &mut Fields<'_>) -> Option<Result<Self, Fault>> {
        let number = fields.u8()?;
        let Some(kind) = RecordKind::from_number(number) else {
            return Some(Err(Fault::RecordKind(number)));
        };
        Some(Ok(Self {
            kind,
            flags: fields.u8()?,
            block: fields.u16()?,
            length: fields.u32()?,
            sequence: fields.u64()?,
            first: fields.u64()?,
            pages: fields.u64()?,
            payload_checksum: fields.u64()?,
        }))
    }

    /// Checks flags, lengths, page counts and reserved fields: everything that does not depend on the RAM blocks.
    fn check(&self) -> Result<(), Fault> {
        let flags = match self.kind {
            // The sender reads the pages that it compresses, so a compressed payload has a checksum.
            RecordKind::Pages if self.flags != FLAG_ZSTD | FLAG_NO_CHECKSUM => {
                FLAG_ZSTD | FLAG_NO_CHECKSUM
            }
            _ => 0,
        };
        if self.flags & !flags != 0 {
            return Err(Fault::Flags {
                kind: self.kind.number(),
                flags: self.flags,
            });
        }
        let length = u64::from(self.length);
        let wrong_length = Err(Fault::Length {
            length: self.length,
            pages: self.pages,
        });
        match self.kind {
            RecordKind::Pages => {
                if !(1..=RECORD_PAGES).contains(&self.pages) {
                    return Err(Fault::Pages(self.pages));
                }
                let raw = page_bytes(self.pages);
                let fits = match self.flags & FLAG_ZSTD {
                    0 => length == raw,
                    _ => (1..raw).contains(&length),
                };
                if !fits {
                    return wrong_length;
                }
                if self.flags & FLAG_NO_CHECKSUM != 0 && self.payload_checksum != 0 {
                    return Err(Fault::Reserved);
                }
            }
            RecordKind::Zeros => {
                if self.pages == 0 {
                    return Err(Fault::Pages(0));
                }
                if length != 0 {
                    return wrong_length;
                }
                if self.payload_checksum != 0 {
                    return Err(Fault::Reserved);
                }
            }
            RecordKind::IterationEnd => {
                if length != 0 {
                    return wrong_length;
                }
                if self.pages != 0 || self.payload_checksum != 0 || self.block != 0 {
                    return Err(Fault::Reserved);
                }
            }
            RecordKind::Final => {
                if length != FINAL_SIZE as u64 {
                    return wrong_length;
                }
                if self.pages != 0 || self.block != 0 {
                    return Err(Fault::Reserved);
                }
            }
        }
        Ok(())
    }
}

/// Returns the checksum of a payload.
pub(super) fn payload_checksum(payload: &[u8]) -> u64 {
    xxh3_64(payload)
}

/// Counts of the pages and bytes sent on one channel or on all channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StreamCounts {
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zeros: u64,
    /// Payload bytes of the records that carry page content.
    pub payload: u64,
}

impl StreamCounts {
    pub fn add(&mut self, other: Self) {
        self.pages = self.pages.saturating_add(other.pages);
        self.zeros = self.zeros.saturating_add(other.zeros);
        self.payload = self.payload.saturating_add(other.payload);
    }
}

/// The part of the final record that describes all channels together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Totals {
    pub counts: StreamCounts,
    /// The content digest of guest memory, if the sender has one.
    pub content: Option<u128>,
    /// The [`stream_digest`] of all channels.
    pub stream: u128,
}

/// The payload of the final record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Final {
    /// The counts of this channel.
    pub counts: StreamCounts,
    pub totals: Totals,
}

impl Final {
    pub fn encode(&self) -> [u8; FINAL_SIZE] {
        let mut bytes = [0; FINAL_SIZE];
        let content = self.totals.content;
        let counts = [self.counts, self.totals.counts];
        let words = counts
            .iter()
            .flat_map(|counts| [counts.pages, counts.zeros, counts.payload])
            .chain([u64::from(content.is_some()), 0])
            .flat_map(u64::to_le_bytes);
        let digests = [content.unwrap_or(0), self.totals.stream];
        let all = words.chain(digests.into_iter().flat_map(u128::to_le_bytes));
        for (slot, byte) in bytes.iter_mut().zip(all) {
            *slot = byte;
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        Self::fields(&mut Fields(bytes)).ok_or(Fault::Reserved)
    }

    /// Decodes the fields. Returns `None` if the bytes end too early or a field has an invalid value.
    fn fields(fields: &mut Fields<'_>) -> Option<Self> {
        let mut counts = || {
            Some(StreamCounts {
                pages: fields.u64()?,
                zeros: fields.u64()?,
                payload: fields.u64()?,
            })
        };
        let (own, all) = (counts()?, counts()?);
        let (has, reserved) = (fields.u64()?, fields.u64()?);
        let (content, stream) = (fields.u128()?, fields.u128()?);
        let content = match (has, content) {
            (0, 0) => None,
            (1, content) => Some(content),
            _ => return None,
        };
        (reserved == 0).then_some(Self {
            counts: own,
            totals: Totals {
                counts: all,
                content,
                stream,
            },
        })
    }
}

/// Returns the digest of the stream.
///
/// `chains` holds the last checksum of each channel before its final record, by ascending channel index. The checksum
/// chains cover all record headers, and through them all payloads that have a checksum.
pub(super) fn stream_digest(chains: impl IntoIterator<Item = u64>) -> u128 {
    let bytes: Vec<u8> = chains.into_iter().flat_map(u64::to_le_bytes).collect();
    xxh3_128(&bytes)
}

/// An answer of the receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// The receiver accepts the stream. The sender can send records.
    Accepted,
    /// The receiver refuses the stream, for the reason in the message.
    Refused(String),
    /// The whole stream is received and verified. The memory files are no longer marked as incomplete.
    Complete,
    /// The receiver accepted the stream and failed later, for the reason in the message.
    Failed(String),
    /// The whole stream is received, and the receiver still verifies it. The sender keeps waiting.
    Working,
}

impl Answer {
    pub const fn number(&self) -> u8 {
        match self {
            Self::Accepted => 1,
            Self::Refused(_) => 2,
            Self::Complete => 3,
            Self::Failed(_) => 4,
            Self::Working => 5,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let words = match self {
            Self::Refused(words) | Self::Failed(words) => shortened(words),
            _ => "",
        };
        let mut bytes = ANSWER_MAGIC.to_vec();
        bytes.extend([self.number(), 0]);
        // The cast does not truncate: `shortened` limits the length to `MESSAGE_MAX`.
        bytes.extend((words.len() as u16).to_le_bytes());
        bytes.extend(words.bytes());
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// Returns how many bytes follow the first [`ANSWER_FIXED`] bytes of an answer.
    pub fn rest(fixed: &[u8; ANSWER_FIXED]) -> Result<usize, Fault> {
        let mut fields = Fields(fixed);
        if fields.array() != Some(ANSWER_MAGIC) {
            return Err(Fault::AnswerFormat);
        }
        fields.u16();
        match fields.u16() {
            Some(words) if words <= MESSAGE_MAX => Ok(usize::from(words) + CHECKSUM_SIZE),
            words => Err(Fault::AnswerMessage(words.unwrap_or(0))),
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let parts = bytes
            .split_last_chunk::<CHECKSUM_SIZE>()
            .and_then(|(body, check)| Some((body, check, body.split_at_checked(ANSWER_FIXED)?)));
        let Some((body, check, (fixed, words))) = parts else {
            return Err(Fault::AnswerFormat);
        };
        if xxh3_64(body) != u64::from_le_bytes(*check) {
            return Err(Fault::AnswerFormat);
        }
        let words = || printable(&String::from_utf8_lossy(words));
        match fixed.get(4).copied() {
            Some(1) => Ok(Self::Accepted),
            Some(2) => Ok(Self::Refused(words())),
            Some(3) => Ok(Self::Complete),
            Some(4) => Ok(Self::Failed(words())),
            Some(5) => Ok(Self::Working),
            kind => Err(Fault::AnswerKind(kind.unwrap_or(0))),
        }
    }
}

/// Returns the longest prefix of `text` with at most [`MESSAGE_MAX`] bytes that ends between two characters.
fn shortened(text: &str) -> &str {
    let mut end = text.len().min(usize::from(MESSAGE_MAX));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or("")
}

/// Returns the peer's message with control characters replaced by spaces, so that it can be printed on a terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
