// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Configuration space of the device.
//!
//! Every field is a little-endian 32-bit word, also for legacy devices.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Device configuration layout",
//! and `struct virtio_balloon_config`.

use super::features::Features;

/// Offset of `num_pages`: the number of 4 KiB pages that the device wants in the balloon. Written
/// by the device.
pub const NUM_PAGES: usize = 0;
/// Offset of `actual`: the number of 4 KiB pages in the balloon. Written by the driver.
pub const ACTUAL: usize = 4;
/// Offset of `free_page_hint_cmd_id`. Written by the device. Exists with
/// [`FREE_PAGE_HINT`](Features::FREE_PAGE_HINT).
pub const FREE_PAGE_HINT_CMD_ID: usize = 8;
/// Offset of `poison_val`. Written by the driver. Exists with
/// [`PAGE_POISON`](Features::PAGE_POISON).
pub const POISON_VAL: usize = 12;
/// The size of the whole layout in bytes.
pub const MAX_SIZE: usize = 16;

/// The layout as a C structure, which the compiler checks against the offsets above.
#[repr(C)]
#[allow(dead_code)]
struct Layout {
    num_pages: [u8; 4],
    actual: [u8; 4],
    free_page_hint_cmd_id: [u8; 4],
    poison_val: [u8; 4],
}

const _: () = {
    assert!(core::mem::offset_of!(Layout, num_pages) == NUM_PAGES);
    assert!(core::mem::offset_of!(Layout, actual) == ACTUAL);
    assert!(core::mem::offset_of!(Layout, free_page_hint_cmd_id) == FREE_PAGE_HINT_CMD_ID);
    assert!(core::mem::offset_of!(Layout, poison_val) == POISON_VAL);
    assert!(core::mem::size_of::<Layout>() == MAX_SIZE);
    assert!(size_for(Features::NONE) == FREE_PAGE_HINT_CMD_ID);
    assert!(size_for(Features::FREE_PAGE_HINT) == POISON_VAL);
    assert!(size_for(Features::PAGE_POISON) == MAX_SIZE);
    assert!(size_for(Features::FREE_PAGE_HINT.union(Features::PAGE_POISON)) == MAX_SIZE);
};

/// Returns the size of configuration space in bytes for a feature set: 8, 12 or 16.
///
/// A field exists if its feature is negotiated, or if a later field exists.
pub const fn size_for(features: Features) -> usize {
    if features.contains(Features::PAGE_POISON) {
        MAX_SIZE
    } else if features.contains(Features::FREE_PAGE_HINT) {
        POISON_VAL
    } else {
        FREE_PAGE_HINT_CMD_ID
    }
}

/// The values of configuration space, in native byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigSpace {
    /// The number of 4 KiB pages that the device wants in the balloon.
    pub num_pages: u32,
    /// The number of 4 KiB pages in the balloon, as reported by the driver.
    pub actual: u32,
    /// The raw command id: see [`CommandId`](super::command::CommandId).
    pub free_page_hint_cmd_id: u32,
    /// The pattern that the guest fills free pages with.
    pub poison_val: u32,
}

impl ConfigSpace {
    /// Returns the values as the bytes of configuration space.
    ///
    /// The device shows only the first [`size_for`] bytes.
    pub const fn to_bytes(self) -> [u8; MAX_SIZE] {
        let a = self.num_pages.to_le_bytes();
        let b = self.actual.to_le_bytes();
        let c = self.free_page_hint_cmd_id.to_le_bytes();
        let d = self.poison_val.to_le_bytes();
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// Returns the values that the bytes of configuration space contain.
    pub const fn from_bytes(bytes: [u8; MAX_SIZE]) -> Self {
        let [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3] = bytes;
        Self {
            num_pages: u32::from_le_bytes([a0, a1, a2, a3]),
            actual: u32::from_le_bytes([b0, b1, b2, b3]),
            free_page_hint_cmd_id: u32::from_le_bytes([c0, c1, c2, c3]),
            poison_val: u32::from_le_bytes([d0, d1, d2, d3]),
        }
    }

    /// Applies a write of the driver, and returns the new values.
    ///
    /// Only changes `actual` and `poison_val`, which the driver writes. The other fields belong to
    /// the device: a VMM may write all of configuration space to change one field, and must not
    /// overwrite these fields with old values. Ignores bytes beyond the layout.
    ///
    /// `offset` and `data` come from the front end and are not trusted.
    #[must_use]
    pub fn with_driver_write(self, offset: usize, data: &[u8]) -> Self {
        let mut bytes = self.to_bytes();
        for (at, byte) in bytes.iter_mut().enumerate() {
            let written = at.checked_sub(offset).and_then(|n| data.get(n));
            let drivers = (ACTUAL..ACTUAL + 4).contains(&at) || at >= POISON_VAL;
            if let (Some(value), true) = (written, drivers) {
                *byte = *value;
            }
        }
        Self::from_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEVERAL: ConfigSpace = ConfigSpace {
        num_pages: 0x0403_0201,
        actual: 0x0807_0605,
        free_page_hint_cmd_id: 0x8c0b_0a09,
        poison_val: 0x100f_0e0d,
    };

    #[test]
    fn fields_are_little_endian_at_their_offsets() {
        let bytes = SEVERAL.to_bytes();
        assert_eq!(bytes[NUM_PAGES..][..4], [1, 2, 3, 4]);
        assert_eq!(bytes[ACTUAL..][..4], [5, 6, 7, 8]);
        assert_eq!(bytes[FREE_PAGE_HINT_CMD_ID..][..4], [9, 10, 11, 0x8c]);
        assert_eq!(bytes[POISON_VAL..][..4], [13, 14, 15, 16]);
        assert_eq!(ConfigSpace::from_bytes(bytes), SEVERAL);
    }

    #[test]
    fn r10_config_space_is_as_long_as_the_features_say() {
        assert_eq!(size_for(Features::NONE), 8);
        assert_eq!(size_for(Features::STATS_VQ | Features::REPORTING), 8);
        assert_eq!(size_for(Features::FREE_PAGE_HINT), 12);
        assert_eq!(size_for(Features::PAGE_POISON), 16);
    }

    #[test]
    fn a_write_of_the_whole_space_changes_only_what_is_the_drivers() {
        let after = ConfigSpace::default().with_driver_write(0, &SEVERAL.to_bytes());
        let expected = ConfigSpace {
            actual: SEVERAL.actual,
            poison_val: SEVERAL.poison_val,
            ..ConfigSpace::default()
        };
        assert_eq!(after, expected);
    }

    proptest! {
        #[test]
        fn any_write_leaves_the_devices_fields_alone(
            offset in prop_oneof![0usize..20, any::<usize>()],
            data in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let after = SEVERAL.with_driver_write(offset, &data);
            prop_assert_eq!(after.num_pages, SEVERAL.num_pages);
            prop_assert_eq!(after.free_page_hint_cmd_id, SEVERAL.free_page_hint_cmd_id);
            if offset == ACTUAL && data.len() >= 4 {
                let written = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                prop_assert_eq!(after.actual, written);
            }
        }
    }
}
