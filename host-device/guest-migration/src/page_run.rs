// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A run of consecutive pages.

use crate::PAGE_SIZE;

/// A run of consecutive pages of one RAM block.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageRun {
    /// Index of the RAM block.
    pub block: usize,
    /// The first page, counted from the start of the RAM block.
    pub first: u64,
    /// Number of pages, at least one.
    pub pages: u64,
}

impl PageRun {
    /// Returns the offset of the first page in the RAM block, in bytes.
    pub const fn offset(&self) -> u64 {
        self.first.saturating_mul(PAGE_SIZE)
    }

    /// Returns the number of bytes.
    pub const fn length(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// Returns the page after the last page.
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// Splits the run into runs of at most `pages` pages. A `pages` of 0 counts as 1.
    pub fn chunks(self, pages: u64) -> impl Iterator<Item = Self> {
        let most = pages.max(1);
        let end = self.end();
        std::iter::successors(Some(self.first), move |at| at.checked_add(most))
            .take_while(move |at| *at < end)
            .map(move |first| Self {
                block: self.block,
                first,
                pages: most.min(end - first),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_run_again() {
        let run = PageRun {
            block: 1,
            first: 5,
            pages: 10,
        };
        let chunks: Vec<_> = run.chunks(4).map(|it| (it.first, it.pages)).collect();
        assert_eq!(chunks, [(5, 4), (9, 4), (13, 2)]);
        assert_eq!(run.chunks(u64::MAX).collect::<Vec<_>>(), [run]);
        assert_eq!(run.chunks(0).count(), 10);
    }
}
