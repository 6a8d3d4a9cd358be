// SPDX-License-Identifier: GPL-2.0

//! Hinted blocks: free blocks whose content the device may change or discard.
//!
//! A [`HintedBlock`] owns a free block from the hint until the device reports DONE. The guest may
//! use the pages earlier, but then their content must be overwritten first, because the device may
//! still change it. Until then the pages have the type `PageOffline`.
//!
//! C header: `include/linux/page-flags.h`.

use core::ffi::c_void;
use core::mem::ManuallyDrop;
use core::ptr::{self, NonNull};

use kernel::bindings;
use kernel::prelude::*;

use super::list::sealed::Role;
use super::{page_alloc, BalloonPage, BlockList, PageBlock};
use crate::bindings as helpers;
use crate::virtio::{Buffer, Segments};

/// A free block that was hinted to the device.
///
/// The device may change or discard the content until it reports DONE:
///
/// - To free the block after DONE, call [`release`](Self::release), which returns the pages to the
///   page allocator without changing their content.
/// - To free the block before DONE, drop it. Drop fills the pages with zeroes before it returns
///   them, so that the next owner does not see content that the device may still change. Where the
///   page allocator overwrites pages itself ([`page_alloc::allocator_fills_pages`]), drop does not
///   fill them.
///
/// The pages have the type `PageOffline` ("logically offline") until they are returned. Crash dump
/// tools skip such pages, hibernation does not save them, and memory offlining may isolate their
/// range.
///
/// # Invariants
///
/// All pages have the type `PageOffline`.
#[doc(alias = "PageOffline")]
pub struct HintedBlock(PageBlock);

impl HintedBlock {
    /// Creates a hinted block and marks its pages as `PageOffline`.
    #[doc(alias = "__SetPageOffline")]
    #[inline]
    pub fn new(block: PageBlock) -> Self {
        // SAFETY: `block` owns this number of pages, and none of them has a type.
        unsafe { helpers::vbrs_set_offline(block.as_raw().as_ptr(), block.pages()) };
        // INVARIANT: `vbrs_set_offline()` gave all pages the type.
        Self(block)
    }

    /// Returns the pages to the page allocator without changing their content.
    #[doc(alias = "__ClearPageOffline")]
    #[doc(alias = "__free_pages")]
    #[inline]
    pub fn release(self) {
        let block = self.into_block();
        // SAFETY: `block` owns this number of pages. By the type invariant, all have the type
        // `PageOffline`.
        unsafe { helpers::vbrs_clear_offline(block.as_raw().as_ptr(), block.pages()) };
    }

    /// Returns the free block.
    pub fn block(&self) -> &PageBlock {
        &self.0
    }

    /// Splits the block into single pages, so that they can be returned in parts.
    #[doc(alias = "split_page")]
    pub fn split(self) -> HintedPages {
        let block = self.into_block();
        let (order, count) = (block.order(), block.pages());
        let first = block.into_raw();
        // SAFETY: `block` had the only reference to the pages, and has this order.
        unsafe { helpers::vbrs_split_block(first.as_ptr(), order) };
        // INVARIANT: `first` is followed by the other `count - 1` pages of the block.
        // `split_page()` made each a block of order 0, and left the page types unchanged.
        HintedPages {
            first,
            count,
            is_zeroed: false,
        }
    }

    /// Sets the tag: see [`PageBlock::set_tag`].
    pub fn set_tag(&mut self, tag: u16) {
        self.0.set_tag(tag);
    }
}

impl Role for HintedBlock {
    fn into_block(self) -> PageBlock {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used again, and `ManuallyDrop` does not drop it.
        unsafe { ptr::read(&this.0) }
    }

    fn from_block(block: PageBlock) -> Self {
        // INVARIANT: `block` comes from `into_block`, which leaves the page types unchanged.
        Self(block)
    }
}

impl Drop for HintedBlock {
    fn drop(&mut self) {
        if !page_alloc::allocator_fills_pages() {
            self.0.zero();
        }
        // SAFETY: The `PageBlock` owns this number of pages. By the type invariant, all have the
        // type `PageOffline`.
        unsafe { helpers::vbrs_clear_offline(self.0.as_raw().as_ptr(), self.0.pages()) };
    }
}

/// Contiguous single pages of a hinted block that was [split](HintedBlock::split).
///
/// Drop fills the pages with zeroes where needed and returns them, as it does for a
/// [`HintedBlock`]. [`release`](Self::release) returns them without changing their content. Not
/// from interrupt context.
///
/// # Invariants
///
/// - `first` and the `count - 1` pages behind it belong to one block from the page allocator.
///   `split_page()` made each of them a block of order 0, and each is freed as one.
/// - All of them have the type `PageOffline`.
/// - The `HintedPages` has the only reference to them.
#[doc(alias = "PageOffline")]
pub struct HintedPages {
    first: NonNull<bindings::page>,
    count: usize,
    /// The pages are filled with zeroes, or need not be.
    is_zeroed: bool,
}

// SAFETY: The `HintedPages` has the only reference to its pages, and they are not bound to a
// thread.
unsafe impl Send for HintedPages {}

impl HintedPages {
    /// Returns the number of pages.
    pub fn pages(&self) -> usize {
        self.count
    }

    /// Splits off the first `count` pages, or all pages if there are fewer.
    #[must_use]
    pub fn take(&mut self, count: usize) -> Self {
        let count = count.min(self.count);
        // INVARIANT: `taken` gets the first `count` pages, and `self` keeps the rest.
        let taken = Self {
            first: self.first,
            count,
            is_zeroed: self.is_zeroed,
        };
        // SAFETY: `count` is at most the number of pages, so the result is a page of the same block
        // or one past its end. The latter is not dereferenced.
        self.first = unsafe { self.first.add(count) };
        self.count -= count;
        taken
    }

    /// Returns `self`, or `None` if there are no pages.
    pub fn into_non_empty(self) -> Option<Self> {
        (self.count > 0).then_some(self)
    }

    /// Fills the pages with zeroes, where that is needed before they are returned.
    #[doc(alias = "clear_highpage")]
    pub fn zero(&mut self) {
        if !self.is_zeroed && !page_alloc::allocator_fills_pages() {
            // SAFETY: By the type invariants, we have the only reference to the pages.
            unsafe { helpers::vbrs_zero_pages(self.first.as_ptr(), self.count) };
        }
        self.is_zeroed = true;
    }

    /// Returns the pages to the page allocator without changing their content.
    #[doc(alias = "__ClearPageOffline")]
    #[doc(alias = "__free_page")]
    #[inline]
    pub fn release(self) {
        ManuallyDrop::new(self).free();
    }

    /// Adds all pages to `list`, without the type `PageOffline`.
    ///
    /// Fills the pages with zeroes where needed, because the balloon frees its pages without
    /// changing their content.
    #[doc(alias = "__ClearPageOffline")]
    pub fn into_balloon_pages(self, list: &mut BlockList<BalloonPage>) {
        let mut this = ManuallyDrop::new(self);
        this.zero();
        // SAFETY: By the type invariants, we have the only reference to the pages, and they have
        // the type `PageOffline`.
        unsafe { helpers::vbrs_clear_offline(this.first.as_ptr(), this.count) };
        for index in 0..this.count {
            // SAFETY: By the type invariants, this is one of `count` blocks of order 0, to which we
            // have the only reference. The page type was cleared above. `this` is neither used
            // again nor dropped, which transfers the reference.
            list.push(unsafe { BalloonPage::from_page(this.first.add(index)) });
        }
    }

    /// Frees the pages. They must not be used afterwards.
    fn free(&mut self) {
        // SAFETY: By the type invariants, we have the only reference to the pages, and they have
        // the type `PageOffline`.
        // INVARIANT: `count` is set to 0 below.
        unsafe {
            helpers::vbrs_clear_offline(self.first.as_ptr(), self.count);
            helpers::vbrs_free_single_pages(self.first.as_ptr(), self.count);
        }
        self.count = 0;
    }
}

impl Drop for HintedPages {
    fn drop(&mut self) {
        self.zero();
        self.free();
    }
}

// SAFETY: The segment is the memory of the pages that the token owns. No code reads or writes them
// until `from_token`. `into_raw` and `from_raw` are inverses. A `struct page` is aligned to at
// least 8 bytes.
unsafe impl Buffer for HintedBlock {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.writable_pages(self.0.as_raw(), self.0.size() as u32);
    }

    fn into_token(self) -> NonNull<c_void> {
        self.into_block().into_raw().cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token comes from `into_raw`, and `private` has not changed since.
        // INVARIANT: The page types have not changed either.
        Self(unsafe { PageBlock::from_raw(token.cast()) })
    }
}

#[kunit_tests(virtio_balloon_rs_mm_hinted_block)]
mod tests {
    use super::*;
    use crate::mm::BlockList;

    const PATTERN: u8 = 0x5a;
    const ORDER: u32 = 2;

    /// Returns the content of a dropped page that the page allocator has not given out again.
    fn dropped() -> u8 {
        if page_alloc::allocator_fills_pages() {
            PATTERN
        } else {
            0
        }
    }

    /// Creates a hinted block that is filled with [`PATTERN`], passes it to `end`, and returns
    /// whether its first page then holds `value`.
    fn first_page_holds(value: u8, end: impl FnOnce(HintedBlock)) -> Result<bool> {
        let block = PageBlock::try_alloc(ORDER).ok_or(ENOMEM)?;
        let page = block.as_raw().as_ptr();
        for index in 0..block.pages() {
            // SAFETY: `block` owns this number of pages.
            unsafe { helpers::vbrs_test_fill_page(page.add(index), PATTERN) };
        }
        // SAFETY: `block` owns the page. The extra reference keeps the page when the block is
        // freed.
        unsafe { helpers::vbrs_test_get_page(page) };
        end(HintedBlock::new(block));
        // SAFETY: We own a reference to the page. It is dropped here and not used again.
        unsafe {
            let holds = helpers::vbrs_test_page_holds(page, value);
            helpers::vbrs_test_put_page(page);
            Ok(holds)
        }
    }

    #[test]
    fn a_block_that_is_dropped_goes_back_full_of_zeroes() -> Result {
        assert!(first_page_holds(dropped(), drop)?);
        Ok(())
    }

    #[test]
    fn a_list_of_blocks_that_is_dropped_is_zeroed_too() -> Result {
        let on_a_list = |block| {
            let mut list = BlockList::new();
            list.push(block);
            drop(list);
        };
        assert!(first_page_holds(dropped(), on_a_list)?);
        Ok(())
    }

    #[test]
    fn a_block_that_is_released_goes_back_as_it_is() -> Result {
        assert!(first_page_holds(PATTERN, HintedBlock::release)?);
        Ok(())
    }

    #[test]
    fn pages_that_were_cleared_ahead_go_back_so() -> Result {
        let cleared = |block: HintedBlock| {
            let mut rest = block.split();
            rest.zero();
            drop(rest.take(1));
            assert!(rest.take(usize::MAX).into_non_empty().is_some());
            assert!(rest.into_non_empty().is_none());
        };
        assert!(first_page_holds(dropped(), cleared)?);
        Ok(())
    }

    #[test]
    fn a_split_block_is_freed_in_parts() -> Result {
        let in_parts = |block: HintedBlock| {
            let mut rest = block.split();
            let part = rest.take(1);
            assert_eq!((part.pages(), rest.pages()), (1, (1 << ORDER) - 1));
            drop(part);
            let all = rest.take(usize::MAX);
            assert_eq!((all.pages(), rest.pages()), ((1 << ORDER) - 1, 0));
            all.release();
        };
        assert!(first_page_holds(dropped(), in_parts)?);
        let as_it_is = |block: HintedBlock| block.split().release();
        assert!(first_page_holds(PATTERN, as_it_is)?);
        Ok(())
    }

    #[test]
    fn pages_for_a_balloon_are_full_of_zeroes() -> Result {
        let inflated = |block: HintedBlock| {
            let mut pages = BlockList::new();
            block.split().into_balloon_pages(&mut pages);
            drop(pages);
        };
        assert!(first_page_holds(dropped(), inflated)?);
        Ok(())
    }

    /// Returns the number of pages that have the type `PageOffline`.
    fn marked(block: &PageBlock) -> usize {
        let page = block.as_raw().as_ptr();
        let marked = |index: &usize| {
            // SAFETY: `block` owns this number of pages.
            unsafe { helpers::vbrs_test_page_is_offline(page.add(*index)) }
        };
        (0..block.pages()).filter(marked).count()
    }

    #[test]
    fn a_block_is_marked_as_offline_until_it_goes_back() -> Result {
        let block = PageBlock::try_alloc(ORDER).ok_or(ENOMEM)?;
        let first = block.as_raw().as_ptr();
        assert_eq!(marked(&block), 0);
        let mut list = BlockList::new();
        list.push(HintedBlock::new(block));
        let block = list.pop().ok_or(ENOENT)?;
        assert_eq!(marked(block.block()), 1 << ORDER);

        let mut rest = block.split();
        let mut pages = BlockList::new();
        rest.take(1).into_balloon_pages(&mut pages);
        // SAFETY: `rest` and `pages` own the pages of the block.
        unsafe {
            assert!(!helpers::vbrs_test_page_is_offline(first));
            assert!(helpers::vbrs_test_page_is_offline(first.add(1)));
        }
        rest.into_balloon_pages(&mut pages);
        assert_eq!((pages.len(), pages.pages()), (1 << ORDER, 1 << ORDER));
        for index in 0..1 << ORDER {
            // SAFETY: `pages` owns all pages of the block.
            assert!(!unsafe { helpers::vbrs_test_page_is_offline(first.add(index)) });
        }
        Ok(())
    }

    #[test]
    fn all_pages_of_a_block_are_zeroed() -> Result {
        let mut block = PageBlock::try_alloc(ORDER).ok_or(ENOMEM)?;
        let page = block.as_raw().as_ptr();
        for index in 0..block.pages() {
            // SAFETY: `block` owns this number of pages.
            unsafe { helpers::vbrs_test_fill_page(page.add(index), PATTERN) };
        }
        block.zero();
        for index in 0..block.pages() {
            // SAFETY: `block` owns this number of pages.
            assert!(unsafe { helpers::vbrs_test_page_holds(page.add(index), 0) });
        }
        Ok(())
    }
}
