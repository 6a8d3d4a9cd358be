// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Balloon pages that are smaller than the pages of the memory file.
//!
//! A file of huge pages frees only a whole huge page. [`PartialPages`] remembers which of its 4 KiB pages are in the
//! balloon, in any order and for many huge pages at once. The huge page is free when all of them are.
//!
//! A remembered page must not be in use by the guest when the last page of its huge page arrives. Only a driver that has
//! accepted `VIRTIO_BALLOON_F_MUST_TELL_HOST` waits for the device before it uses a page again. For other drivers nothing
//! is remembered beyond the requests whose buffers the device has not returned yet.

use std::collections::BTreeMap;
use std::ops::Range;

use shared_abi::page::BALLOON_PAGE_SIZE;

use super::Ram;

/// The most bytes of memory that [`PartialPages`] uses. It is enough for a balloon of 128 GiB in huge pages of 2 MiB.
const MAX_BYTES: usize = 4 << 20;

/// Bytes of an entry without its bits: roughly what both maps need for it.
const ENTRY_BYTES: usize = 64;

/// Which balloon pages of a granule are in the balloon. The page size of the memory file is the granule.
#[derive(Debug)]
enum Pages {
    /// All of them.
    All,
    /// Some of them: one bit for each page, and their number.
    Some(Box<[u64]>, u64),
}

#[derive(Debug)]
struct Entry {
    /// Its key in `order`.
    age: u64,
    pages: Pages,
}

impl Entry {
    fn bytes(&self) -> usize {
        match &self.pages {
            Pages::All => ENTRY_BYTES,
            Pages::Some(bits, _) => ENTRY_BYTES.saturating_add(size_of_val(&**bits)),
        }
    }
}

/// The balloon pages of granules that are larger than a balloon page.
#[derive(Debug, Default)]
pub struct PartialPages {
    /// By the guest physical address where the granule starts.
    entries: BTreeMap<u64, Entry>,
    /// The addresses of all entries, the oldest first.
    order: BTreeMap<u64, u64>,
    next_age: u64,
    /// Bytes of all entries.
    bytes: usize,
    forgotten: u64,
}

impl PartialPages {
    /// Adds balloon pages. Returns what the host can free of them now, in ascending order: ranges of memory with small
    /// pages as they are, and each granule all of whose pages are in the balloon. `ranges` must be in ascending order.
    pub fn inflate(&mut self, ram: &Ram, ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
        let mut whole: Vec<Range<u64>> = Vec::new();
        let mut push = |range: Range<u64>| match whole.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => whole.push(range),
        };
        for range in ranges {
            for part in ram.parts_inside(range) {
                if ram.granule_at(part.start) <= BALLOON_PAGE_SIZE {
                    push(part);
                    continue;
                }
                for granule in ram.granules(&part) {
                    let covered = clip(&part, &granule);
                    if covered == granule || self.add(&granule, &covered) {
                        self.set_all(&granule);
                        push(granule);
                    }
                }
            }
        }
        whole
    }

    /// Returns whether no page is remembered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Removes balloon pages: the guest uses them again.
    pub fn deflate(&mut self, ram: &Ram, range: &Range<u64>) {
        for part in ram.parts_inside(range.clone()) {
            if ram.granule_at(part.start) <= BALLOON_PAGE_SIZE {
                continue;
            }
            for granule in ram.granules(&part) {
                self.remove(&granule, &clip(&part, &granule));
            }
        }
    }

    /// Forgets all pages: another driver has an empty balloon.
    pub fn clear(&mut self) {
        *self = Self {
            forgotten: self.forgotten,
            ..Self::default()
        };
    }

    /// Returns how many granules were forgotten because there were too many.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Adds the pages `covered` of `granule`. Returns whether this completes the granule.
    fn add(&mut self, granule: &Range<u64>, covered: &Range<u64>) -> bool {
        let total = pages(granule);
        let (mut bits, mut count) = match self.take(granule.start) {
            Some(Pages::All) => {
                self.put(granule.start, Pages::All);
                return false;
            }
            Some(Pages::Some(bits, count)) => (bits, count),
            None => (no_bits(total), 0),
        };
        for (word, mask) in masks(granule, covered) {
            if let Some(word) = bits.get_mut(word) {
                count = count.saturating_add(u64::from((mask & !*word).count_ones()));
                *word |= mask;
            }
        }
        if count >= total {
            return true;
        }
        self.put(granule.start, Pages::Some(bits, count));
        false
    }

    fn remove(&mut self, granule: &Range<u64>, covered: &Range<u64>) {
        let (mut bits, mut count) = match self.take(granule.start) {
            None => return,
            Some(Pages::Some(bits, count)) => (bits, count),
            Some(Pages::All) => {
                let mut bits = no_bits(pages(granule));
                for (word, mask) in masks(granule, granule) {
                    if let Some(word) = bits.get_mut(word) {
                        *word |= mask;
                    }
                }
                (bits, pages(granule))
            }
        };
        for (word, mask) in masks(granule, covered) {
            if let Some(word) = bits.get_mut(word) {
                count = count.saturating_sub(u64::from((mask & *word).count_ones()));
                *word &= !mask;
            }
        }
        if count > 0 {
            self.put(granule.start, Pages::Some(bits, count));
        }
    }

    fn set_all(&mut self, granule: &Range<u64>) {
        self.take(granule.start);
        self.put(granule.start, Pages::All);
    }

    fn take(&mut self, start: u64) -> Option<Pages> {
        let entry = self.entries.remove(&start)?;
        self.bytes = self.bytes.saturating_sub(entry.bytes());
        self.order.remove(&entry.age);
        Some(entry.pages)
    }

    /// Adds an entry as the youngest one, and removes the oldest ones if there are too many.
    fn put(&mut self, start: u64, pages: Pages) {
        let age = self.next_age;
        self.next_age = age.wrapping_add(1);
        let entry = Entry { age, pages };
        self.bytes = self.bytes.saturating_add(entry.bytes());
        self.order.insert(age, start);
        self.entries.insert(start, entry);
        while self.bytes > MAX_BYTES {
            let Some((_, oldest)) = self.order.first_key_value() else {
                return;
            };
            let oldest = *oldest;
            self.take(oldest);
            self.forgotten = self.forgotten.saturating_add(1);
        }
    }
}

/// Returns the number of balloon pages in `range`.
fn pages(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start) / BALLOON_PAGE_SIZE
}

fn no_bits(pages: u64) -> Box<[u64]> {
    let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
    vec![0; words].into_boxed_slice()
}

fn clip(range: &Range<u64>, to: &Range<u64>) -> Range<u64> {
    range.start.max(to.start)..range.end.min(to.end)
}

/// Returns words and masks of the bits of the whole balloon pages `covered`, which are in `granule`.
fn masks(granule: &Range<u64>, covered: &Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let page = |address: u64| address.saturating_sub(granule.start) / BALLOON_PAGE_SIZE;
    let first = page(
        covered
            .start
            .checked_next_multiple_of(BALLOON_PAGE_SIZE)
            .unwrap_or(covered.end),
    );
    let end = page(covered.end).max(first);
    (first / 64..end.div_ceil(64)).filter_map(move |word| {
        let low = first.saturating_sub(word * 64).min(64);
        let high = end.saturating_sub(word * 64).min(64);
        let ones = |count: u64| match count {
            64 => u64::MAX,
            count => (1 << count) - 1,
        };
        Some((usize::try_from(word).ok()?, ones(high) & !ones(low)))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init, reason = "lists of ranges")]

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::tests::coarse_ram;

    const MIB: u64 = 1 << 20;
    const PAGE: u64 = BALLOON_PAGE_SIZE;

    fn page(address: u64) -> Vec<Range<u64>> {
        vec![address..address + PAGE]
    }

    /// Inflates page by page, and returns what becomes free.
    fn inflate_pages(partial: &mut PartialPages, ram: &Ram, pages: &[u64]) -> Vec<Range<u64>> {
        let pages = pages.iter().map(|it| it * PAGE);
        pages
            .flat_map(|it| partial.inflate(ram, page(it)))
            .collect()
    }

    #[test]
    fn interleaved_pages_of_two_huge_pages_free_both() {
        let ram = coarse_ram(4 * MIB, 2 * MIB);
        let mut partial = PartialPages::default();
        let mut pages: Vec<u64> = (0..512).flat_map(|it| [1023 - it, it]).collect();
        let last = pages.split_off(1022);
        assert_eq!(inflate_pages(&mut partial, &ram, &pages), []);
        assert_eq!(
            inflate_pages(&mut partial, &ram, &last),
            [2 * MIB..4 * MIB, 0..2 * MIB]
        );
    }

    #[test]
    fn a_page_that_left_the_balloon_keeps_its_huge_page() {
        let ram = coarse_ram(4 * MIB, 2 * MIB);
        let mut partial = PartialPages::default();
        assert_eq!(partial.inflate(&ram, vec![0..2 * MIB - PAGE]), []);
        partial.deflate(&ram, &(0..PAGE));
        assert_eq!(inflate_pages(&mut partial, &ram, &[511]), []);
        assert_eq!(inflate_pages(&mut partial, &ram, &[0]), [0..2 * MIB]);
        // After that, the pages are in the balloon without being in memory. One that leaves and returns frees the
        // huge page again, which the guest has touched.
        partial.deflate(&ram, &(7 * PAGE..8 * PAGE));
        assert_eq!(inflate_pages(&mut partial, &ram, &[7]), [0..2 * MIB]);
        // Another driver starts with an empty balloon.
        assert_eq!(partial.inflate(&ram, vec![2 * MIB..3 * MIB]), []);
        partial.clear();
        assert_eq!(partial.inflate(&ram, vec![3 * MIB..4 * MIB]), []);
    }

    #[test]
    fn memory_is_bounded() {
        let ram = coarse_ram(1 << 40, 2 * MIB);
        let mut partial = PartialPages::default();
        for granule in 0..(1u64 << 40) / (2 * MIB) {
            partial.inflate(&ram, page(granule * 2 * MIB));
        }
        assert!(partial.bytes <= MAX_BYTES);
        assert!(partial.forgotten() > 0);
        assert_eq!(partial.entries.len(), partial.order.len());
        // The youngest are still known.
        let last = (1 << 40) - 2 * MIB;
        let rest = vec![last + PAGE..last + 2 * MIB];
        assert_eq!(partial.inflate(&ram, rest), [last..last + 2 * MIB]);
    }

    proptest! {
        #[test]
        fn exactly_the_granules_whose_pages_are_all_in_the_balloon_become_free(
            steps in prop::collection::vec((any::<bool>(), 0u64..64, 1u64..40), 1..60),
        ) {
            // Granules of 8 pages.
            let ram = coarse_ram(64 * PAGE, 8 * PAGE);
            let mut partial = PartialPages::default();
            let mut model = BTreeSet::new();
            for (inflates, first, count) in steps {
                let end = (first + count).min(64);
                let range = first * PAGE..end * PAGE;
                if !inflates {
                    partial.deflate(&ram, &range);
                    model.retain(|it| !(first..end).contains(it));
                    continue;
                }
                let before = model.clone();
                model.extend(first..end);
                let freed = partial.inflate(&ram, vec![range]);
                for granule in 0..8u64 {
                    let pages = || granule * 8..granule * 8 + 8;
                    let is_free = freed.iter().any(|it| {
                        it.start <= granule * 8 * PAGE && it.end >= (granule + 1) * 8 * PAGE
                    });
                    let covered = pages().all(|it| (first..end).contains(&it));
                    let completed = pages().all(|it| model.contains(&it))
                        && !pages().all(|it| before.contains(&it));
                    prop_assert_eq!(is_free, covered || completed, "granule {}", granule);
                }
            }
        }
    }
}
