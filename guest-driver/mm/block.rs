// SPDX-License-Identifier: GPL-2.0

//! Blocks of pages, each with one owner.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::ffi::c_ulong;
use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;

use crate::bindings as helpers;

const ORDER_MASK: c_ulong = 0xff;
const TAG_SHIFT: u32 = 8;

/// A block of `2^order` physically contiguous pages, owned.
///
/// It is one pointer wide: its order, and a small tag for its owner's use, are kept in the block's
/// own `struct page`, so that a block can travel through a virtqueue as a bare token. The memory
/// itself is never touched, except by [`zero`](Self::zero): writing to a hinted page would spoil
/// the hint.
///
/// Dropping a block gives its pages back to the page allocator, as they are. Allowed in any
/// context but NMI.
///
/// # Invariants
///
/// `page` is the first page of a block that the page allocator gave out, or a part of such a block by
/// itself, and nobody else refers to it. The low 8 bits of `page->private` hold the block's order, the
/// next 16 its tag, and `page->lru` is free for the owner's use.
#[repr(transparent)]
pub struct PageBlock {
    page: NonNull<bindings::page>,
}

// SAFETY: The pages belong to the block alone and are not bound to a thread.
unsafe impl Send for PageBlock {}

// SAFETY: Through a shared reference only the order and the address can be read.
unsafe impl Sync for PageBlock {}

impl PageBlock {
    /// The largest order that the page allocator has.
    pub fn max_order() -> u32 {
        // SAFETY: Returns a constant.
        unsafe { helpers::vbrs_max_page_order() }
    }

    /// Takes a block of `2^order` pages that is free now.
    ///
    /// Neither reclaims memory nor dips into the emergency reserves, and prints nothing: `None`
    /// says that there is no free block of this order to be had. Never sleeps.
    pub fn try_alloc(order: u32) -> Option<Self> {
        if order > Self::max_order() {
            return None;
        }
        // SAFETY: The order is one that the allocator has.
        let page = unsafe { helpers::vbrs_alloc_free_block(order) };
        // SAFETY: The allocator gives out pages with one owner, who may use `private` and `lru`.
        NonNull::new(page).map(|page| unsafe { Self::from_page(page, order) })
    }

    /// Becomes the owner of a block.
    ///
    /// # Safety
    ///
    /// `page` must be the first of `2^order` pages that the page allocator gave out as one block, or a
    /// single page that `split_page()` made of one (then the order is 0), and the caller must hold the
    /// only reference to them, which it gives up.
    pub(super) unsafe fn from_page(page: NonNull<bindings::page>, order: u32) -> Self {
        // SAFETY: By this function's requirements the page is the caller's alone.
        unsafe { helpers::vbrs_set_page_private(page.as_ptr(), order as c_ulong) };
        // INVARIANT: As this function requires; the order was just set, and the tag to 0.
        Self { page }
    }

    /// The block's order: it has `2^order` pages.
    pub fn order(&self) -> u32 {
        (self.private() & ORDER_MASK) as u32
    }

    /// What the owner noted on the block; 0 at first.
    pub fn tag(&self) -> u16 {
        (self.private() >> TAG_SHIFT) as u16
    }

    /// Notes something on the block.
    pub fn set_tag(&mut self, tag: u16) {
        let private = self.private() & ORDER_MASK | (tag as c_ulong) << TAG_SHIFT;
        // SAFETY: By the invariants the page is ours. INVARIANT: Order and tag are where they
        // belong.
        unsafe { helpers::vbrs_set_page_private(self.page.as_ptr(), private) };
    }

    fn private(&self) -> c_ulong {
        // SAFETY: By the invariants the page is valid and ours.
        unsafe { helpers::vbrs_page_private(self.page.as_ptr()) }
    }

    /// How many pages the block has.
    pub fn pages(&self) -> usize {
        1 << self.order()
    }

    /// How many bytes the block has.
    pub fn size(&self) -> usize {
        self.pages() << PAGE_SHIFT
    }

    /// The physical address of the block's first byte.
    pub fn address(&self) -> u64 {
        // SAFETY: By the invariants the page is valid.
        unsafe { helpers::vbrs_page_to_phys(self.page.as_ptr()) as u64 }
    }

    /// Fills the block with zeroes.
    pub fn zero(&mut self) {
        // SAFETY: By the invariants the pages are ours alone, and there are `2^order` of them.
        unsafe { helpers::vbrs_zero_pages(self.page.as_ptr(), self.pages()) };
    }

    /// Gives up ownership for a pointer, to be turned back by [`from_raw`](Self::from_raw).
    ///
    /// The pointer is aligned as `struct page` is: to 8 bytes at least.
    pub fn into_raw(self) -> NonNull<bindings::page> {
        ManuallyDrop::new(self).page
    }

    /// Takes back the ownership that [`into_raw`](Self::into_raw) gave up.
    ///
    /// # Safety
    ///
    /// `page` must come from `into_raw`, must not have been turned back since, and its `private`
    /// must be as it was then.
    pub unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: They held when `into_raw` was called, and nobody has touched the page since.
        Self { page }
    }

    /// The first page, which stays the block's.
    pub fn as_raw(&self) -> NonNull<bindings::page> {
        self.page
    }
}

impl Drop for PageBlock {
    fn drop(&mut self) {
        let order = self.order();
        // SAFETY: By the invariants we own the pages, which came from the allocator as one block
        // of this order.
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
            // A buddy is aligned to its own size.
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
            // SAFETY: `raw` is from `into_raw`, just now.
            let block = unsafe { PageBlock::from_raw(raw) };
            assert_eq!((block.address(), block.order()), (address, 2));
            assert_eq!(block.tag(), 0xabcd);
        }
    }
}
