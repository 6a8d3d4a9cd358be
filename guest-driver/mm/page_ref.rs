// SPDX-License-Identifier: GPL-2.0

//! Pages that somebody else has too.

use core::ptr::NonNull;

use kernel::bindings;

use crate::bindings as helpers;

/// A reference to a page that may have other owners: as long as this lives, it is not freed.
///
/// Gives no access to the page's contents, nor to its `struct page`. Dropping it gives the page back
/// to the page allocator if nobody else has a reference; allowed in any context but NMI.
///
/// # Invariants
///
/// We own a reference to the page.
pub struct PageRef(NonNull<bindings::page>);

// SAFETY: References to pages may be dropped by any thread.
unsafe impl Send for PageRef {}

// SAFETY: Through a shared reference only the address can be read.
unsafe impl Sync for PageRef {}

impl PageRef {
    /// Takes a reference.
    ///
    /// # Safety
    ///
    /// `page` must be a page to which the caller, or somebody for the duration of the call, owns a
    /// reference.
    pub(super) unsafe fn get(page: NonNull<bindings::page>) -> Self {
        // SAFETY: By this function's requirement the page is not free.
        unsafe { helpers::vbrs_get_page(page.as_ptr()) };
        // INVARIANT: The reference was just taken.
        Self(page)
    }

    /// Takes a reference to `page`, which then has two owners.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn from_balloon_page(page: &super::BalloonPage) -> Self {
        // SAFETY: The page is borrowed from its owner for the call.
        unsafe { Self::get(page.as_raw()) }
    }

    /// The physical address of the page's first byte.
    pub fn address(&self) -> u64 {
        // SAFETY: By the invariant the page is valid.
        unsafe { helpers::vbrs_page_to_phys(self.0.as_ptr()) as u64 }
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: By the invariant we own a reference, which ends here.
        unsafe { helpers::vbrs_put_page(self.0.as_ptr()) };
    }
}
