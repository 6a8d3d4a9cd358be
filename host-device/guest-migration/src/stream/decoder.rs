// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiving end of one channel: reads bytes and decodes them into records.
//!
//! The decoder verifies each record header against its checksum chain and the RAM blocks, each payload against its
//! checksum, and the final counts of the channel. The digests of the whole stream are the receiver's part.

use std::io::IoSliceMut;
use std::sync::Arc;
use std::time::Duration;

use zstd::bulk::Decompressor;

use super::format::{
    page_bytes, payload_checksum, Final, RamBlockEntry, RecordHeader, RecordKind, StreamCounts,
    StreamHeader, FLAG_NO_CHECKSUM, FLAG_ZSTD, HEADER_START, RECORD_HEADER_SIZE, RECORD_PAGES,
};
use super::format_error::Fault;
use super::transport::Transport;
use super::StreamError;
use crate::{PageRun, PAGE_SIZE};

/// Size of the read buffer, in bytes. One read can return several small records.
const BUFFER: usize = 64 << 10;
/// The maximum length of a payload, in bytes.
const PAYLOAD: usize = (RECORD_PAGES * PAGE_SIZE) as usize;

/// A source of the bytes of a channel.
pub(super) trait ByteSource {
    /// Reads at least one byte, and returns how many. Returns 0 at the end of the stream. Waits for at most `timeout`,
    /// if it is given.
    fn read(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
        timeout: Option<Duration>,
    ) -> Result<usize, StreamError>;
}

impl ByteSource for Transport {
    fn read(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
        timeout: Option<Duration>,
    ) -> Result<usize, StreamError> {
        Transport::read(self, slices, timeout)
    }
}

/// A decoded record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// A run of pages, and their content.
    Pages(PageRun, &'a [u8]),
    /// A run of zero pages.
    Zeros(PageRun),
    /// The end of the iteration with this number.
    IterationEnd(u64),
    /// The final record, and the last checksum of the channel before it.
    Final(Final, u64),
}

/// Decodes a channel. Uses a bounded amount of memory for any input.
pub(super) struct Decoder<S> {
    source: S,
    channel: u16,
    /// How long the peer may be silent inside the header or a record.
    timeout: Duration,
    buffer: Box<[u8]>,
    /// `buffer[start..end]` is read and not consumed yet.
    start: usize,
    end: usize,
    /// Bytes of the stream before `start`.
    offset: u64,
    chain: u64,
    /// The value of `chain` before the last record header.
    chain_before: u64,
    sequence: u64,
    iteration: u64,
    counts: StreamCounts,
    payload: Vec<u8>,
    unpacked: Vec<u8>,
    decompressor: Option<Decompressor<'static>>,
    blocks: Arc<[RamBlockEntry]>,
}

/// Where a payload is stored.
enum PayloadLocation {
    /// In this range of `Decoder::buffer`, until the next read.
    Buffer(std::ops::Range<usize>),
    /// In the first bytes of `Decoder::payload`: this many.
    Own(usize),
}

impl<S: ByteSource> Decoder<S> {
    /// Creates a decoder at the start of a stream.
    pub fn new(source: S, timeout: Duration) -> Self {
        Self {
            source,
            channel: 0,
            timeout,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            offset: 0,
            chain: 0,
            chain_before: 0,
            sequence: 0,
            iteration: 0,
            counts: StreamCounts::default(),
            payload: Vec::new(),
            unpacked: Vec::new(),
            decompressor: None,
            blocks: Arc::from([]),
        }
    }

    /// Returns the source.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// Returns how many bytes of the stream are consumed.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the error for a fault in the header or record that begins at `offset`.
    pub fn fault(&self, offset: u64, fault: Fault) -> StreamError {
        StreamError::Malformed {
            channel: self.channel,
            offset,
            fault,
        }
    }

    /// Reads the stream header.
    pub fn header(&mut self) -> Result<StreamHeader, StreamError> {
        let ended = Fault::TruncatedHeader;
        let timeout = Some(self.timeout);
        let mut bytes = Vec::new();
        self.take(0, HEADER_START, timeout, &mut bytes, &ended)?;
        let length = StreamHeader::length(&bytes).map_err(|fault| self.fault(0, fault))?;
        self.take(0, length - HEADER_START, timeout, &mut bytes, &ended)?;
        let (header, chain) = StreamHeader::decode(&bytes).map_err(|fault| self.fault(0, fault))?;
        self.chain = chain;
        self.channel = header.channel;
        self.blocks = header.blocks.clone().into();
        Ok(header)
    }

    /// Reads the next record. Waits for its first byte without a timeout.
    pub fn next(&mut self) -> Result<Record<'_>, StreamError> {
        let at = self.offset;
        let head = self.head()?;
        let channel = self.channel;
        let fault = |fault| StreamError::Malformed {
            channel,
            offset: at,
            fault,
        };
        let run = PageRun {
            block: usize::from(head.block),
            first: head.first,
            pages: head.pages,
        };
        match head.kind {
            RecordKind::Pages | RecordKind::Zeros => {
                let has = match self.blocks.get(run.block) {
                    Some(block) => block.pages,
                    None => return Err(fault(Fault::RamBlock(head.block))),
                };
                if head
                    .first
                    .checked_add(head.pages)
                    .is_none_or(|end| end > has)
                {
                    return Err(fault(Fault::Outside {
                        first: head.first,
                        pages: head.pages,
                        has,
                    }));
                }
            }
            RecordKind::IterationEnd | RecordKind::Final => {}
        }
        match head.kind {
            RecordKind::Pages => {
                let length = usize::try_from(head.length).unwrap_or(usize::MAX);
                let location = self.payload(length, at)?;
                self.counts.add(StreamCounts {
                    pages: head.pages,
                    zeros: 0,
                    payload: u64::from(head.length),
                });
                let payload = match &location {
                    PayloadLocation::Buffer(range) => self.buffer.get(range.clone()),
                    PayloadLocation::Own(length) => self.payload.get(..*length),
                }
                .unwrap_or_default();
                if head.flags & FLAG_NO_CHECKSUM == 0
                    && payload_checksum(payload) != head.payload_checksum
                {
                    return Err(fault(Fault::PayloadChecksum));
                }
                if head.flags & FLAG_ZSTD == 0 {
                    return Ok(Record::Pages(run, payload));
                }
                let raw = usize::try_from(page_bytes(head.pages)).unwrap_or(0);
                decompress(&mut self.decompressor, payload, &mut self.unpacked, raw).map_err(
                    |why| {
                        fault(Fault::Compressed {
                            pages: head.pages,
                            why,
                        })
                    },
                )?;
                Ok(Record::Pages(run, &self.unpacked))
            }
            RecordKind::Zeros => {
                self.counts.zeros = self.counts.zeros.saturating_add(head.pages);
                Ok(Record::Zeros(run))
            }
            RecordKind::IterationEnd => {
                let expected = self.iteration.saturating_add(1);
                if head.first != expected {
                    return Err(fault(Fault::IterationEnd(head.first, expected)));
                }
                self.iteration = expected;
                Ok(Record::IterationEnd(expected))
            }
            RecordKind::Final => self.last(head, at),
        }
    }

    /// Checks that nothing follows the final record, as far as that is known without waiting.
    pub fn expect_end(&mut self) -> Result<(), StreamError> {
        if self.start < self.end {
            return Err(self.fault(self.offset, Fault::TrailingData));
        }
        let (offset, timeout) = (self.offset, Some(Duration::ZERO));
        match self
            .source
            .read(&mut [IoSliceMut::new(&mut self.buffer)], timeout)
        {
            Ok(0) | Err(StreamError::Stalled { .. } | StreamError::Closed { .. }) => Ok(()),
            Ok(_) => Err(self.fault(offset, Fault::TrailingData)),
            Err(error) => Err(error),
        }
    }

    fn last(&mut self, head: RecordHeader, at: u64) -> Result<Record<'_>, StreamError> {
        let mut bytes = Vec::new();
        let length = usize::try_from(head.length).unwrap_or(0);
        self.take(
            at,
            length,
            Some(self.timeout),
            &mut bytes,
            &Fault::TruncatedRecord,
        )?;
        if payload_checksum(&bytes) != head.payload_checksum {
            return Err(self.fault(at, Fault::PayloadChecksum));
        }
        let last = Final::decode(&bytes).map_err(|fault| self.fault(at, fault))?;
        let (said, seen) = (last.counts, self.counts);
        for (what, said, seen) in [
            ("iterations", head.first, self.iteration),
            ("pages", said.pages, seen.pages),
            ("zero pages", said.zeros, seen.zeros),
            ("bytes of pages", said.payload, seen.payload),
        ] {
            if said != seen {
                return Err(self.fault(at, Fault::Count { what, said, seen }));
            }
        }
        Ok(Record::Final(last, self.chain_before))
    }

    fn head(&mut self) -> Result<RecordHeader, StreamError> {
        let at = self.offset;
        if self.start == self.end && self.fill(None)? == 0 {
            return Err(self.fault(at, Fault::MissingFinalRecord));
        }
        while self.end - self.start < RECORD_HEADER_SIZE {
            if self.fill(Some(self.timeout))? == 0 {
                return Err(self.fault(at, Fault::TruncatedRecord));
            }
        }
        let bytes = self.buffer.get(self.start..self.end);
        let Some(bytes) = bytes.and_then(|bytes| bytes.first_chunk::<RECORD_HEADER_SIZE>()) else {
            return Err(self.fault(at, Fault::TruncatedRecord));
        };
        self.chain_before = self.chain;
        let head = RecordHeader::decode(bytes, &mut self.chain, self.sequence)
            .map_err(|fault| self.fault(at, fault))?;
        self.sequence = self.sequence.saturating_add(1);
        self.consume(RECORD_HEADER_SIZE);
        Ok(head)
    }

    /// Reads the payload, `length` bytes, of the record that begins at `at`.
    fn payload(&mut self, length: usize, at: u64) -> Result<PayloadLocation, StreamError> {
        let have = self.end - self.start;
        if have >= length {
            let range = self.start..self.start + length;
            self.consume(length);
            return Ok(PayloadLocation::Buffer(range));
        }
        if self.payload.is_empty() {
            self.payload.resize(PAYLOAD, 0);
        }
        let mut filled = 0;
        if let (Some(to), Some(from)) = (
            self.payload.get_mut(..have),
            self.buffer.get(self.start..self.end),
        ) {
            to.copy_from_slice(from);
            filled = have;
        }
        self.consume(have);
        (self.start, self.end) = (0, 0);
        while filled < length {
            let rest = self.payload.get_mut(filled..length).unwrap_or_default();
            let missing = rest.len();
            // The second slice takes bytes after the payload that have already arrived.
            let mut slices = [IoSliceMut::new(rest), IoSliceMut::new(&mut self.buffer)];
            let count = self.source.read(&mut slices, Some(self.timeout))?;
            if count == 0 {
                return Err(self.fault(at, Fault::TruncatedRecord));
            }
            filled += count.min(missing);
            self.end = count.saturating_sub(missing);
        }
        self.offset += (length - have) as u64;
        Ok(PayloadLocation::Own(length))
    }

    /// Appends the next `length` bytes of the stream to `to`. If the stream ends too early, fails with `ended` at `at`.
    fn take(
        &mut self,
        at: u64,
        length: usize,
        timeout: Option<Duration>,
        to: &mut Vec<u8>,
        ended: &Fault,
    ) -> Result<(), StreamError> {
        let wanted = to.len().saturating_add(length);
        while to.len() < wanted {
            if self.start == self.end && self.fill(timeout)? == 0 {
                return Err(self.fault(at, ended.clone()));
            }
            let count = (wanted - to.len()).min(self.end - self.start);
            let bytes = self.buffer.get(self.start..self.start + count);
            to.extend_from_slice(bytes.unwrap_or_default());
            self.consume(count);
        }
        Ok(())
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        self.offset += count as u64;
    }

    /// Reads more bytes into the buffer, which must not be full. Returns how many, or 0 at the end of the stream.
    fn fill(&mut self, timeout: Option<Duration>) -> Result<usize, StreamError> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let free = self.buffer.get_mut(self.end..).unwrap_or_default();
        let count = self.source.read(&mut [IoSliceMut::new(free)], timeout)?;
        self.end += count;
        Ok(count)
    }
}

/// Decompresses `packed` into exactly `raw` bytes. Fails on any other length, without using more memory.
fn decompress(
    decompressor: &mut Option<Decompressor<'static>>,
    packed: &[u8],
    unpacked: &mut Vec<u8>,
    raw: usize,
) -> Result<(), String> {
    if decompressor.is_none() {
        *decompressor = Some(Decompressor::new().map_err(|error| error.to_string())?);
    }
    unpacked.resize(raw, 0);
    let count = match decompressor {
        Some(it) => it.decompress_to_buffer(packed, unpacked.as_mut_slice()),
        None => return Err("the decompressor is missing".into()),
    };
    match count {
        Ok(count) if count == raw => Ok(()),
        Ok(count) => Err(format!("they have {count} bytes")),
        Err(error) => Err(error.to_string()),
    }
}
