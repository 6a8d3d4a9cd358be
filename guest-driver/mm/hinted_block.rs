// SPDX-License-Identifier: GPL-2.0

//! Blocks whose content is not to be relied on.

use core::ffi::c_void;
use core::mem::ManuallyDrop;
use core::ptr::{self, NonNull};

use kernel::bindings;
use kernel::prelude::*;

use super::list::sealed::Role;
use super::{page_alloc, BalloonPage, BlockList, PageBlock};
use crate::bindings as helpers;
use crate::virtio::{Buffer, Segments};

/// A block of free pages that was shown to the device: its content may change or get lost until
/// the device says that it is done with it.
///
/// If it is dropped before that, it is filled with zeroes on its way back to the page allocator, so
/// that nobody meets a content that the device still may replace; unless the allocator sees to that
/// ([`page_alloc::allocator_fills_pages`]). After that, [`release`](Self::release) gives it back as it
/// is.
///
/// Its pages are marked as logically offline (`PageOffline`), until they go back: dump tools leave
/// them out, hibernation does not save them, and memory that goes offline may be isolated
/// although they are in it.
///
/// # Invariants
///
/// All pages of the block have the type `PageOffline`.
pub struct HintedBlock(PageBlock);

impl HintedBlock {
    /// Lends a block.
    pub fn new(block: PageBlock) -> Self {
        // SAFETY: The block is ours, and has so many pages, none of which has a type.
        unsafe { helpers::vbrs_set_offline(block.as_raw().as_ptr(), block.pages()) };
        // INVARIANT: As just done.
        Self(block)
    }

    /// Gives the block back to the page allocator as it is.
    pub fn release(self) {
        let block = self.into_block();
        // SAFETY: The block is ours, and has so many pages; by the invariant they are marked.
        unsafe { helpers::vbrs_clear_offline(block.as_raw().as_ptr(), block.pages()) };
    }

    /// The block, to be looked at.
    pub fn block(&self) -> &PageBlock {
        &self.0
    }

    /// Makes single pages of the block, so that a part of it can go back.
    pub fn split(self) -> HintedPages {
        let block = self.into_block();
        let (order, count) = (block.order(), block.pages());
        let first = block.into_raw();
        // SAFETY: The block was ours alone, and has this order.
        unsafe { helpers::vbrs_split_block(first.as_ptr(), order) };
        // INVARIANT: These are the block's pages, each a block of order 0 now, and marked as they were.
        HintedPages {
            first,
            count,
            is_zeroed: false,
        }
    }

    /// Notes something on the block: see [`PageBlock::set_tag`].
    pub fn set_tag(&mut self, tag: u16) {
        self.0.set_tag(tag);
    }
}

impl Role for HintedBlock {
    fn into_block(self) -> PageBlock {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is neither used nor dropped any more.
        unsafe { ptr::read(&this.0) }
    }

    fn from_block(block: PageBlock) -> Self {
        // INVARIANT: The marks are those of the block from `into_block`.
        Self(block)
    }
}

impl Drop for HintedBlock {
    fn drop(&mut self) {
        if !page_alloc::allocator_fills_pages() {
            self.0.zero();
        }
        // SAFETY: The block is ours, and has so many pages; by the invariant they are marked.
        unsafe { helpers::vbrs_clear_offline(self.0.as_raw().as_ptr(), self.0.pages()) };
    }
}

/// What is left of a [`HintedBlock`] that was [opened](HintedBlock::split): neighbouring pages.
///
/// Dropping it fills them with zeroes where that is needed, and gives them back, as with a block; so
/// does [`release`](Self::release) without the zeroes. Any context that is not an interrupt.
///
/// # Invariants
///
/// `first` and the `count - 1` pages behind it are pages of one block that the page allocator gave
/// out and `split_page` split: each is a block of order 0 now, as if given out so, and is
/// freed so. They have the type `PageOffline`, and nobody else refers to them.
pub struct HintedPages {
    first: NonNull<bindings::page>,
    count: usize,
    /// They hold nothing but zeroes, or need not.
    is_zeroed: bool,
}

// SAFETY: The pages belong to the value alone and are not bound to a thread.
unsafe impl Send for HintedPages {}

impl HintedPages {
    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.count
    }

    /// Takes the first `count` pages, or all if there are fewer.
    #[must_use]
    pub fn take(&mut self, count: usize) -> Self {
        let count = count.min(self.count);
        // INVARIANT: What is taken and what is left share no page.
        let taken = Self {
            first: self.first,
            count,
            is_zeroed: self.is_zeroed,
        };
        // SAFETY: There are so many pages, all within what was one block, or this is just behind
        // the last one, and never used.
        self.first = unsafe { self.first.add(count) };
        self.count -= count;
        taken
    }

    /// These pages, if there are any.
    pub fn into_non_empty(self) -> Option<Self> {
        (self.count > 0).then_some(self)
    }

    /// Fills the pages with zeroes, where that is needed before they go back.
    pub fn zero(&mut self) {
        if !self.is_zeroed && !page_alloc::allocator_fills_pages() {
            // SAFETY: By the invariants the pages are ours alone.
            unsafe { helpers::vbrs_zero_pages(self.first.as_ptr(), self.count) };
        }
        self.is_zeroed = true;
    }

    /// Gives the pages back to the page allocator as they are.
    pub fn release(self) {
        ManuallyDrop::new(self).free();
    }

    /// Puts all pages on `list`, without a mark. They are filled with zeroes first where that is
    /// needed before they go back: the balloon frees its pages as they are.
    pub fn into_balloon_pages(self, list: &mut BlockList<BalloonPage>) {
        let mut this = ManuallyDrop::new(self);
        this.zero();
        // SAFETY: By the invariants these are marked pages of ours.
        unsafe { helpers::vbrs_clear_offline(this.first.as_ptr(), this.count) };
        for index in 0..this.count {
            // SAFETY: By the invariants this is one of `count` pages that are blocks of order 0,
            // each with a reference of its own, which is ours alone. The mark is gone. `this` is
            // neither used any more nor dropped, which gives the reference up.
            list.push(unsafe { BalloonPage::from_page(this.first.add(index)) });
        }
    }

    /// Frees the pages, which must not be used any more.
    fn free(&mut self) {
        // SAFETY: By the invariants the pages are ours alone, and marked. INVARIANT: None is left.
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

// SAFETY: The memory is the block's pages, which the token owns; they are not read or written
// before the block comes back. A `struct page` is aligned to 8 bytes at least.
unsafe impl Buffer for HintedBlock {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.writable_pages(self.0.as_raw(), self.0.size() as u32);
    }

    fn into_token(self) -> NonNull<c_void> {
        self.into_block().into_raw().cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token is from `into_raw`, and `private` was left alone since. INVARIANT: So
        // were the marks.
        Self(unsafe { PageBlock::from_raw(token.cast()) })
    }
}

#[kunit_tests(virtio_balloon_rs_mm_hinted_block)]
mod tests {
    use super::*;
    use crate::mm::BlockList;

    const PATTERN: u8 = 0x5a;
    const ORDER: u32 = 2;

    /// What a page of a block that was dropped holds, while nobody has got it from the allocator.
    fn dropped() -> u8 {
        if page_alloc::allocator_fills_pages() {
            PATTERN
        } else {
            0
        }
    }

    /// Lends a block that is full of [`PATTERN`], lets `end` do away with it, and returns whether
    /// its first page holds `value` then.
    fn first_page_holds(value: u8, end: impl FnOnce(HintedBlock)) -> Result<bool> {
        let block = PageBlock::try_alloc(ORDER).ok_or(ENOMEM)?;
        let page = block.as_raw().as_ptr();
        for index in 0..block.pages() {
            // SAFETY: The block is ours, and has so many pages.
            unsafe { helpers::vbrs_test_fill_page(page.add(index), PATTERN) };
        }
        // SAFETY: The page is ours; with the reference it remains when the block is freed.
        unsafe { helpers::vbrs_test_get_page(page) };
        end(HintedBlock::new(block));
        // SAFETY: Nobody has the page but we, by the reference, which ends here.
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

    /// How many of the first pages of a block have the type `PageOffline`.
    fn marked(block: &PageBlock) -> usize {
        let page = block.as_raw().as_ptr();
        let marked = |index: &usize| {
            // SAFETY: The block is ours, and has so many pages.
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
        // SAFETY: The block's pages are ours.
        unsafe {
            assert!(!helpers::vbrs_test_page_is_offline(first));
            assert!(helpers::vbrs_test_page_is_offline(first.add(1)));
        }
        rest.into_balloon_pages(&mut pages);
        assert_eq!((pages.len(), pages.pages()), (1 << ORDER, 1 << ORDER));
        for index in 0..1 << ORDER {
            // SAFETY: The block's pages are ours.
            assert!(!unsafe { helpers::vbrs_test_page_is_offline(first.add(index)) });
        }
        Ok(())
    }

    #[test]
    fn all_pages_of_a_block_are_zeroed() -> Result {
        let mut block = PageBlock::try_alloc(ORDER).ok_or(ENOMEM)?;
        let page = block.as_raw().as_ptr();
        for index in 0..block.pages() {
            // SAFETY: The block is ours, and has so many pages.
            unsafe { helpers::vbrs_test_fill_page(page.add(index), PATTERN) };
        }
        block.zero();
        for index in 0..block.pages() {
            // SAFETY: As above.
            assert!(unsafe { helpers::vbrs_test_page_holds(page.add(index), 0) });
        }
        Ok(())
    }
}
