// SPDX-License-Identifier: GPL-2.0

//! References to pages that may have other owners.

use core::ptr::NonNull;

use kernel::bindings;

use crate::bindings as helpers;

/// A reference to a page that may have other owners.
///
/// The page is not freed while the reference exists. A `PageRef` gives no access to the content of
/// the page, nor to its `struct page`.
///
/// Dropping the last reference returns the page to the page allocator. Any context but NMI.
///
/// # Invariants
///
/// The `PageRef` owns a reference to the page.
#[doc(alias = "page")]
#[doc(alias = "get_page")]
#[doc(alias = "put_page")]
pub struct PageRef(NonNull<bindings::page>);

// SAFETY: Any thread may drop a reference to a page.
unsafe impl Send for PageRef {}

// SAFETY: A shared reference only gives access to the address.
unsafe impl Sync for PageRef {}

impl PageRef {
    /// Takes a reference to `page`.
    ///
    /// # Safety
    ///
    /// The caller must own a reference to `page`, or another owner must keep one for the duration
    /// of the call.
    pub(super) unsafe fn get(page: NonNull<bindings::page>) -> Self {
        // SAFETY: By the safety requirements of this function, a reference exists, so the page is
        // not free.
        unsafe { helpers::vbrs_get_page(page.as_ptr()) };
        // INVARIANT: `vbrs_get_page()` took the reference.
        Self(page)
    }

    /// Takes a reference to `page`, in addition to the one of its `BalloonPage`.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn from_balloon_page(page: &super::BalloonPage) -> Self {
        // SAFETY: `page` is borrowed, so its owner keeps a reference for the duration of the call.
        unsafe { Self::get(page.as_raw()) }
    }

    /// Returns the physical address of the first byte.
    #[doc(alias = "page_to_phys")]
    #[inline]
    pub fn address(&self) -> u64 {
        // SAFETY: By the type invariant, the page is valid.
        unsafe { helpers::vbrs_page_to_phys(self.0.as_ptr()) as u64 }
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, we own a reference, which is not used again.
        unsafe { helpers::vbrs_put_page(self.0.as_ptr()) };
    }
}
