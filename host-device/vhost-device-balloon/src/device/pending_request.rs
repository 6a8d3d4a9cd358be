// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A request whose work takes several turns of its queue.

use std::collections::VecDeque;
use std::ops::Range;

use super::request::RequestError;

/// What is done with the ranges of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Work {
    /// Inflation: the memory is released.
    Inflate,
    /// Deflation: the pages no longer count as parts of huge pages in the balloon.
    Deflate,
    /// A free page report: the memory is released.
    Report,
    /// A block of free pages: its pages are hinted.
    Hint,
}

/// A range of guest physical addresses, and how far it has been processed.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// Start of the range.
    pub(super) start: u64,
    /// What is left of the range.
    pub(super) rest: Range<u64>,
    /// Bytes that were found outside guest memory.
    pub(super) outside: u64,
}

/// A request that the driver has sent and the device has not returned.
#[derive(Debug)]
pub(super) struct PendingRequest {
    /// The buffer to return.
    pub(super) head: u16,
    pub(super) work: Work,
    pub(super) pieces: VecDeque<Piece>,
    /// The first error. The other pieces are processed nevertheless.
    pub(super) error: Option<RequestError>,
}

impl PendingRequest {
    pub(super) fn new(head: u16, work: Work, ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let piece = |range: Range<u64>| Piece {
            start: range.start,
            rest: range,
            outside: 0,
        };
        Self {
            head,
            work,
            pieces: ranges.into_iter().map(piece).collect(),
            error: None,
        }
    }

    /// Keeps `error` if it is the first one.
    pub(super) fn fail(&mut self, error: impl Into<RequestError>) {
        self.error.get_or_insert_with(|| error.into());
    }
}
