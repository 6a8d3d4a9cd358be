// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The virtqueues, and the index that each one gets.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Virtqueues". Queues that the
//! features leave out take no index: Linux numbers only those that exist, so without
//! [`STATS_VQ`](Features::STATS_VQ) the free page queue is number 2.

use super::features::Features;

/// A virtqueue of the balloon, by its duty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Queue {
    /// Page numbers that go into the balloon. Always there.
    Inflate,
    /// Page numbers that come out of the balloon. Always there.
    Deflate,
    /// Guest memory statistics.
    Stats,
    /// Command ids and blocks of free pages: free page hinting.
    FreePage,
    /// Blocks of free pages that the guest reports by itself.
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

    /// The most queues that a balloon can have.
    pub const MAX_COUNT: usize = Self::ALL.len();

    /// The feature that brings this queue; the empty set if it is always there.
    pub const fn feature(self) -> Features {
        match self {
            Self::Inflate | Self::Deflate => Features::NONE,
            Self::Stats => Features::STATS_VQ,
            Self::FreePage => Features::FREE_PAGE_HINT,
            Self::Reporting => Features::REPORTING,
        }
    }

    /// The queue's name in messages and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inflate => "inflate",
            Self::Deflate => "deflate",
            Self::Stats => "stats",
            Self::FreePage => "free-page",
            Self::Reporting => "reporting",
        }
    }

    /// Whether the queue exists with `features` negotiated.
    pub const fn exists(self, features: Features) -> bool {
        features.contains(self.feature())
    }

    /// The queue's index with `features` negotiated, or `None` if it does not exist then.
    pub fn index(self, features: Features) -> Option<usize> {
        negotiated_queues(features).position(|queue| queue == self)
    }

    /// The queue at `index` with `features` negotiated.
    pub fn from_index(index: usize, features: Features) -> Option<Self> {
        negotiated_queues(features).nth(index)
    }

    /// How many queues there are with `features` negotiated: 2 to 5.
    pub fn count(features: Features) -> usize {
        negotiated_queues(features).count()
    }
}

/// The queues that exist with `features` negotiated, in the order of their indices.
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
