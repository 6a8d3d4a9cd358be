// SPDX-License-Identifier: GPL-2.0

//! Where the balloon's pages are, and what is to be done to reach a target.
//!
//! All counts are in balloon pages, 4 KiB each.

use kernel::prelude::*;

/// Where the balloon's pages are.
///
/// A page counts in one place at a time: on its way in until the device has acknowledged it, then
/// inside, and on its way out from the moment it is taken from the balloon until the device has
/// acknowledged that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageCounts {
    inflated: u64,
    inflating: u64,
    deflating: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Put up to this many more pages in.
    Inflate(u64),
    /// Take up to this many pages out.
    Deflate(u64),
    /// Wait for the device: what is on its way decides.
    Wait,
    /// The target is reached, and nothing is on its way.
    Reached,
}

impl PageCounts {
    /// How many pages are in the balloon, and acknowledged.
    pub(crate) fn inflated(self) -> u64 {
        self.inflated
    }

    /// How many pages the balloon has as far as the device has acknowledged it: those inside, and
    /// those on their way out.
    pub(crate) fn actual(self) -> u64 {
        self.inflated + self.deflating
    }

    /// How many pages were taken out that the device has not given back yet.
    pub(crate) fn deflating(self) -> u64 {
        self.deflating
    }

    /// Whether no page is in the balloon or on its way into or out of it.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// What to do next to get to `target`.
    ///
    /// Pages on their way in cannot be called back: if there are too many, they are waited for.
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

    /// `pages` were offered to the device.
    pub(crate) fn send_inflate(&mut self, pages: u64) {
        self.inflating += pages;
    }

    /// The device took `pages` that were offered.
    pub(crate) fn complete_inflate(&mut self, pages: u64) {
        let pages = pages.min(self.inflating);
        self.inflating -= pages;
        self.inflated += pages;
    }

    /// `pages` were taken out, to be given back by the device.
    pub(crate) fn send_deflate(&mut self, pages: u64) {
        let pages = pages.min(self.inflated);
        self.inflated -= pages;
        self.deflating += pages;
    }

    /// The device gave `pages` back.
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
        // Pages on their way out do not count: others are taken.
        assert_eq!(page_counts.next(8), Step::Inflate(8));
        assert_eq!(page_counts.next(0), Step::Wait);
    }
}
