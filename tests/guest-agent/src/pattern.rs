// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contents of a workload's page: a function of a seed and the page's number. A page that is lost, stale or
//! exchanged with another one does not hold its pattern.

/// The size of a workload's page, in bytes.
pub const PAGE: usize = 4096;

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Returns the number after `last` in a pseudo-random sequence.
#[must_use]
pub fn next_random(last: u64) -> u64 {
    mix(last.wrapping_add(STEP))
}

fn first(seed: u64, page: u64) -> u64 {
    mix(seed ^ page.wrapping_mul(STEP))
}

fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn words(seed: u64, page: u64) -> impl Iterator<Item = [u8; 8]> {
    let start = first(seed, page);
    (0..).map(move |index: u64| start.wrapping_add(index.wrapping_mul(STEP)).to_le_bytes())
}

/// Writes the pattern of page number `page` to `bytes` (whole words; at most a page).
pub fn write(bytes: &mut [u8], seed: u64, page: u64) {
    for (word, value) in bytes.chunks_exact_mut(8).zip(words(seed, page)) {
        word.copy_from_slice(&value);
    }
}

/// Returns whether `bytes` hold the pattern that [`write()`] writes for `seed` and `page`.
#[must_use]
pub fn holds(bytes: &[u8], seed: u64, page: u64) -> bool {
    bytes
        .chunks_exact(8)
        .zip(words(seed, page))
        .all(|(word, value)| word == value)
}

/// Returns whether `bytes` hold the pattern of any seed and page.
#[must_use]
pub fn is_pattern(bytes: &[u8]) -> bool {
    let mut words = bytes
        .chunks_exact(8)
        .filter_map(|word| word.try_into().ok())
        .map(u64::from_le_bytes);
    let Some(first) = words.next() else {
        return false;
    };
    (1..)
        .zip(words)
        .all(|(index, word): (u64, u64)| word == first.wrapping_add(index.wrapping_mul(STEP)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_belongs_to_its_seed_and_page() {
        let mut page = vec![0; PAGE];
        assert!(!holds(&page, 1, 2));
        write(&mut page, 1, 2);
        assert!(holds(&page, 1, 2));
        assert!(!holds(&page, 1, 3));
        assert!(!holds(&page, 2, 2));
        assert!(is_pattern(&page) && !is_pattern(&vec![0; PAGE]));
        page[PAGE - 1] ^= 1;
        assert!(!is_pattern(&page));
        assert!(!holds(&page, 1, 2));
    }
}
