// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interface through which a migration asks the guest for hints.

use std::time::Duration;

use thiserror::Error;

use crate::{CancelToken, HintWindow};

/// Why a source cannot give hints.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{0}")]
pub struct HintSourceError(pub String);

/// How waiting for hints ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum WaitOutcome {
    /// The guest has given all hints of the hint round.
    Finished,
    /// The timeout expired first.
    TimedOut,
    /// The migration was cancelled.
    Cancelled,
    /// The source can give no further hints, for this reason. Hints that arrived before remain valid.
    Lost(String),
}

/// A source of hints, which asks the guest for pages that hold nothing worth sending.
///
/// Between [`open`](Self::open) and [`close`](Self::close) the source owns the [`HintWindow`], and with it the right to
/// apply hints. It may apply them in another thread while the migration sends pages.
pub trait HintSource: Send {
    /// Returns whether each hinted page reads as zeros before the guest may use it again (R17).
    ///
    /// This requires a driver that has promised to keep a hinted block until the device marks its buffer used.
    fn discards(&self) -> bool;

    /// Starts a hint round: takes the window, and asks the guest for hints that are valid from now on.
    ///
    /// # Errors
    ///
    /// If the guest cannot be asked. The error returns the window.
    fn open(&mut self, window: HintWindow) -> Result<(), (HintWindow, HintSourceError)>;

    /// Waits until the guest has given all hints of the hint round, for at most `timeout` (R14). Hints are also applied
    /// before and after the wait.
    fn wait(&mut self, timeout: Duration, cancel: &CancelToken) -> WaitOutcome;

    /// Ends the hint round and returns the window. Hints that arrive later are ignored (R6). Tells the guest to stop
    /// hinting.
    ///
    /// # Errors
    ///
    /// If no window is open, or the guest memory that it covers has changed its regions during the migration.
    fn close(&mut self) -> Result<HintWindow, HintSourceError>;

    /// Tells the guest that it may reuse all hinted pages (R16), and closes an open window. May be called at any time
    /// and more than once.
    fn done(&mut self);
}
