// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hint rounds of a migration: who has the hint window.

use std::time::Duration;

use tracing::info;

use super::PrecopyError;
use crate::{CancelToken, HintSource, HintWindow, WaitOutcome};

/// The source of hints, and the hint window while the source does not have it.
#[derive(Default)]
pub(super) struct Hints {
    pub(super) source: Option<Box<dyn HintSource>>,
    window: WindowState,
}

#[derive(Default)]
enum WindowState {
    /// No window exists: a dirty sync runs.
    #[default]
    Closed,
    /// The source has the window.
    AtSource,
    /// The engine has the window: this iteration has no hints.
    Local(HintWindow),
}

impl Hints {
    pub(super) fn new(source: Option<Box<dyn HintSource>>) -> Self {
        Self {
            source,
            window: WindowState::Closed,
        }
    }

    pub(super) fn open(&mut self, window: HintWindow) {
        let Some(source) = &mut self.source else {
            self.window = WindowState::Local(window);
            return;
        };
        self.window = match source.open(window) {
            Ok(()) => WindowState::AtSource,
            Err((window, why)) => {
                info!("iteration runs without hints: {why}");
                WindowState::Local(window)
            }
        };
    }

    pub(super) fn wait(&mut self, timeout: Duration, cancel: &CancelToken) -> WaitOutcome {
        match (&mut self.source, &self.window) {
            (Some(source), WindowState::AtSource) if !timeout.is_zero() => {
                source.wait(timeout, cancel)
            }
            _ => WaitOutcome::Finished,
        }
    }

    pub(super) fn close(&mut self) -> Result<HintWindow, PrecopyError> {
        match (std::mem::take(&mut self.window), &mut self.source) {
            (WindowState::Local(window), _) => Ok(window),
            (WindowState::AtSource, Some(source)) => source
                .close()
                .map_err(|error| PrecopyError::Hints(error.to_string())),
            _ => Err(PrecopyError::Hints("no hint round is open".into())),
        }
    }

    pub(super) fn done(&mut self) {
        if let Some(source) = &mut self.source {
            source.done();
        }
        self.window = WindowState::Closed;
    }
}

impl Drop for Hints {
    fn drop(&mut self) {
        self.done();
    }
}
