// SPDX-License-Identifier: GPL-2.0

//! The page geometry: guest pages, balloon pages of 4 KiB, and the page frame numbers of a request.
//!
//! The functions compute only. Requests own the arrays that they fill.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;

use crate::shared_abi::page::{self, Pfn};

/// The largest number of page frame numbers in a request. Same as in the kernel's C driver
/// (`VIRTIO_BALLOON_ARRAY_PFNS_MAX`), which devices expect.
pub(super) const PFNS_MAX: usize = 256;

/// Conversions between guest pages of `2^SHIFT` bytes and balloon pages of 4 KiB.
pub(crate) struct PageGeometry<const SHIFT: u32>;

/// The conversions for this guest.
pub(crate) type GuestGeometry = PageGeometry<{ PAGE_SHIFT as u32 }>;

impl<const SHIFT: u32> PageGeometry<SHIFT> {
    /// The number of balloon pages per guest page.
    pub(crate) const PFNS_PER_PAGE: usize = match page::balloon_pages_per_guest_page(SHIFT) {
        Some(pfns) => {
            assert!(
                pfns as usize <= PFNS_MAX,
                "a request has no room for a page"
            );
            pfns as usize
        }
        None => panic!("a page of the guest is smaller than a balloon page"),
    };

    /// The number of guest pages that fit into a request.
    pub(crate) const CAPACITY: usize = PFNS_MAX / Self::PFNS_PER_PAGE;

    /// Converts balloon pages to guest pages, rounded up.
    pub(crate) const fn guest_pages(pfns: u64) -> u64 {
        pfns.div_ceil(Self::PFNS_PER_PAGE as u64)
    }

    /// Converts guest pages to balloon pages.
    pub(crate) const fn pfns(pages: usize) -> u64 {
        (pages * Self::PFNS_PER_PAGE) as u64
    }

    /// Writes the page frame numbers of the guest page at `address` into `array`, at the position
    /// of the request's guest page number `nth`.
    ///
    /// Returns the number of bytes of the array that are valid then. Returns `None` if the array is
    /// full or a number has more than 32 bits; the numbers of other guest pages stay valid.
    pub(super) fn encode(array: &mut [[u8; 4]], nth: usize, address: u64) -> Option<usize> {
        let from = nth.checked_mul(Self::PFNS_PER_PAGE)?;
        let to = from.checked_add(Self::PFNS_PER_PAGE)?;
        for (slot, part) in array.get_mut(from..to)?.iter_mut().zip(0u64..) {
            let address = address.checked_add(part << page::PFN_SHIFT)?;
            *slot = Pfn::from_address(address)?.to_le_bytes();
        }
        Some(to * size_of::<[u8; 4]>())
    }
}

#[kunit_tests(virtio_balloon_rs_page_geometry)]
mod tests {
    use super::*;

    const EMPTY: [u8; 4] = [0xff; 4];

    #[test]
    fn page_numbers_are_little_endian() {
        let mut array = [EMPTY; 2];
        let address = 0x0102_0304 << page::PFN_SHIFT;
        assert_eq!(PageGeometry::<12>::encode(&mut array, 1, address), Some(8));
        assert_eq!(array, [EMPTY, [4, 3, 2, 1]]);
    }

    #[test]
    fn a_large_page_has_a_number_for_each_4_kib() {
        let mut array = [EMPTY; 9];
        assert_eq!(
            PageGeometry::<14>::encode(&mut array, 1, 0x10_c000),
            Some(32)
        );
        let numbers = array.map(u32::from_le_bytes);
        assert_eq!(numbers[3..], [!0, 0x10c, 0x10d, 0x10e, 0x10f, !0]);

        let mut array = [EMPTY; PFNS_MAX];
        let last = PageGeometry::<16>::CAPACITY - 1;
        assert_eq!(
            PageGeometry::<16>::encode(&mut array, last, 0x7f_0000),
            Some(1024)
        );
        let numbers = array.map(u32::from_le_bytes);
        assert_eq!(numbers[PFNS_MAX - 17..][..2], [!0, 0x7f0]);
        assert_eq!(numbers[PFNS_MAX - 1], 0x7ff);
    }

    #[test]
    fn a_guest_counts_in_its_own_pages() {
        assert_eq!(PageGeometry::<12>::PFNS_PER_PAGE, 1);
        assert_eq!(PageGeometry::<14>::PFNS_PER_PAGE, 4);
        assert_eq!(PageGeometry::<16>::PFNS_PER_PAGE, 16);
        assert_eq!(PageGeometry::<12>::CAPACITY, 256);
        assert_eq!(PageGeometry::<14>::CAPACITY, 64);
        assert_eq!(PageGeometry::<16>::CAPACITY, 16);
        for pfns in [0, 1, 15, 16, 17, 256] {
            assert_eq!(PageGeometry::<12>::guest_pages(pfns), pfns);
            assert_eq!(PageGeometry::<14>::guest_pages(pfns), (pfns + 3) / 4);
            assert_eq!(PageGeometry::<16>::guest_pages(pfns), (pfns + 15) / 16);
        }
        assert_eq!(PageGeometry::<14>::pfns(3), 12);
        assert_eq!(PageGeometry::<16>::pfns(256), 4096);
    }

    #[test]
    fn a_number_beyond_32_bits_is_refused() {
        let mut array = [EMPTY; 16];
        let last = 0xfff_ffff_f000;
        assert_eq!(PageGeometry::<12>::encode(&mut array, 0, last), Some(4));
        assert_eq!(PageGeometry::<14>::encode(&mut array, 0, last), None);
        assert_eq!(
            PageGeometry::<16>::encode(&mut array, 0, last - 0xe000),
            None
        );
        assert_eq!(
            PageGeometry::<16>::encode(&mut array, 0, last - 0xf000),
            Some(64)
        );
        assert_eq!(PageGeometry::<12>::encode(&mut array, 0, u64::MAX), None);
        assert_eq!(PageGeometry::<12>::encode(&mut array, 16, 0), None);
        assert_eq!(PageGeometry::<16>::encode(&mut array, usize::MAX, 0), None);
    }
}
