// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where pages go to.

use crate::digest::ContentDigest;
use crate::{Memory, PageRun};

/// Why pages do not get there.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// The way to the destination: a stream.
///
/// Pages of a later round replace those of an earlier one; within a round each page is sent once.
pub trait Sink: Send {
    /// The pages `run` are zero.
    ///
    /// # Errors
    ///
    /// If the destination cannot be told.
    fn zeros(&mut self, run: PageRun) -> Result<(), SinkError>;

    /// The pages `run` hold these `bytes`.
    ///
    /// # Errors
    ///
    /// If the destination cannot be told.
    fn pages(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), SinkError>;

    /// The pages `run` hold what they hold in `memory` at some moment before this returns, or later.
    ///
    /// # Errors
    ///
    /// If the destination cannot be told.
    fn pages_from(&mut self, run: PageRun, memory: &Memory) -> Result<(), SinkError>;

    /// The round is over.
    ///
    /// # Errors
    ///
    /// If the destination cannot be told.
    fn end_iteration(&mut self) -> Result<(), SinkError>;

    /// All of memory is sent, with this `digest` if it is known. Returns once the destination has said that it has all, if it
    /// can say something.
    ///
    /// # Errors
    ///
    /// If it has not.
    fn finish(&mut self, digest: Option<ContentDigest>) -> Result<(), SinkError>;

    /// Bytes over the wire so far.
    fn bytes(&self) -> u64;
}
