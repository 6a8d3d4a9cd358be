// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Joins consecutive pages to runs.

use crate::PageRun;

/// Joins consecutive pages to runs.
pub(super) struct RunBuilder<'a, F: FnMut(PageRun)> {
    block: usize,
    run: Option<PageRun>,
    emit: &'a mut F,
}

impl<'a, F: FnMut(PageRun)> RunBuilder<'a, F> {
    pub(super) fn new(block: usize, emit: &'a mut F) -> Self {
        Self {
            block,
            run: None,
            emit,
        }
    }

    pub(super) fn add(&mut self, page: u64) {
        match &mut self.run {
            Some(run) if run.end() == page => run.pages += 1,
            other => {
                let next = PageRun {
                    block: self.block,
                    first: page,
                    pages: 1,
                };
                if let Some(run) = other.replace(next) {
                    (self.emit)(run);
                }
            }
        }
    }

    pub(super) fn end(self) {
        if let Some(run) = self.run {
            (self.emit)(run);
        }
    }
}
