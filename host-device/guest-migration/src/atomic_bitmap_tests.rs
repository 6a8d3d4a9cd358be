// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of [`crate::atomic_bitmap`]. They are in a file of their own because the crate `bitmap-model` compiles that
//! module too.

use proptest::prelude::*;

use crate::atomic_bitmap::AtomicBitmap;

impl AtomicBitmap {
    fn to_vec(&self) -> Vec<bool> {
        (0..self.len())
            .map(|bit| self.find(bit, true) == bit)
            .collect()
    }
}

#[test]
fn empty_and_reversed_ranges_touch_nothing() {
    let bits = AtomicBitmap::new(130).unwrap();
    assert_eq!(bits.set(5..5), 0);
    assert_eq!(bits.set(64..64), 0);
    assert_eq!(bits.set(130..500), 0);
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = 70..3;
    assert_eq!(bits.set(reversed), 0);
    assert_eq!(bits.count(), 0);
    assert_eq!(AtomicBitmap::new(0).unwrap().find(0, true), 0);
}

proptest! {
    #[test]
    fn r12_count_is_the_number_of_set_bits_after_every_operation(
        len in 1u64..400,
        ops in prop::collection::vec((any::<bool>(), 0u64..450, 0u64..450), 0..60),
    ) {
        let bits = AtomicBitmap::new(len).unwrap();
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
    let bits = AtomicBitmap::new(LEN).unwrap();
    // No thread clears this bit, so the count must never be zero.
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
