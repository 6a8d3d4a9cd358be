// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A fixed number of bits that several threads set and clear, and their count.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const BITS: u64 = u64::BITS as u64;

/// Atomic bits with a count that is never below the number of set bits, and equal to it whenever no
/// operation is under way.
///
/// To keep that order, an operation that sets bits raises the count before it touches them and takes back
/// what was set already; one that clears bits lowers it after. Whoever sees a count of zero can therefore
/// rely on there being no set bit.
#[derive(Debug)]
pub(crate) struct Bits {
    words: Box<[AtomicU64]>,
    len: u64,
    count: AtomicU64,
}

impl Bits {
    /// `len` clear bits, or `None` if there is no memory for them.
    pub(crate) fn new(len: u64) -> Option<Self> {
        let words = usize::try_from(len.div_ceil(BITS)).ok()?;
        let mut vec = Vec::new();
        vec.try_reserve_exact(words).ok()?;
        vec.resize_with(words, AtomicU64::default);
        Some(Self {
            words: vec.into_boxed_slice(),
            len,
            count: AtomicU64::new(0),
        })
    }

    /// The number of bits, set or clear.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The number of set bits.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire).min(self.len)
    }

    /// Sets the bits in `range`, and returns how many of them were clear.
    pub(crate) fn set(&self, range: Range<u64>) -> u64 {
        let range = self.clamp(range);
        let total = range.end - range.start;
        self.count.fetch_add(total, Ordering::AcqRel);
        let already: u64 = self
            .masks(range)
            .map(|(word, mask)| {
                u64::from((word.fetch_or(mask, Ordering::AcqRel) & mask).count_ones())
            })
            .sum();
        self.count.fetch_sub(already, Ordering::AcqRel);
        total - already
    }

    /// Clears the bits in `range`, and returns how many of them were set.
    pub(crate) fn clear(&self, range: Range<u64>) -> u64 {
        let range = self.clamp(range);
        let cleared: u64 = self
            .masks(range)
            .map(|(word, mask)| {
                u64::from((word.fetch_and(!mask, Ordering::AcqRel) & mask).count_ones())
            })
            .sum();
        self.count.fetch_sub(cleared, Ordering::AcqRel);
        cleared
    }

    /// Clears the bits in `range` here, and sets those of them that were set in `other`, which is as long and has them
    /// clear. Returns how many they are.
    pub(crate) fn move_to(&self, other: &Self, range: Range<u64>) -> u64 {
        let range = self.clamp(range);
        let total = range.end - range.start;
        other.count.fetch_add(total, Ordering::AcqRel);
        let moved: u64 = self
            .masks(range.clone())
            .zip(other.masks(range))
            .map(|((from, mask), (to, _))| {
                let moved = from.fetch_and(!mask, Ordering::AcqRel) & mask;
                if moved != 0 {
                    to.fetch_or(moved, Ordering::AcqRel);
                }
                u64::from(moved.count_ones())
            })
            .sum();
        other.count.fetch_sub(total - moved, Ordering::AcqRel);
        self.count.fetch_sub(moved, Ordering::AcqRel);
        moved
    }

    /// The next bit at or after `from` that is `set`, or `len` if there is none.
    pub(crate) fn find(&self, from: u64, set: bool) -> u64 {
        let flip = if set { 0 } else { u64::MAX };
        let words = self.words.iter();
        find(
            words.map(|word| word.load(Ordering::Acquire) ^ flip),
            from,
            self.len,
        )
    }

    fn clamp(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.len);
        range.start.min(end)..end
    }

    /// The words that `range` touches, each with the mask of the bits in it. `range` must be clamped.
    fn masks(&self, range: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let first = range.start / BITS;
        let words = (range.end.div_ceil(BITS)).saturating_sub(first);
        self.words
            .iter()
            .enumerate()
            .skip(usize::try_from(first).unwrap_or(usize::MAX))
            .take(usize::try_from(words).unwrap_or(usize::MAX))
            .map(move |(index, word)| {
                let base = index as u64 * BITS;
                let low = range.start.saturating_sub(base);
                let high = (range.end - base).min(BITS);
                (word, (u64::MAX << low) & (u64::MAX >> (BITS - high)))
            })
            .filter(|(_, mask)| *mask != 0)
    }
}

/// The next bit at or after `from` that is set in neither `a` nor `b`, which are as long as each other; or, with `holds` false,
/// one that is set in either. The length if there is none.
pub(crate) fn find_in_neither(a: &Bits, b: &Bits, from: u64, holds: bool) -> u64 {
    let flip = if holds { u64::MAX } else { 0 };
    let words = a.words.iter().zip(&b.words).map(|(a, b)| {
        // A bit that is just moving from `a` to `b` may be seen in neither: exact at rest only, as the counts are.
        let a = a.load(Ordering::Acquire);
        (a | b.load(Ordering::Acquire)) ^ flip
    });
    find(words, from, a.len)
}

/// The next bit at or after `from` that is set in `words`, or `len` if there is none.
fn find(words: impl Iterator<Item = u64>, from: u64, len: u64) -> u64 {
    let skip = usize::try_from(from / BITS).unwrap_or(usize::MAX);
    let mut mask = u64::MAX << (from % BITS);
    for (index, word) in words.enumerate().skip(skip) {
        let found = word & mask;
        if found != 0 {
            let bit = index as u64 * BITS + u64::from(found.trailing_zeros());
            return bit.min(len);
        }
        mask = u64::MAX;
    }
    len
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Bits {
        fn to_vec(&self) -> Vec<bool> {
            (0..self.len)
                .map(|bit| self.find(bit, true) == bit)
                .collect()
        }
    }

    #[test]
    fn empty_and_reversed_ranges_touch_nothing() {
        let bits = Bits::new(130).unwrap();
        assert_eq!(bits.set(5..5), 0);
        assert_eq!(bits.set(64..64), 0);
        assert_eq!(bits.set(130..500), 0);
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 70..3;
        assert_eq!(bits.set(reversed), 0);
        assert_eq!(bits.count(), 0);
        assert_eq!(Bits::new(0).unwrap().find(0, true), 0);
    }

    proptest! {
        #[test]
        fn r12_count_is_the_number_of_set_bits_after_every_operation(
            len in 1u64..400,
            ops in prop::collection::vec((any::<bool>(), 0u64..450, 0u64..450), 0..60),
        ) {
            let bits = Bits::new(len).unwrap();
            let mut model = vec![false; len as usize];
            for (set, a, b) in ops {
                let (low, high) = (a.min(b), a.max(b));
                let mut changed = 0;
                for bit in low.min(len)..high.min(len) {
                    let was = std::mem::replace(&mut model[bit as usize], set);
                    changed += u64::from(was != set);
                }
                let said = if set { bits.set(low..high) } else { bits.clear(low..high) };
                prop_assert_eq!(said, changed);
                prop_assert_eq!(bits.count(), model.iter().filter(|bit| **bit).count() as u64);
                prop_assert_eq!(&bits.to_vec(), &model);
            }
        }
    }

    #[test]
    fn r12_count_is_never_below_the_set_bits_and_exact_at_rest() {
        const LEN: u64 = 64 * 40 + 7;
        let bits = Bits::new(LEN).unwrap();
        // One bit that nobody clears: the count may never be seen at zero.
        bits.set(LEN - 1..LEN);
        std::thread::scope(|scope| {
            for seed in 1..=4u64 {
                let bits = &bits;
                scope.spawn(move || {
                    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    let mut next = |below: u64| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state % below
                    };
                    for _ in 0..20_000 {
                        let start = next(LEN - 1);
                        let end = (start + next(200)).min(LEN - 1);
                        if next(2) == 0 {
                            bits.set(start..end);
                        } else {
                            bits.clear(start..end);
                        }
                        let count = bits.count();
                        assert!((1..=LEN).contains(&count), "count {count}");
                    }
                });
            }
        });
        let set = bits.to_vec().into_iter().filter(|bit| *bit).count() as u64;
        assert_eq!(bits.count(), set);
    }
}
