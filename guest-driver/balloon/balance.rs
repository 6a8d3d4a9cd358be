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
pub(crate) struct Balance {
    inside: u64,
    going_in: u64,
    coming_out: u64,
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
    Rest,
}

impl Balance {
    /// How many pages are in the balloon, and acknowledged.
    pub(crate) fn inside(self) -> u64 {
        self.inside
    }

    /// How many pages the balloon has as far as the device has acknowledged it: those inside, and
    /// those on their way out.
    pub(crate) fn actual(self) -> u64 {
        self.inside + self.coming_out
    }

    /// How many pages were taken out that the device has not given back yet.
    pub(crate) fn coming_out(self) -> u64 {
        self.coming_out
    }

    /// Whether no page is in the balloon or on its way into or out of it.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// What to do next to get to `target`.
    ///
    /// Pages on their way in cannot be called back: if there are too many, they are waited for.
    pub(crate) fn next(self, target: u64) -> Step {
        let expected = self.inside + self.going_in;
        if expected < target {
            Step::Inflate(target - expected)
        } else if expected > target && self.inside > 0 {
            Step::Deflate((expected - target).min(self.inside))
        } else if self.going_in > 0 || self.coming_out > 0 {
            Step::Wait
        } else {
            Step::Rest
        }
    }

    /// `pages` were offered to the device.
    pub(crate) fn send_in(&mut self, pages: u64) {
        self.going_in += pages;
    }

    /// The device took `pages` that were offered.
    pub(crate) fn arrived(&mut self, pages: u64) {
        let pages = pages.min(self.going_in);
        self.going_in -= pages;
        self.inside += pages;
    }

    /// `pages` were taken out, to be given back by the device.
    pub(crate) fn send_out(&mut self, pages: u64) {
        let pages = pages.min(self.inside);
        self.inside -= pages;
        self.coming_out += pages;
    }

    /// The device gave `pages` back.
    pub(crate) fn left(&mut self, pages: u64) {
        self.coming_out = self.coming_out.saturating_sub(pages);
    }
}

#[kunit_tests(virtio_balloon_rs_balance)]
mod tests {
    use super::*;

    #[test]
    fn it_inflates_up_to_the_target_and_no_further() {
        let mut balance = Balance::default();
        assert_eq!(balance.next(0), Step::Rest);
        assert_eq!(balance.next(300), Step::Inflate(300));
        balance.send_in(256);
        assert_eq!(balance.next(300), Step::Inflate(44));
        balance.send_in(44);
        assert_eq!(balance.next(300), Step::Wait);
        assert_eq!(balance.inside(), 0);
        balance.arrived(256);
        balance.arrived(44);
        assert_eq!(balance.next(300), Step::Rest);
        assert_eq!(balance.inside(), 300);
    }

    #[test]
    fn it_deflates_what_has_arrived() {
        let mut balance = Balance::default();
        balance.send_in(20);
        assert_eq!(balance.next(5), Step::Wait);
        balance.arrived(10);
        assert_eq!(balance.next(5), Step::Deflate(10));
        assert_eq!(balance.next(15), Step::Deflate(5));
        balance.send_out(10);
        assert_eq!(balance.next(5), Step::Wait);
        balance.arrived(10);
        assert_eq!(balance.next(5), Step::Deflate(5));
        balance.send_out(10);
        assert!(!balance.is_empty());
        assert_eq!((balance.inside(), balance.actual()), (0, 20));
        balance.left(20);
        assert_eq!(balance.actual(), 0);
        assert!(balance.is_empty());
    }

    #[test]
    fn a_new_target_turns_it_round() {
        let mut balance = Balance::default();
        balance.send_in(8);
        balance.arrived(8);
        balance.send_out(8);
        // Pages on their way out do not count: others are taken.
        assert_eq!(balance.next(8), Step::Inflate(8));
        assert_eq!(balance.next(0), Step::Wait);
    }
}
