// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Balloon pages: the 4 KiB pages of the balloon interface, regardless of the page size of the
//! guest.
//!
//! Source: `VIRTIO_BALLOON_PFN_SHIFT`.

/// The shift from a balloon page number to an address.
pub const PFN_SHIFT: u32 = 12;
/// The size of a balloon page in bytes.
pub const BALLOON_PAGE_SIZE: u64 = 1 << PFN_SHIFT;

/// A balloon page number: a guest physical address in units of 4 KiB, as in requests on the inflate
/// and deflate queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(u32);

impl Pfn {
    /// Creates a balloon page number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// Returns the balloon page that contains `address`, or `None` if its number does not fit in 32
    /// bits (an address of 16 TiB or more).
    pub const fn from_address(address: u64) -> Option<Self> {
        let number = address >> PFN_SHIFT;
        if number > u32::MAX as u64 {
            None
        } else {
            Some(Self(number as u32))
        }
    }

    /// Returns the number.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Returns the guest physical address of the first byte.
    pub const fn address(self) -> u64 {
        (self.0 as u64) << PFN_SHIFT
    }

    /// Returns the bytes of the number in a request.
    pub const fn to_le_bytes(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    /// Returns the page number that the bytes of a request contain.
    pub const fn from_le_bytes(bytes: [u8; 4]) -> Self {
        Self(u32::from_le_bytes(bytes))
    }
}

/// Returns the number of balloon pages in one guest page of `1 << guest_page_shift` bytes.
///
/// 1 for guest pages of 4 KiB, 16 for 64 KiB. `None` if a guest page is smaller than a balloon
/// page, or if the number does not fit in 32 bits.
pub const fn balloon_pages_per_guest_page(guest_page_shift: u32) -> Option<u32> {
    match guest_page_shift.checked_sub(PFN_SHIFT) {
        Some(shift) => 1u32.checked_shl(shift),
        None => None,
    }
}

/// Returns `pages` rounded up to whole guest pages of `1 << guest_page_shift` bytes, in balloon
/// pages.
///
/// A driver with larger pages uses the result as its target, so that it does not inflate and
/// deflate the same page forever. `None` if [`balloon_pages_per_guest_page`] returns `None`, or on
/// overflow.
pub const fn round_up_to_guest_pages(pages: u32, guest_page_shift: u32) -> Option<u32> {
    match balloon_pages_per_guest_page(guest_page_shift) {
        Some(unit) => pages.checked_next_multiple_of(unit),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_addresses() {
        assert_eq!(Pfn::from_address(0x1fff), Some(Pfn::new(1)));
        assert_eq!(Pfn::from_address(1 << 44), None);
        assert_eq!(Pfn::new(u32::MAX).address(), 0xfff_ffff_f000);
        let pfn = Pfn::new(0x0102_0304);
        assert_eq!(Pfn::from_le_bytes(pfn.to_le_bytes()), pfn);
        assert_eq!(pfn.to_le_bytes(), [4, 3, 2, 1]);
    }

    #[test]
    fn larger_guest_pages() {
        assert_eq!(balloon_pages_per_guest_page(12), Some(1));
        assert_eq!(balloon_pages_per_guest_page(16), Some(16));
        assert_eq!(balloon_pages_per_guest_page(11), None);
        assert_eq!(balloon_pages_per_guest_page(44), None);
        assert_eq!(round_up_to_guest_pages(1, 16), Some(16));
        assert_eq!(round_up_to_guest_pages(16, 16), Some(16));
        assert_eq!(round_up_to_guest_pages(17, 12), Some(17));
        assert_eq!(round_up_to_guest_pages(u32::MAX, 16), None);
    }
}
