// SPDX-License-Identifier: GPL-2.0

//! Lists of free blocks.

use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ptr::{self, NonNull};

use kernel::bindings;
use kernel::prelude::*;

use super::PageBlock;
use crate::bindings as helpers;

pub(super) mod sealed {
    use crate::mm::PageBlock;

    /// A type that owns a [`PageBlock`] in a certain role.
    pub trait Role: Sized {
        /// Converts the value into its block.
        fn into_block(self) -> PageBlock;

        /// Converts a block from [`into_block`](Self::into_block) back. Must not be used for other
        /// blocks.
        fn from_block(block: PageBlock) -> Self;
    }
}

use sealed::Role;

impl Role for PageBlock {
    fn into_block(self) -> PageBlock {
        self
    }

    fn from_block(block: PageBlock) -> Self {
        block
    }
}

/// A list of free blocks: last in, first out.
///
/// `T` is [`PageBlock`], or a type that owns a `PageBlock` in a certain role. The list links the
/// blocks through their `struct page`s. Therefore adding a block allocates no memory and cannot
/// fail, and the list can be moved. A list may contain blocks of different orders. Dropping the
/// list drops its blocks.
///
/// # Invariants
///
/// - `first` is the first of `blocks` blocks, which have `pages` pages in total. The list owns
///   them.
/// - The blocks are linked through `page->lru.next`, which is null in `last`.
/// - Each block comes from [`Role::into_block`] of `T`.
/// - `first` and `last` are `None` if the list is empty, and `Some` otherwise.
#[doc(alias = "list_head")]
pub struct BlockList<T: Role> {
    first: Option<NonNull<bindings::page>>,
    last: Option<NonNull<bindings::page>>,
    blocks: usize,
    pages: usize,
    role: PhantomData<T>,
}

// SAFETY: The list owns its blocks, and may be sent if they may.
unsafe impl<T: Role + Send> Send for BlockList<T> {}

// SAFETY: A shared reference only gives access to the counts, and to the addresses and orders of
// the blocks, which do not change while it exists.
unsafe impl<T: Role> Sync for BlockList<T> {}

impl<T: Role> BlockList<T> {
    /// Creates an empty list.
    pub const fn new() -> Self {
        // INVARIANT: The list is empty.
        Self {
            first: None,
            last: None,
            blocks: 0,
            pages: 0,
            role: PhantomData,
        }
    }

    /// Returns the number of blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Returns the total number of pages in the blocks.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Returns whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// Adds a block to the front of the list.
    pub fn push(&mut self, block: T) {
        let block = block.into_block();
        // INVARIANT: The list owns the new first block, which is linked to the old one. The counts
        // cannot overflow: each page is counted once, and there are fewer than `usize::MAX` pages.
        self.blocks += 1;
        self.pages += block.pages();
        let page = block.into_raw();
        let next = self.first.map_or(ptr::null_mut(), NonNull::as_ptr);
        // SAFETY: We own the block, and therefore its `lru`.
        unsafe { (*helpers::vbrs_page_lru(page.as_ptr())).next = next.cast() };
        self.first = Some(page);
        self.last = self.last.or(self.first);
    }

    /// Adds all blocks of `other` to the front of the list, in constant time.
    pub fn append(&mut self, other: Self) {
        let other = ManuallyDrop::new(other);
        let Some(last) = other.last else {
            return;
        };
        let next = self.first.map_or(ptr::null_mut(), NonNull::as_ptr);
        // SAFETY: `other` owns its last block, and `other` is not used again.
        unsafe { (*helpers::vbrs_page_lru(last.as_ptr())).next = next.cast() };
        // INVARIANT: The blocks of `other` are linked to those of `self`, and `self` owns all of
        // them.
        self.first = other.first;
        self.last = self.last.or(other.last);
        self.blocks += other.blocks;
        self.pages += other.pages;
    }

    /// Removes the first block, which is the one added last, and returns it.
    pub fn pop(&mut self) -> Option<T> {
        let page = self.first?;
        // SAFETY: By the type invariants, we own the page, and its `lru` links the list.
        let next = unsafe { (*helpers::vbrs_page_lru(page.as_ptr())).next };
        // SAFETY: `push` got the page from `into_raw`, and the page leaves the list here.
        let block = unsafe { PageBlock::from_raw(page) };
        // INVARIANT: `first` is the next block of the list, and the counts are those of the
        // remaining blocks.
        self.first = NonNull::new(next.cast());
        if self.first.is_none() {
            self.last = None;
        }
        self.blocks -= 1;
        self.pages -= block.pages();
        Some(T::from_block(block))
    }

    /// Removes all blocks and returns them as a list.
    #[must_use]
    pub fn take(&mut self) -> Self {
        core::mem::take(self)
    }

    /// Returns the addresses and orders of the blocks, from the first to the last.
    pub fn extents(&self) -> impl Iterator<Item = BlockExtent> + '_ {
        let mut next = self.first;
        core::iter::from_fn(move || {
            let page = next?;
            // SAFETY: The list owns the page, and keeps it while the list is borrowed.
            // `ManuallyDrop` does not drop the block, so the list remains its owner.
            let block = ManuallyDrop::new(unsafe { PageBlock::from_raw(page) });
            // SAFETY: The list owns the page, and therefore its `lru`.
            let link = unsafe { (*helpers::vbrs_page_lru(page.as_ptr())).next };
            next = NonNull::new(link.cast());
            Some(BlockExtent {
                address: block.address(),
                order: block.order(),
            })
        })
    }
}

impl<T: Role> Default for BlockList<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Role> Drop for BlockList<T> {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

/// The address and the order of a free block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockExtent {
    /// The physical address of the first byte.
    pub address: u64,
    /// The block has `2^order` pages.
    pub order: u32,
}

#[kunit_tests(virtio_balloon_rs_mm_list)]
mod tests {
    use super::*;

    fn three_blocks() -> (BlockList<PageBlock>, [u64; 3]) {
        let mut list = BlockList::new();
        let mut addresses = [0; 3];
        for (order, address) in (0..).zip(&mut addresses) {
            if let Some(block) = PageBlock::try_alloc(order) {
                *address = block.address();
                list.push(block);
            }
        }
        (list, addresses)
    }

    #[test]
    fn blocks_come_off_in_reverse() {
        let (mut list, addresses) = three_blocks();
        assert_eq!((list.len(), list.pages()), (3, 7));
        for (order, address) in addresses.iter().enumerate().rev() {
            let block = list.pop();
            assert_eq!(block.as_ref().map(PageBlock::address), Some(*address));
            assert_eq!(block.as_ref().map(PageBlock::order), Some(order as u32));
        }
        assert!(list.pop().is_none());
        assert_eq!((list.len(), list.pages(), list.is_empty()), (0, 0, true));
    }

    #[test]
    fn one_list_is_put_before_another() {
        let (mut list, first) = three_blocks();
        let (other, second) = three_blocks();
        list.append(BlockList::new());
        list.append(other);
        assert_eq!((list.len(), list.pages()), (6, 14));
        for addresses in [second, first] {
            for address in addresses.iter().rev() {
                let block = list.pop();
                assert_eq!(block.as_ref().map(PageBlock::address), Some(*address));
            }
        }
        assert!(list.pop().is_none());
        let (other, addresses) = three_blocks();
        list.append(other);
        assert_eq!((list.len(), list.pages()), (3, 7));
        assert_eq!(list.pop().map(|block| block.address()), Some(addresses[2]));
    }

    #[test]
    fn taking_moves_all_blocks() {
        let (mut list, addresses) = three_blocks();
        let taken = list.take();
        assert!(list.is_empty());
        assert_eq!((list.pages(), taken.pages()), (0, 7));
        let mut extents = taken.extents();
        for (order, address) in addresses.iter().enumerate().rev() {
            let expected = BlockExtent {
                address: *address,
                order: order as u32,
            };
            assert_eq!(extents.next(), Some(expected));
        }
        assert_eq!(extents.next(), None);
    }
}
