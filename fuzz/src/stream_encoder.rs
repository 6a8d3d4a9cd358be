// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An encoder of migration streams that is written from `docs/stream.md` and shares no code with `guest-migration`. It
//! encodes whatever it is told, with valid checksums.

use xxhash_rust::xxh3::{xxh3_128, xxh3_128_with_seed, xxh3_64, xxh3_64_with_seed};

pub const PAGE: usize = 4096;
/// Flag of the header: the sender waits for answers.
pub const ANSWERS: u32 = 1;
/// Flag of a record: the payload is compressed with zstd.
pub const ZSTD: u8 = 1;
/// Flag of a record: the payload has no checksum.
pub const NO_CHECKSUM: u8 = 2;

/// Kinds of records.
pub const PAGES: u8 = 1;
pub const ZEROS: u8 = 2;
pub const ITERATION_END: u8 = 3;
pub const FINAL: u8 = 4;

/// A change of one byte that is covered by a checksum, before the checksum is computed.
pub type Patch = (usize, u8);

fn patch(bytes: &mut [u8], patches: &[Patch]) {
    for (at, change) in patches {
        let length = bytes.len().max(1);
        if let Some(byte) = bytes.get_mut(at % length) {
            *byte ^= change;
        }
    }
}

/// The fields of a stream header.
#[derive(Clone, Debug)]
pub struct Header {
    pub flags: u32,
    pub channels: u16,
    pub seed: u64,
    /// Name and number of pages of each RAM block.
    pub blocks: Vec<(String, u64)>,
}

/// One channel of a stream.
#[derive(Clone, Debug)]
pub struct Channel {
    pub bytes: Vec<u8>,
    check: u64,
    sequence: u64,
    /// Pages, zero pages and payload bytes.
    pub counts: [u64; 3],
}

impl Channel {
    /// Begins a channel with its header.
    pub fn new(header: &Header, channel: u16, patches: &[Patch]) -> Self {
        let names: usize = header.blocks.iter().map(|(name, _)| 10 + name.len()).sum();
        let mut bytes = b"\x8dPAGES\r\n".to_vec();
        bytes.extend(1u32.to_le_bytes());
        bytes.extend((64 + names as u32 + 8).to_le_bytes());
        bytes.extend((PAGE as u32).to_le_bytes());
        bytes.extend(header.flags.to_le_bytes());
        bytes.extend([9; 16]);
        bytes.extend(channel.to_le_bytes());
        bytes.extend(header.channels.to_le_bytes());
        bytes.extend((header.blocks.len() as u32).to_le_bytes());
        bytes.extend(header.seed.to_le_bytes());
        bytes.extend([0; 8]);
        for (name, pages) in &header.blocks {
            bytes.extend(pages.to_le_bytes());
            bytes.extend((name.len() as u16).to_le_bytes());
            bytes.extend(name.as_bytes());
        }
        patch(&mut bytes, patches);
        let check = xxh3_64(&bytes);
        bytes.extend(check.to_le_bytes());
        Self {
            bytes,
            check,
            sequence: 0,
            counts: [0; 3],
        }
    }

    /// Returns the last checksum of the channel.
    pub fn check(&self) -> u64 {
        self.check
    }

    /// Adds a record.
    pub fn record(
        &mut self,
        (kind, flags, block): (u8, u8, u16),
        (first, pages): (u64, u64),
        payload: &[u8],
        patches: &[Patch],
    ) {
        let mut head = vec![kind, flags];
        head.extend(block.to_le_bytes());
        head.extend((payload.len() as u32).to_le_bytes());
        head.extend(self.sequence.to_le_bytes());
        head.extend(first.to_le_bytes());
        head.extend(pages.to_le_bytes());
        let checked = !payload.is_empty() && flags & NO_CHECKSUM == 0;
        let check = if checked { xxh3_64(payload) } else { 0 };
        head.extend(check.to_le_bytes());
        patch(&mut head, patches);
        self.check = xxh3_64_with_seed(&head, self.check);
        self.bytes.extend(head);
        self.bytes.extend(self.check.to_le_bytes());
        self.bytes.extend(payload);
        self.sequence += 1;
        match kind {
            PAGES => {
                self.counts[0] = self.counts[0].wrapping_add(pages);
                self.counts[2] += payload.len() as u64;
            }
            ZEROS => self.counts[1] = self.counts[1].wrapping_add(pages),
            _ => {}
        }
    }
}

/// Ends all channels with their final records.
pub fn finish(
    channels: &mut [Channel],
    iterations: u64,
    content: Option<u128>,
    patches: &[Vec<Patch>],
) {
    let mut totals = [0u64; 3];
    for channel in channels.iter() {
        for (sum, count) in totals.iter_mut().zip(channel.counts) {
            *sum = u64::wrapping_add(*sum, count);
        }
    }
    let checks: Vec<u8> = channels
        .iter()
        .flat_map(|channel| channel.check().to_le_bytes())
        .collect();
    let stream = xxh3_128(&checks);
    for (index, channel) in channels.iter_mut().enumerate() {
        let words = channel.counts.into_iter().chain(totals);
        let words = words.chain([content.is_some().into(), 0]);
        let mut payload: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        payload.extend(content.unwrap_or(0).to_le_bytes());
        payload.extend(stream.to_le_bytes());
        if let Some(patches) = patches.get(index) {
            patch(&mut payload, patches);
        }
        channel.record((FINAL, 0, 0), (iterations, 0), &payload, &[]);
    }
}

/// Returns the content digest of RAM blocks.
pub fn content_digest(seed: u64, blocks: &[Vec<u8>]) -> u128 {
    let mut sum = 0u128;
    for (block, bytes) in (0u64..).zip(blocks) {
        for (page, bytes) in (0u64..).zip(bytes.chunks(PAGE)) {
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            let hash = match xxh3_128_with_seed(bytes, seed) {
                0 => 1,
                hash => hash,
            };
            let mut term = hash.to_le_bytes().to_vec();
            term.extend(block.to_le_bytes());
            term.extend(page.to_le_bytes());
            sum = sum.wrapping_add(xxh3_128(&term));
        }
    }
    sum
}
