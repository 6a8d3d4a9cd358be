// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hashes of pages, and a digest over all pages that can be updated page by page.
//!
//! Both ends of a migration compute the same digest: the sender from the pages that it has sent, the receiver from its
//! memory files. Layout and arithmetic are part of the stream format (`docs/stream.md`).

use std::io;

use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::{xxh3_128_with_secret, xxh3_128_with_seed};

use crate::PAGE_SIZE;

static ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// Returns whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(ZEROS.len())
        .all(|chunk| ZEROS.get(..chunk.len()) == Some(chunk))
}

/// A 128-bit hash of the content of one page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct PageHash(u128);

impl PageHash {
    /// The hash of a page of zeros. No other page has this hash. It is the default, so a new table of hashes describes
    /// an empty memory.
    pub const ZERO: Self = Self(0);
}

/// Hashes pages with a seed.
///
/// A guest must not know the seed: without it the guest cannot construct two different pages with the same hash.
#[derive(Clone)]
pub struct PageHasher {
    seed: u64,
    secret: [u8; 192],
}

impl std::fmt::Debug for PageHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageHasher").finish_non_exhaustive()
    }
}

impl PageHasher {
    /// Returns a hasher with a known seed, such as the seed of the other end.
    pub fn new(seed: u64) -> Self {
        let secret = const_custom_default_secret(seed);
        Self { seed, secret }
    }

    /// Returns a hasher with a random seed.
    ///
    /// # Errors
    ///
    /// If the system provides no random numbers.
    pub fn with_random_seed() -> io::Result<Self> {
        let mut seed = [0; 8];
        let got = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        if got != seed.len() {
            return Err(io::Error::other(
                "getrandom returned fewer bytes than requested",
            ));
        }
        Ok(Self::new(u64::from_le_bytes(seed)))
    }

    /// Returns the seed, which the header of the stream contains.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Returns the hash of one page.
    pub fn hash(&self, page: &[u8]) -> PageHash {
        if is_zero(page) {
            return PageHash::ZERO;
        }
        // Only the page of zeros may have the hash 0.
        PageHash(xxh3_128_with_secret(page, &self.secret).max(1))
    }
}

/// A digest over all pages of all RAM blocks.
///
/// The digest is the wrapping sum of one term for each page. The term depends on the hash and the position of the page.
/// A page can therefore be replaced in the digest without reading other pages, and in any order. Pages of zeros add
/// nothing, so the digest of an empty memory is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContentDigest(u128);

impl ContentDigest {
    /// Returns the digest of a memory of zeros.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the hash `old` of page `page` of the RAM block with index `block` by the hash `new`.
    pub fn replace(&mut self, block: usize, page: u64, old: PageHash, new: PageHash) {
        if old != new {
            let sum = self.0.wrapping_sub(digest_term(block, page, old));
            self.0 = sum.wrapping_add(digest_term(block, page, new));
        }
    }

    /// Adds the hash of a page that was zero before.
    pub fn add(&mut self, block: usize, page: u64, hash: PageHash) {
        self.replace(block, page, PageHash::ZERO, hash);
    }

    /// Adds the digest of other pages.
    pub fn join(&mut self, other: Self) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// Returns the digest as a number.
    pub fn value(self) -> u128 {
        self.0
    }
}

/// Returns the term of a page: the hash of the page hash, the RAM block index and the page number, each little endian.
fn digest_term(block: usize, page: u64, hash: PageHash) -> u128 {
    if hash == PageHash::ZERO {
        return 0;
    }
    let mut bytes = [0; 32];
    let block = (block as u64).to_le_bytes();
    let parts: [&[u8]; 3] = [&hash.0.to_le_bytes(), &block, &page.to_le_bytes()];
    for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    xxh3_128_with_seed(&bytes, 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = PAGE_SIZE as usize;

    fn page(value: u8) -> Vec<u8> {
        vec![value; SIZE]
    }

    #[test]
    fn a_page_of_zeros_adds_nothing_and_any_other_byte_does() {
        let hasher = PageHasher::with_random_seed().unwrap();
        assert_eq!(hasher.hash(&page(0)), PageHash::ZERO);
        for at in [0, 1, 63, 64, 2048, SIZE - 1] {
            let mut page = page(0);
            page[at] = 1;
            assert!(!is_zero(&page));
            assert_ne!(hasher.hash(&page), PageHash::ZERO);
        }
        let mut digest = ContentDigest::new();
        digest.add(3, 7, PageHash::ZERO);
        assert_eq!(digest.value(), 0);
    }

    #[test]
    fn the_seed_and_the_place_matter() {
        let hasher = PageHasher::new(1);
        let hash = hasher.hash(&page(5));
        assert_eq!(hash, PageHasher::new(hasher.seed()).hash(&page(5)));
        assert_ne!(hash, PageHasher::new(2).hash(&page(5)));
        let digest = |block, page| {
            let mut digest = ContentDigest::new();
            digest.add(block, page, hash);
            digest.value()
        };
        let all = [digest(0, 0), digest(0, 1), digest(1, 0), digest(1, 1)];
        for (index, one) in all.iter().enumerate() {
            assert_eq!(all.iter().position(|other| other == one), Some(index));
        }
    }

    /// Checks the values that `docs/stream.md` defines, which other implementations must compute too.
    #[test]
    fn the_numbers_are_those_of_the_format() {
        let hash = PageHasher::new(0x0123_4567_89ab_cdef).hash(&page(0xa5));
        let plain = xxh3_128_with_seed(&page(0xa5), 0x0123_4567_89ab_cdef);
        assert_eq!(hash, PageHash(plain));
        let mut digest = ContentDigest::new();
        digest.add(1, 2, hash);
        let mut bytes = plain.to_le_bytes().to_vec();
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        assert_eq!(digest.value(), xxh3_128_with_seed(&bytes, 0));
    }

    proptest! {
        #[test]
        fn kept_page_by_page_it_is_the_one_of_the_whole(
            writes in prop::collection::vec((0usize..2, 0u64..6, 0u8..4), 0..60),
        ) {
            let hasher = PageHasher::new(9);
            let mut memory = [[0u8; 6]; 2];
            let mut kept = ContentDigest::new();
            for (block, number, value) in writes {
                let byte = &mut memory[block][number as usize];
                kept.replace(block, number, hasher.hash(&page(*byte)), hasher.hash(&page(value)));
                *byte = value;
            }
            let mut halves = [ContentDigest::new(); 2];
            for (block, bytes) in memory.iter().enumerate() {
                for (number, byte) in bytes.iter().enumerate() {
                    halves[block].add(block, number as u64, hasher.hash(&page(*byte)));
                }
            }
            halves[0].join(halves[1]);
            prop_assert_eq!(kept, halves[0]);
        }
    }
}
