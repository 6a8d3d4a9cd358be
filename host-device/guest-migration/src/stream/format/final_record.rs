// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The payload of the final record: counts and digests of the stream.

use xxhash_rust::xxh3::xxh3_128;

use super::fields::Fields;
use crate::stream::format_error::Fault;

pub(super) const FINAL_SIZE: usize = 96;

/// Counts of the pages and bytes sent on one channel or on all channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::stream) struct StreamCounts {
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
pub(in crate::stream) struct Totals {
    pub counts: StreamCounts,
    /// The content digest of guest memory, if the sender has one.
    pub content: Option<u128>,
    /// The [`stream_digest`] of all channels.
    pub stream: u128,
}

/// The payload of the final record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::stream) struct Final {
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
pub(in crate::stream) fn stream_digest(chains: impl IntoIterator<Item = u64>) -> u128 {
    let bytes: Vec<u8> = chains.into_iter().flat_map(u64::to_le_bytes).collect();
    xxh3_128(&bytes)
}
