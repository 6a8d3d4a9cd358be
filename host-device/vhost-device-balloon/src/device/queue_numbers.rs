// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which queue a driver means by an index. Drivers number the queues in different ways:
//!
//! - by the *negotiated* features: a queue without its feature has no index. Linux does so.
//! - by the *offered* features: QEMU's device numbers its queues when it is created, and always has a stats queue.
//! - by the *fixed* positions of the specification's list.
//!
//! Inflate and deflate are 0 and 1 in all of them. For the others the rings that the driver has started tell which
//! numbering it uses: all rings of a numbering up to the index exist, and none between them. Front ends start the rings
//! in the order of their indices.

use shared_abi::features::Features;
use shared_abi::queue::{negotiated_queues, Queue};

/// The queue of each index in one numbering. Only queues that are negotiated have one.
type Numbering = [Option<Queue>; Queue::MAX_COUNT];

/// Returns the numbering of a driver for which the queues of `existing` features have an index.
fn numbering(existing: impl Iterator<Item = Queue>, negotiated: Features) -> Numbering {
    let mut numbers = Numbering::default();
    for (number, queue) in numbers.iter_mut().zip(existing) {
        *number = Some(queue).filter(|queue| queue.exists(negotiated));
    }
    numbers
}

/// Returns whether the rings that are `started` up to `index` are those of the numbering.
fn fits(numbering: &Numbering, started: &[bool; Queue::MAX_COUNT], index: usize) -> bool {
    let pairs = numbering.iter().zip(started).take(index.saturating_add(1));
    let (mut below, mut above) = (pairs, numbering.iter().zip(started).skip(index + 1));
    below.all(|(queue, started)| queue.is_some() == *started)
        && above.all(|(queue, started)| queue.is_some() || !started)
}

/// What a driver means by an index.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Meaning {
    /// This queue.
    Queue(Queue),
    /// One of several queues. The rings do not tell which, and Linux would mean this one, if any.
    Unclear(Option<Queue>),
    /// No queue, however the driver numbers them.
    None,
}

/// Returns what a driver means by `index` that has accepted `negotiated` of the `offered` features, and has started
/// the rings `started`.
pub(super) fn meaning(
    index: usize,
    offered: Features,
    negotiated: Features,
    started: &[bool; Queue::MAX_COUNT],
) -> Meaning {
    let numberings = [
        numbering(negotiated_queues(negotiated), negotiated),
        numbering(negotiated_queues(offered), negotiated),
        numbering(negotiated_queues(offered | Features::STATS_VQ), negotiated),
        numbering(Queue::ALL.into_iter(), negotiated),
    ];
    let at = |numbering: &Numbering| numbering.get(index).copied().flatten();
    let fitting = numberings.iter().filter(|it| fits(it, started, index));
    if let Some(queue) = unanimous(fitting.map(at)) {
        return Meaning::Queue(queue);
    }
    // The rings fit no numbering, or several. Perhaps the index means the same in all that have it.
    let named = || numberings.iter().map(at).filter(Option::is_some);
    match unanimous(named()) {
        Some(queue) => Meaning::Queue(queue),
        None if named().next().is_none() => Meaning::None,
        None => Meaning::Unclear(numberings.first().and_then(at)),
    }
}

/// Returns the queue that all of `queues` are, if there is one.
fn unanimous(mut queues: impl Iterator<Item = Option<Queue>>) -> Option<Queue> {
    let first = queues.next().flatten()?;
    queues.all(|queue| queue == Some(first)).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Features = Features::STATS_VQ
        .union(Features::FREE_PAGE_HINT)
        .union(Features::REPORTING);

    fn subsets() -> impl Iterator<Item = Features> {
        (0..8u8).map(|bits| {
            let pick = |bit: u8, feature| {
                if bits >> bit & 1 == 1 {
                    feature
                } else {
                    Features::NONE
                }
            };
            pick(0, Features::STATS_VQ)
                | pick(1, Features::FREE_PAGE_HINT)
                | pick(2, Features::REPORTING)
        })
    }

    /// Checks each index of a driver that uses `numbering`, when it starts its rings in order.
    fn check(numbering: Numbering, offered: Features, negotiated: Features) {
        let mut started = [false; Queue::MAX_COUNT];
        for (index, queue) in numbering.iter().enumerate() {
            let Some(queue) = queue else { continue };
            started[index] = true;
            // The driver may kick at once, or after it has started all rings.
            let all = numbering.map(|it| it.is_some());
            for started in [&started, &all] {
                let found = meaning(index, offered, negotiated, started);
                let state = format!("{offered}; {negotiated}; {started:?}; {index}");
                assert_eq!(found, Meaning::Queue(*queue), "{state}");
            }
        }
    }

    #[test]
    fn each_way_to_number_the_queues_is_understood() {
        for offered in subsets() {
            for negotiated in subsets().filter(|it| offered.contains(*it)) {
                let linux = numbering(negotiated_queues(negotiated), negotiated);
                let device = numbering(negotiated_queues(offered), negotiated);
                let qemu = negotiated_queues(offered | Features::STATS_VQ);
                let qemu = numbering(qemu, negotiated);
                let fixed = numbering(Queue::ALL.into_iter(), negotiated);
                for numbering in [linux, device, qemu, fixed] {
                    check(numbering, offered, negotiated);
                }
            }
        }
    }

    #[test]
    fn an_index_that_can_mean_two_queues_is_unclear() {
        let negotiated = Features::FREE_PAGE_HINT | Features::REPORTING;
        // All rings are started: no driver needs five of them for four queues.
        let found = meaning(3, ALL, negotiated, &[true; Queue::MAX_COUNT]);
        assert_eq!(found, Meaning::Unclear(Some(Queue::Reporting)));
        let found = meaning(4, ALL, Features::NONE, &[true; Queue::MAX_COUNT]);
        assert_eq!(found, Meaning::None);
        assert_eq!(
            meaning(99, ALL, ALL, &[true; Queue::MAX_COUNT]),
            Meaning::None
        );
    }
}
