// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interface through which pages are sent.

use crate::digest::ContentDigest;
use crate::{Memory, PageRun};

/// Why pages cannot be sent.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Sends pages to the destination: a stream.
///
/// Pages of a later iteration replace those of an earlier one. Within an iteration each page is sent once.
pub trait Sink: Send {
    /// Sends the pages `run` as zeros.
    ///
    /// # Errors
    ///
    /// If the pages cannot be sent.
    fn zeros(&mut self, run: PageRun) -> Result<(), SinkError>;

    /// Sends the pages `run` with the content `bytes`.
    ///
    /// # Errors
    ///
    /// If the pages cannot be sent.
    fn pages(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), SinkError>;

    /// Sends the pages `run` from `memory`. Their content is read during this call or later, so a concurrent write may
    /// be sent or not.
    ///
    /// # Errors
    ///
    /// If the pages cannot be sent.
    fn pages_from(&mut self, run: PageRun, memory: &Memory) -> Result<(), SinkError>;

    /// Ends the iteration.
    ///
    /// # Errors
    ///
    /// If the end of the iteration cannot be sent.
    fn end_iteration(&mut self) -> Result<(), SinkError>;

    /// Ends the stream, with the `digest` of all memory if it is known. Returns once the destination has confirmed that
    /// it has all of memory, if the transport carries an answer.
    ///
    /// # Errors
    ///
    /// If the stream cannot be ended, or the destination does not confirm.
    fn finish(&mut self, digest: Option<ContentDigest>) -> Result<(), SinkError>;

    /// Returns the number of bytes sent over the wire so far.
    fn bytes(&self) -> u64;
}
