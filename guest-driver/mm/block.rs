// SPDX-License-Identifier: GPL-2.0

//! Free blocks: runs of `2^order` pages from the page allocator.
//!
//! C header: `include/linux/gfp.h`.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use kernel::bindings::{self, gfp_t};
use kernel::ffi::c_ulong;
use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;

use crate::bindings as helpers;

const ORDER_MASK: c_ulong = 0xff;
const TAG_SHIFT: u32 = 8;

/// Flags of an allocation that only takes free pages: no reclaim, no emergency reserves, no
/// warning.
pub(super) const GFP_NO_RECLAIM: gfp_t =
    helpers::VBRS_GFP_NORETRY | helpers::VBRS_GFP_NOWARN | helpers::VBRS_GFP_NOMEMALLOC;

const _: () = assert!(GFP_NO_RECLAIM & helpers::VBRS_GFP_RECLAIM == 0);

/// A free block: `2^order` physically contiguous pages with one owner.
///
/// The type is one pointer wide. The order and a 16-bit tag of the owner are stored in the first
/// `struct page`, so a free block travels through a virtqueue as a bare token. Only
/// [`zero`](Self::zero) writes to the memory itself: a write to a hinted page would invalidate the
/// hint.
///
/// Dropping a `PageBlock` returns its pages to the page allocator without changing their content.
/// Any context but NMI.
///
/// # Invariants
///
/// - `page` is the first page of a block from the page allocator, or a single page that
///   `split_page()` made of such a block.
/// - The `PageBlock` has the only reference to the pages.
/// - The low 8 bits of `page->private` hold the order, the next 16 bits the tag.
/// - `page->lru` is free for use by the owner.
#[doc(alias = "page")]
#[doc(alias = "__free_pages")]
#[repr(transparent)]
pub struct PageBlock {
    page: NonNull<bindings::page>,
}

// SAFETY: The `PageBlock` has the only reference to its pages, and they are not bound to a thread.
unsafe impl Send for PageBlock {}

// SAFETY: A shared reference only gives access to the order, the tag and the address, which do not
// change while it exists.
unsafe impl Sync for PageBlock {}

impl PageBlock {
    /// Returns the largest order of the page allocator (`MAX_PAGE_ORDER`).
    #[doc(alias = "MAX_PAGE_ORDER")]
    #[inline]
    pub const fn max_order() -> u32 {
        bindings::MAX_PAGE_ORDER
    }

    /// Allocates a free block of `2^order` pages, if one is available now.
    ///
    /// Does not reclaim memory, does not use the emergency reserves, and logs no warning. Returns
    /// `None` if no free block of this order is available. Does not sleep.
    #[doc(alias = "alloc_pages")]
    pub fn try_alloc(order: u32) -> Option<Self> {
        if order > Self::max_order() {
            return None;
        }
        let gfp = GFP_NO_RECLAIM | helpers::VBRS_GFP_MOVABLE;
        // SAFETY: `order` is at most `MAX_PAGE_ORDER`.
        let page = unsafe { helpers::vbrs_alloc_pages(gfp, order) };
        // SAFETY: The allocator returned a block of this order with one owner, who may use
        // `private` and `lru`.
        NonNull::new(page).map(|page| unsafe { Self::from_page(page, order) })
    }

    /// Creates a `PageBlock` from its first page, with tag 0.
    ///
    /// # Safety
    ///
    /// `page` must be the first of `2^order` pages that the page allocator returned as one block,
    /// or a single page that `split_page()` made of a block (then `order` must be 0). The caller
    /// must hold the only reference to the pages, and transfers it to the `PageBlock`.
    pub(super) unsafe fn from_page(page: NonNull<bindings::page>, order: u32) -> Self {
        // SAFETY: By the safety requirements of this function, the caller has the only reference to
        // the page.
        unsafe { helpers::vbrs_set_page_private(page.as_ptr(), order as c_ulong) };
        // INVARIANT: The pages are as the safety requirements say. `private` now holds the order,
        // and 0 as the tag.
        Self { page }
    }

    /// Returns the order: the free block has `2^order` pages.
    #[doc(alias = "page_private")]
    #[inline]
    pub fn order(&self) -> u32 {
        (self.private() & ORDER_MASK) as u32
    }

    /// Returns the tag that the owner has set, initially 0.
    #[doc(alias = "page_private")]
    #[inline]
    pub fn tag(&self) -> u16 {
        (self.private() >> TAG_SHIFT) as u16
    }

    /// Sets the tag.
    #[doc(alias = "set_page_private")]
    #[inline]
    pub fn set_tag(&mut self, tag: u16) {
        let private = self.private() & ORDER_MASK | (tag as c_ulong) << TAG_SHIFT;
        // SAFETY: By the type invariants, we have the only reference to the page.
        // INVARIANT: The order stays in the low 8 bits, and the tag is in the 16 bits above.
        unsafe { helpers::vbrs_set_page_private(self.page.as_ptr(), private) };
    }

    fn private(&self) -> c_ulong {
        // SAFETY: By the type invariants, the page is valid and we have the only reference to it.
        unsafe { helpers::vbrs_page_private(self.page.as_ptr()) }
    }

    /// Returns the number of pages.
    pub fn pages(&self) -> usize {
        1 << self.order()
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.pages() << PAGE_SHIFT
    }

    /// Returns the physical address of the first byte.
    #[doc(alias = "page_to_phys")]
    #[inline]
    pub fn address(&self) -> u64 {
        // SAFETY: By the type invariants, the page is valid.
        unsafe { helpers::vbrs_page_to_phys(self.page.as_ptr()) as u64 }
    }

    /// Fills the pages with zeroes.
    #[doc(alias = "clear_highpage")]
    #[inline]
    pub fn zero(&mut self) {
        // SAFETY: By the type invariants, there are `2^order` pages, and we have the only reference
        // to them.
        unsafe { helpers::vbrs_zero_pages(self.page.as_ptr(), self.pages()) };
    }

    /// Converts the `PageBlock` into a pointer to its first page, without freeing the pages.
    ///
    /// The pointer has the alignment of `struct page`, which is at least 8 bytes. Pass it to
    /// [`from_raw`](Self::from_raw) to get the `PageBlock` back.
    pub fn into_raw(self) -> NonNull<bindings::page> {
        ManuallyDrop::new(self).page
    }

    /// Converts a pointer from [`into_raw`](Self::into_raw) back into a `PageBlock`.
    ///
    /// # Safety
    ///
    /// `page` must come from `into_raw`, must not have been converted back since, and
    /// `page->private` must not have changed since.
    pub unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: The invariants held when `into_raw` was called. By the safety requirements,
        // `private` has not changed, and no other `PageBlock` exists for the page.
        Self { page }
    }

    /// Returns the first page. The `PageBlock` keeps the ownership.
    pub fn as_raw(&self) -> NonNull<bindings::page> {
        self.page
    }
}

impl Drop for PageBlock {
    fn drop(&mut self) {
        let order = self.order();
        // SAFETY: By the type invariants, we have the only reference to the pages, and the page
        // allocator returned them as one block of this order.
        unsafe {
            helpers::vbrs_set_page_private(self.page.as_ptr(), 0);
            bindings::__free_pages(self.page.as_ptr(), order);
        }
    }
}

#[kunit_tests(virtio_balloon_rs_mm_block)]
mod tests {
    use super::*;

    #[test]
    fn a_block_knows_its_shape() {
        for order in [0, 3] {
            let Some(block) = PageBlock::try_alloc(order) else {
                continue;
            };
            assert_eq!(block.order(), order);
            assert_eq!(block.pages(), 1 << order);
            assert_eq!(block.size(), 4096 << order);
            // The buddy allocator aligns each block to its size.
            assert_eq!(block.address() % block.size() as u64, 0);
        }
    }

    #[test]
    fn there_is_no_block_above_the_largest_order() {
        assert!(PageBlock::try_alloc(PageBlock::max_order() + 1).is_none());
        assert!(PageBlock::try_alloc(u32::MAX).is_none());
    }

    #[test]
    fn a_raw_block_comes_back_the_same() {
        if let Some(mut block) = PageBlock::try_alloc(2) {
            block.zero();
            block.set_tag(0xabcd);
            let address = block.address();
            let raw = block.into_raw();
            assert_eq!(raw.as_ptr() as usize % 8, 0);
            // SAFETY: `raw` comes from `into_raw` and has not been used since.
            let block = unsafe { PageBlock::from_raw(raw) };
            assert_eq!((block.address(), block.order()), (address, 2));
            assert_eq!(block.tag(), 0xabcd);
        }
    }
}
