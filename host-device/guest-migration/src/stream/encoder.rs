// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sending end of one channel: encodes records and writes them to a transport.
//!
//! Small records are batched. Large payloads are written directly from the buffer of the caller, and long runs of a
//! memory file are sent without a copy.

use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use zstd::bulk::Compressor;

use super::error::invalid_run;
use super::format::{
    page_bytes, payload_checksum, Final, RecordHeader, RecordKind, StreamCounts, Totals,
    FLAG_NO_CHECKSUM, FLAG_ZSTD, RECORD_HEADER_SIZE,
};
use super::transport::Transport;
use super::{Compression, StreamError};
use crate::{Memory, PageRun, PAGE_SIZE};

/// Small records are batched up to this many bytes before they are written.
const GATHER: usize = 256 << 10;
/// A payload of at least this many bytes is written directly, without a copy into the batch.
const LARGE: usize = 32 << 10;
/// A run of at least this many pages is sent from a memory file without a copy. For shorter runs a copy is faster.
const UNCOPIED_PAGES: u64 = 16;

/// Encodes the records of one channel and writes them. Each run that it gets must fit into one record.
pub(super) struct Encoder {
    transport: Transport,
    chain: u64,
    sequence: u64,
    iteration: u64,
    counts: StreamCounts,
    gathered: Vec<u8>,
    compressor: Option<Compressor<'static>>,
    /// Buffer for pages that are read from a memory file.
    pages: Vec<u8>,
    /// Buffer for compressed pages.
    packed: Vec<u8>,
    /// Bytes on the wire, summed over all channels.
    total: Arc<AtomicU64>,
}

impl Encoder {
    /// Creates an encoder for the records after a stream header that is already written and has the checksum `chain`.
    pub fn new(
        transport: Transport,
        chain: u64,
        compression: Compression,
        total: &Arc<AtomicU64>,
    ) -> Result<Self, StreamError> {
        let compressor = match compression {
            Compression::None => None,
            Compression::Zstd(level) => {
                let compressor = Compressor::new(level);
                Some(compressor.map_err(|source| StreamError::System {
                    doing: "cannot initialize zstd",
                    source: Arc::new(source),
                })?)
            }
        };
        Ok(Self {
            transport,
            chain,
            sequence: 0,
            iteration: 0,
            counts: StreamCounts::default(),
            gathered: Vec::with_capacity(GATHER),
            compressor,
            pages: Vec::new(),
            packed: Vec::new(),
            total: Arc::clone(total),
        })
    }

    /// Returns the counts of the pages and bytes sent so far.
    pub fn counts(&self) -> StreamCounts {
        self.counts
    }

    /// Returns the checksum of the last record header, or of the stream header before the first record.
    pub fn chain(&self) -> u64 {
        self.chain
    }

    /// Returns the transport. The batch must be empty.
    pub fn into_transport(self) -> Transport {
        self.transport
    }

    /// Sends a run of pages with the content `bytes`.
    pub fn pages(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), StreamError> {
        let mut packed = std::mem::take(&mut self.packed);
        let payload = self.compress(bytes, &mut packed);
        let (flags, payload) = match payload {
            Some(packed) => (FLAG_ZSTD, packed),
            None => (0, bytes),
        };
        let done = self.checksummed_pages(run, flags, payload);
        self.packed = packed;
        done
    }

    /// Sends a run of pages from a memory file. Without compression, a long run is sent without a copy.
    pub fn pages_from(&mut self, run: PageRun, memory: &Memory) -> Result<(), StreamError> {
        let failed = |error: std::io::Error| StreamError::Memory {
            block: run.block,
            first: run.first,
            pages: run.pages,
            source: Arc::new(error),
        };
        let file = memory.file(run.block).ok_or_else(|| invalid_run(run, 0))?;
        if self.compressor.is_some() || run.pages < UNCOPIED_PAGES {
            let mut bytes = std::mem::take(&mut self.pages);
            bytes.resize(length(run), 0);
            let done = memory
                .read(run, &mut bytes)
                .map_err(failed)
                .and_then(|()| self.pages(run, &bytes));
            self.pages = bytes;
            return done;
        }
        let bytes = page_bytes(run.pages);
        let head = self.head(RecordKind::Pages, FLAG_NO_CHECKSUM, run, bytes, 0)?;
        self.gathered.extend(head);
        self.count_pages(run.pages, bytes);
        self.flush()?;
        let before = self.transport.offset();
        let done = self
            .transport
            .write_file(file, page_bytes(run.first), bytes);
        self.note(before);
        done?.map_err(failed)
    }

    /// Sends a run of zero pages.
    pub fn zeros(&mut self, run: PageRun) -> Result<(), StreamError> {
        let head = self.head(RecordKind::Zeros, 0, run, 0, 0)?;
        self.counts.zeros = self.counts.zeros.saturating_add(run.pages);
        self.gather(&head)
    }

    /// Sends the end of an iteration, and writes the batch.
    pub fn end_iteration(&mut self) -> Result<(), StreamError> {
        self.iteration += 1;
        let iteration = PageRun {
            block: 0,
            first: self.iteration,
            pages: 0,
        };
        let head = self.head(RecordKind::IterationEnd, 0, iteration, 0, 0)?;
        self.gather(&head)?;
        self.flush()
    }

    /// Sends the final record, and writes the batch.
    pub fn finish(&mut self, totals: Totals) -> Result<(), StreamError> {
        let payload = Final {
            counts: self.counts,
            totals,
        }
        .encode();
        let iterations = PageRun {
            block: 0,
            first: self.iteration,
            pages: 0,
        };
        let check = payload_checksum(&payload);
        let head = self.head(
            RecordKind::Final,
            0,
            iterations,
            payload.len() as u64,
            check,
        )?;
        self.gather(&head)?;
        self.gather(&payload)?;
        self.flush()
    }

    /// Writes the batch.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        self.write_with(&[])
    }

    /// Compresses `bytes`. Returns `None` without a compressor, or if the result is not smaller.
    fn compress<'a>(&mut self, bytes: &[u8], packed: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let compressor = self.compressor.as_mut()?;
        packed.resize(bytes.len().saturating_sub(1), 0);
        // It fails only if the result does not fit into the buffer, which is one byte smaller than `bytes`.
        let length = compressor
            .compress_to_buffer(bytes, packed.as_mut_slice())
            .ok()?;
        packed.get(..length).filter(|packed| !packed.is_empty())
    }

    fn checksummed_pages(
        &mut self,
        run: PageRun,
        flags: u8,
        payload: &[u8],
    ) -> Result<(), StreamError> {
        let bytes = payload.len() as u64;
        let head = self.head(
            RecordKind::Pages,
            flags,
            run,
            bytes,
            payload_checksum(payload),
        )?;
        self.count_pages(run.pages, bytes);
        if payload.len() < LARGE {
            self.gather(&head)?;
            self.gather(payload)
        } else {
            self.gathered.extend(head);
            self.write_with(payload)
        }
    }

    fn count_pages(&mut self, pages: u64, payload: u64) {
        self.counts.add(StreamCounts {
            pages,
            zeros: 0,
            payload,
        });
    }

    fn head(
        &mut self,
        kind: RecordKind,
        flags: u8,
        run: PageRun,
        length: u64,
        payload_checksum: u64,
    ) -> Result<[u8; RECORD_HEADER_SIZE], StreamError> {
        let (Ok(block), Ok(length)) = (u16::try_from(run.block), u32::try_from(length)) else {
            return Err(invalid_run(run, 0));
        };
        let head = RecordHeader {
            kind,
            flags,
            block,
            length,
            sequence: self.sequence,
            first: run.first,
            pages: run.pages,
            payload_checksum,
        };
        self.sequence += 1;
        Ok(head.encode(&mut self.chain))
    }

    /// Adds `bytes` to the batch. Writes the batch first if it would exceed [`GATHER`].
    fn gather(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        if self.gathered.len() + bytes.len() > GATHER {
            self.flush()?;
        }
        self.gathered.extend(bytes);
        Ok(())
    }

    fn write_with(&mut self, payload: &[u8]) -> Result<(), StreamError> {
        let before = self.transport.offset();
        let mut slices = [IoSlice::new(&self.gathered), IoSlice::new(payload)];
        let done = self.transport.write(&mut slices);
        self.gathered.clear();
        self.note(before);
        done
    }

    fn note(&self, before: u64) {
        let count = self.transport.offset().saturating_sub(before);
        self.total.fetch_add(count, Ordering::Relaxed);
    }
}

/// Returns the length of a run that fits into one record, in bytes.
fn length(run: PageRun) -> usize {
    usize::try_from(run.pages.saturating_mul(PAGE_SIZE)).unwrap_or(0)
}
