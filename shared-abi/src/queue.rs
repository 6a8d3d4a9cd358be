// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The virtqueues and their indices.
//!
//! Queues whose feature is not negotiated have no index: Linux numbers only the queues that exist.
//! For example, the free page queue has index 2 without [`STATS_VQ`](Features::STATS_VQ).
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Virtqueues".

use super::features::Features;

/// A virtqueue of the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Queue {
    /// The inflate queue: page numbers that enter the balloon. Always exists.
    Inflate,
    /// The deflate queue: page numbers that leave the balloon. Always exists.
    Deflate,
    /// The statistics queue: memory statistics of the guest.
    Stats,
    /// The free page queue, for free page hinting: command ids and free blocks.
    FreePage,
    /// The reporting queue, for free page reporting: blocks of free pages.
    Reporting,
}

impl Queue {
    /// All queues, in the order of their indices.
    pub const ALL: [Self; 5] = [
        Self::Inflate,
        Self::Deflate,
        Self::Stats,
        Self::FreePage,
        Self::Reporting,
    ];

    /// The maximum number of queues.
    pub const MAX_COUNT: usize = Self::ALL.len();

    /// Returns the feature that adds this queue, or the empty set if the queue always exists.
    pub const fn feature(self) -> Features {
        match self {
            Self::Inflate | Self::Deflate => Features::NONE,
            Self::Stats => Features::STATS_VQ,
            Self::FreePage => Features::FREE_PAGE_HINT,
            Self::Reporting => Features::REPORTING,
        }
    }

    /// Returns the name of the queue in messages and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inflate => "inflate",
            Self::Deflate => "deflate",
            Self::Stats => "stats",
            Self::FreePage => "free-page",
            Self::Reporting => "reporting",
        }
    }

    /// Returns whether the queue exists with `features` negotiated.
    pub const fn exists(self, features: Features) -> bool {
        features.contains(self.feature())
    }

    /// Returns the index of the queue with `features` negotiated, or `None` if the queue does not
    /// exist.
    pub fn index(self, features: Features) -> Option<usize> {
        negotiated_queues(features).position(|queue| queue == self)
    }

    /// Returns the queue at `index` with `features` negotiated.
    pub fn from_index(index: usize, features: Features) -> Option<Self> {
        negotiated_queues(features).nth(index)
    }

    /// Returns the number of queues with `features` negotiated: 2 to 5.
    pub fn count(features: Features) -> usize {
        negotiated_queues(features).count()
    }
}

/// Returns the queues that exist with `features` negotiated, in the order of their indices.
pub fn negotiated_queues(features: Features) -> impl Iterator<Item = Queue> {
    Queue::ALL
        .into_iter()
        .filter(move |queue| queue.exists(features))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_queues_take_no_index() {
        let hint = Features::FREE_PAGE_HINT;
        assert_eq!(Queue::FreePage.index(hint), Some(2));
        assert_eq!(Queue::FreePage.index(hint | Features::STATS_VQ), Some(3));
        assert_eq!(Queue::Stats.index(hint), None);
        assert_eq!(Queue::from_index(2, hint), Some(Queue::FreePage));
        assert_eq!(Queue::from_index(3, hint), None);
        assert_eq!(Queue::count(Features::NONE), 2);
    }

    #[test]
    fn index_and_from_index_are_inverse_for_every_feature_set() {
        for bits in 0..64 {
            let features = Features::from_bits(bits);
            for (index, queue) in negotiated_queues(features).enumerate() {
                assert_eq!(queue.index(features), Some(index));
                assert_eq!(Queue::from_index(index, features), Some(queue));
            }
            assert_eq!(Queue::from_index(Queue::count(features), features), None);
        }
    }
}
