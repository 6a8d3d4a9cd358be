// SPDX-License-Identifier: GPL-2.0

//! Counts of the pages in the balloon and in flight, and the next step towards a target.
//!
//! All counts are in balloon pages of 4 KiB.

use kernel::prelude::*;

/// The counts of the pages in the balloon and in flight.
///
/// Each page counts once: as inflating until the device has used the inflate request, then as
/// inflated, and as deflating from the time when the deflate request is sent until the device has
/// used it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageCounts {
    inflated: u64,
    inflating: u64,
    deflating: u64,
}

/// The next step towards a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Inflate by up to this many pages.
    Inflate(u64),
    /// Deflate by up to this many pages.
    Deflate(u64),
    /// Wait for requests in flight.
    Wait,
    /// The target is reached, and nothing is in flight.
    Reached,
}

impl PageCounts {
    /// Returns the number of pages in the balloon that the device has acknowledged.
    pub(crate) fn inflated(self) -> u64 {
        self.inflated
    }

    /// Returns the size of the balloon as the device knows it: inflated and deflating pages.
    pub(crate) fn actual(self) -> u64 {
        self.inflated + self.deflating
    }

    /// Returns the number of pages whose deflate requests are in flight.
    pub(crate) fn deflating(self) -> u64 {
        self.deflating
    }

    /// Returns whether no page is in the balloon or in flight.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Returns the next step towards `target`.
    ///
    /// Pages in flight on the inflate queue cannot be recalled. If there are too many, the step is
    /// to wait for them.
    pub(crate) fn next(self, target: u64) -> Step {
        let expected = self.inflated + self.inflating;
        if expected < target {
            Step::Inflate(target - expected)
        } else if expected > target && self.inflated > 0 {
            Step::Deflate((expected - target).min(self.inflated))
        } else if self.inflating > 0 || self.deflating > 0 {
            Step::Wait
        } else {
            Step::Reached
        }
    }

    /// Counts `pages` as sent on the inflate queue.
    pub(crate) fn send_inflate(&mut self, pages: u64) {
        self.inflating += pages;
    }

    /// Counts `pages` as inflated: the device has used their request.
    pub(crate) fn complete_inflate(&mut self, pages: u64) {
        let pages = pages.min(self.inflating);
        self.inflating -= pages;
        self.inflated += pages;
    }

    /// Counts `pages` as sent on the deflate queue.
    pub(crate) fn send_deflate(&mut self, pages: u64) {
        let pages = pages.min(self.inflated);
        self.inflated -= pages;
        self.deflating += pages;
    }

    /// Counts `pages` as deflated: the device has used their request.
    pub(crate) fn complete_deflate(&mut self, pages: u64) {
        self.deflating = self.deflating.saturating_sub(pages);
    }
}

#[kunit_tests(virtio_balloon_rs_page_counts)]
mod tests {
    use super::*;

    #[test]
    fn it_inflates_up_to_the_target_and_no_further() {
        let mut page_counts = PageCounts::default();
        assert_eq!(page_counts.next(0), Step::Reached);
        assert_eq!(page_counts.next(300), Step::Inflate(300));
        page_counts.send_inflate(256);
        assert_eq!(page_counts.next(300), Step::Inflate(44));
        page_counts.send_inflate(44);
        assert_eq!(page_counts.next(300), Step::Wait);
        assert_eq!(page_counts.inflated(), 0);
        page_counts.complete_inflate(256);
        page_counts.complete_inflate(44);
        assert_eq!(page_counts.next(300), Step::Reached);
        assert_eq!(page_counts.inflated(), 300);
    }

    #[test]
    fn it_deflates_what_has_arrived() {
        let mut page_counts = PageCounts::default();
        page_counts.send_inflate(20);
        assert_eq!(page_counts.next(5), Step::Wait);
        page_counts.complete_inflate(10);
        assert_eq!(page_counts.next(5), Step::Deflate(10));
        assert_eq!(page_counts.next(15), Step::Deflate(5));
        page_counts.send_deflate(10);
        assert_eq!(page_counts.next(5), Step::Wait);
        page_counts.complete_inflate(10);
        assert_eq!(page_counts.next(5), Step::Deflate(5));
        page_counts.send_deflate(10);
        assert!(!page_counts.is_empty());
        assert_eq!((page_counts.inflated(), page_counts.actual()), (0, 20));
        page_counts.complete_deflate(20);
        assert_eq!(page_counts.actual(), 0);
        assert!(page_counts.is_empty());
    }

    #[test]
    fn a_new_target_turns_it_round() {
        let mut page_counts = PageCounts::default();
        page_counts.send_inflate(8);
        page_counts.complete_inflate(8);
        page_counts.send_deflate(8);
        // Deflating pages do not count; other pages are inflated.
        assert_eq!(page_counts.next(8), Step::Inflate(8));
        assert_eq!(page_counts.next(0), Step::Wait);
    }
}
