// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The stream header.

use xxhash_rust::xxh3::xxh3_64;

use super::fields::{Fields, CHECKSUM_SIZE};
use super::limits::{CHANNELS_MAX, VERSION};
use crate::stream::format_error::Fault;
use crate::PAGE_SIZE;

const MAGIC: [u8; 8] = *b"\x8dPAGES\r\n";
/// Length of the first part of a stream header, in bytes: magic, version and header length. It is read first.
pub(in crate::stream) const HEADER_START: usize = 16;
const HEADER_FIXED: usize = 64;
const NAME_MAX: usize = 255;
const BLOCKS_MAX: usize = 256;
/// The maximum number of pages of a RAM block: 16 TiB.
const BLOCK_PAGES_MAX: u64 = 1 << 32;
const HEADER_MAX: usize = HEADER_FIXED + BLOCKS_MAX * (10 + NAME_MAX) + CHECKSUM_SIZE;
/// Header flag: the sender waits for answers.
const HEADER_ANSWERS: u32 = 1;

/// A RAM block, as the stream header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::stream) struct RamBlockEntry {
    pub name: String,
    pub pages: u64,
}

/// The stream header, with which each channel begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::stream) struct StreamHeader {
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
