// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The header of a record, and the checksum of its payload.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::fields::{Fields, CHECKSUM_SIZE};
use super::final_record::FINAL_SIZE;
use super::limits::RECORD_PAGES;
use crate::stream::format_error::Fault;
use crate::PAGE_SIZE;

pub(in crate::stream) const RECORD_HEADER_SIZE: usize = 48;
/// Record flag: the payload is compressed with zstd.
pub(in crate::stream) const FLAG_ZSTD: u8 = 1;
/// Record flag: the payload has no checksum, because the sender handed it to the kernel without a copy.
pub(in crate::stream) const FLAG_NO_CHECKSUM: u8 = 2;

/// The kind of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::stream) enum RecordKind {
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

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::stream) struct RecordHeader {
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

/// Returns the size of `pages` pages, in bytes. Saturates, which cannot happen within the limits of the format.
pub(in crate::stream) const fn page_bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE)
}

/// Returns the checksum of a payload.
pub(in crate::stream) fn payload_checksum(payload: &[u8]) -> u64 {
    xxh3_64(payload)
}
