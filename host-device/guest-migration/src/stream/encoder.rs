// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One channel of a stream on its way out.

use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use zstd::bulk::Compressor;

use super::format::{
    page_bytes, payload_checksum, Final, RecordHeader, RecordKind, StreamCounts, Totals,
    FLAG_NO_CHECKSUM, FLAG_ZSTD, RECORD_HEADER_SIZE,
};
use super::transport::Transport;
use super::{Compression, StreamError};
use crate::{Memory, PageRun, PAGE_SIZE};

/// Small things are gathered up to this many bytes before they are written.
const GATHER: usize = 256 << 10;
/// A payload at least this long is written from where it lies.
const LARGE: usize = 32 << 10;
/// Pages that are not copied at least come in runs of this many: fewer are quicker copied.
const UNCOPIED_PAGES: u64 = 16;

/// Makes records and writes them. A run given to it fits into one record.
pub(super) struct Encoder {
    transport: Transport,
    chain: u64,
    sequence: u64,
    iteration: u64,
    counts: StreamCounts,
    gathered: Vec<u8>,
    compressor: Option<Compressor<'static>>,
    /// Pages that were read, compressed pages.
    pages: Vec<u8>,
    packed: Vec<u8>,
    /// Bytes on the wire, of all channels.
    total: Arc<AtomicU64>,
}

impl Encoder {
    /// Goes on after a header whose check value is `chain`, and which is on the wire already.
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
                    doing: "cannot compress with zstd",
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

    /// What was sent so far.
    pub fn counts(&self) -> StreamCounts {
        self.counts
    }

    /// The check value of the last record.
    pub fn chain(&self) -> u64 {
        self.chain
    }

    /// The transport, when nothing more is to be sent.
    pub fn into_transport(self) -> Transport {
        self.transport
    }

    /// Pages whose bytes are here.
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

    /// Pages that are in a file: as they lie there, without a copy if there are enough of them.
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

    /// Pages of zeros.
    pub fn zeros(&mut self, run: PageRun) -> Result<(), StreamError> {
        let head = self.head(RecordKind::Zeros, 0, run, 0, 0)?;
        self.counts.zeros = self.counts.zeros.saturating_add(run.pages);
        self.gather(&head)
    }

    /// The end of a round. All that was given is on the wire then.
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

    /// The end of the stream.
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

    /// Puts what was gathered on the wire.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        self.write_with(&[])
    }

    /// The packed pages, if they are smaller.
    fn compress<'a>(&mut self, bytes: &[u8], packed: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let compressor = self.compressor.as_mut()?;
        packed.resize(bytes.len().saturating_sub(1), 0);
        // It fails only for want of room.
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

    /// Adds to what is written together.
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

/// The bytes of a run that fits into a record.
fn length(run: PageRun) -> usize {
    usize::try_from(run.pages.saturating_mul(PAGE_SIZE)).unwrap_or(0)
}

/// That the caller's run is none.
pub(super) fn invalid_run(run: PageRun, bytes: usize) -> StreamError {
    StreamError::InvalidRun {
        block: run.block,
        first: run.first,
        pages: run.pages,
        bytes,
    }
}
