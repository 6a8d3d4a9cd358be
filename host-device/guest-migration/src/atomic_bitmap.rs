// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A bitmap of fixed size that several threads change at once, and the count of its set bits.

use std::ops::Range;

use crate::sync::{AtomicU64, Ordering};

const BITS: u64 = u64::BITS as u64;

/// Atomic bits with a count of the set bits. The count is never below the number of set bits, and equals it while no
/// operation runs.
///
/// An operation that sets bits first raises the count by the number of bits in its range. Afterwards it subtracts the
/// bits that were already set. An operation that clears bits lowers the count afterwards. A count of zero therefore
/// means that no bit is set.
#[derive(Debug)]
pub(crate) struct AtomicBitmap {
    words: Box<[AtomicU64]>,
    len: u64,
    count: AtomicU64,
}

impl AtomicBitmap {
    /// Returns `len` clear bits, or `None` if memory is insufficient.
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

    /// Returns the number of bits, set or clear.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Returns the number of set bits. The result may be too high while an operation runs.
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

    /// Clears the bits in `range`, and sets in `other` the bits that were set here. Returns their number. `other` must
    /// have the same length.
    pub(crate) fn move_to(&self, other: &Self, range: Range<u64>) -> u64 {
        let range = self.clamp(range);
        let total = range.end - range.start;
        other.count.fetch_add(total, Ordering::AcqRel);
        let (mut moved, mut new) = (0, 0);
        for ((from, mask), (to, _)) in self.masks(range.clone()).zip(other.masks(range)) {
            let bits = from.fetch_and(!mask, Ordering::AcqRel) & mask;
            if bits != 0 {
                let there = to.fetch_or(bits, Ordering::AcqRel);
                new += u64::from((bits & !there).count_ones());
            }
            moved += u64::from(bits.count_ones());
        }
        other.count.fetch_sub(total - new, Ordering::AcqRel);
        self.count.fetch_sub(moved, Ordering::AcqRel);
        moved
    }

    /// Returns the next bit at or after `from` whose value is `set`, or `len` if no such bit exists.
    pub(crate) fn find(&self, from: u64, set: bool) -> u64 {
        let flip = if set { 0 } else { u64::MAX };
        let words = self.words_from(from).iter();
        find(
            words.map(|word| word.load(Ordering::Acquire) ^ flip),
            from,
            self.len,
        )
    }

    /// Returns the words from the one that contains the bit `from`.
    fn words_from(&self, from: u64) -> &[AtomicU64] {
        let first = usize::try_from(from / BITS).unwrap_or(usize::MAX);
        self.words.get(first..).unwrap_or_default()
    }

    fn clamp(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.len);
        range.start.min(end)..end
    }

    /// Iterates over the words that `range` touches, each with the mask of its bits in `range`. `range` must be
    /// clamped.
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

/// Returns the next bit at or after `from` that is set in neither `a` nor `b`. If `holds` is false, returns the next
/// bit that is set in at least one of them. Returns the length if no such bit exists. `a` and `b` must have the same
/// length.
pub(crate) fn find_in_neither(a: &AtomicBitmap, b: &AtomicBitmap, from: u64, holds: bool) -> u64 {
    let flip = if holds { u64::MAX } else { 0 };
    let words = a.words_from(from).iter().zip(b.words_from(from));
    let words = words.map(|(a, b)| {
        // While a bit moves from `a` to `b`, it may appear set in neither. As with the count, the result is exact only
        // while no operation runs.
        let a = a.load(Ordering::Acquire);
        (a | b.load(Ordering::Acquire)) ^ flip
    });
    find(words, from, a.len)
}

/// Returns the next bit at or after `from` that is set in `words`, or `len` if no such bit exists. The first word must
/// contain the bit `from`.
fn find(words: impl Iterator<Item = u64>, from: u64, len: u64) -> u64 {
    let mut mask = u64::MAX << (from % BITS);
    let mut base = from - from % BITS;
    for word in words {
        let found = word & mask;
        if found != 0 {
            return (base + u64::from(found.trailing_zeros())).min(len);
        }
        mask = u64::MAX;
        base += BITS;
    }
    len
}
