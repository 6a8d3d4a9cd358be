// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who asks the guest for its free pages.

use std::time::Duration;

use thiserror::Error;

use crate::{CancelToken, HintWindow};

/// Why there are no hints.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{0}")]
pub struct HintSourceError(pub String);

/// How waiting for hints ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum WaitOutcome {
    /// The guest has said all that it knows.
    Finished,
    /// The time was over first.
    TimedOut,
    /// The migration is given up.
    Cancelled,
    /// Nobody is there any more who could give hints, for this reason. Those that came still count.
    Lost(String),
}

/// A source of hints: something that can ask the guest which of its pages hold nothing worth sending.
///
/// Between [`open`](Self::open) and [`close`](Self::close) it owns the right to give them. Both sides may be in different
/// threads; hints are given while the migration sends.
pub trait HintSource: Send {
    /// Whether each page that was hinted reads as zeros before the guest may use it again (R17).
    ///
    /// That can only be had with a driver that has promised to keep a block until it was returned.
    fn discards(&self) -> bool;

    /// Asks the guest for hints about the time from now on, and takes the window to apply them to.
    ///
    /// # Errors
    ///
    /// If the guest cannot be asked. The window comes back.
    fn open(&mut self, window: HintWindow) -> Result<(), (HintWindow, HintSourceError)>;

    /// Waits until the guest has said all, but no longer than `timeout` (R14). Hints are taken before and after, too.
    fn wait(&mut self, timeout: Duration, cancel: &CancelToken) -> WaitOutcome;

    /// Ends the window and gives it back: no hint counts from now on (R6). The guest is told that none are wanted at the
    /// moment.
    ///
    /// # Errors
    ///
    /// If there is no window, or the memory that it is about is the guest's no more.
    fn close(&mut self) -> Result<HintWindow, HintSourceError>;

    /// Tells the guest that hinted pages are of no more use, so that it takes them back (R16). A window that is open is
    /// closed. May be called at any time, and again.
    fn done(&mut self);
}
