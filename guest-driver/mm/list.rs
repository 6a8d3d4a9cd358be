// SPDX-License-Identifier: GPL-2.0

//! Lists of page blocks.

use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ptr::{self, NonNull};

use kernel::bindings;
use kernel::prelude::*;

use super::PageBlock;
use crate::bindings as helpers;

pub(super) mod sealed {
    use crate::mm::PageBlock;

    /// A block of pages in some role, and the way back to the bare block.
    pub trait Role: Sized {
        /// Drops the role, not the block.
        fn into_block(self) -> PageBlock;

        /// Takes the role up again. Only for a block from [`into_block`](Self::into_block).
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

/// A list of blocks of pages: last in, first out.
///
/// `T` is [`PageBlock`] or one of the types that stand for a block in a certain role. The links lie
/// in the blocks' own `struct page`s, so that putting a block on a list needs no memory and cannot
/// fail, and the list itself can be moved. Blocks of different orders may share a list. Dropping
/// the list drops what is on it.
///
/// # Invariants
///
/// `first` is the head of a chain of `blocks` owned blocks with `pages` pages in all, linked
/// through `page->lru.next`, which is null in the last one, `last`; each is from
/// [`Role::into_block`] of `T`. `first` and `last` are there if there are blocks.
pub struct BlockList<T: Role> {
    first: Option<NonNull<bindings::page>>,
    last: Option<NonNull<bindings::page>>,
    blocks: usize,
    pages: usize,
    role: PhantomData<T>,
}

// SAFETY: The list owns its blocks, and may be sent if they may.
unsafe impl<T: Role + Send> Send for BlockList<T> {}

// SAFETY: Through a shared reference only the counts can be read, and orders and addresses.
unsafe impl<T: Role> Sync for BlockList<T> {}

impl<T: Role> BlockList<T> {
    /// An empty list.
    pub const fn new() -> Self {
        // INVARIANT: No chain, no blocks.
        Self {
            first: None,
            last: None,
            blocks: 0,
            pages: 0,
            role: PhantomData,
        }
    }

    /// How many blocks are on the list.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// How many pages the blocks have together.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Whether there is no block on the list.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// Puts a block on the list.
    pub fn push(&mut self, block: T) {
        let block = block.into_block();
        // INVARIANT: The new head is owned and linked to the old one. The counts cannot overflow:
        // each page is counted once, and there are not `usize::MAX` pages.
        self.blocks += 1;
        self.pages += block.pages();
        let page = block.into_raw();
        let next = self.first.map_or(ptr::null_mut(), NonNull::as_ptr);
        // SAFETY: We own the page, hence its `lru`.
        unsafe { (*helpers::vbrs_page_lru(page.as_ptr())).next = next.cast() };
        self.first = Some(page);
        self.last = self.last.or(self.first);
    }

    /// Puts all blocks of `other` on the list, in front of those that are there, whatever their
    /// number: takes no time.
    pub fn append(&mut self, other: Self) {
        let other = ManuallyDrop::new(other);
        let Some(last) = other.last else {
            return;
        };
        let next = self.first.map_or(ptr::null_mut(), NonNull::as_ptr);
        // SAFETY: The other list owns the page, and is not used any more.
        unsafe { (*helpers::vbrs_page_lru(last.as_ptr())).next = next.cast() };
        // INVARIANT: One chain is before the other, and both are owned here now.
        self.first = other.first;
        self.last = self.last.or(other.last);
        self.blocks += other.blocks;
        self.pages += other.pages;
    }

    /// Takes the block that was put on last.
    pub fn pop(&mut self) -> Option<T> {
        let page = self.first?;
        // SAFETY: By the invariants we own the page, and the link is ours.
        let next = unsafe { (*helpers::vbrs_page_lru(page.as_ptr())).next };
        // SAFETY: `push` got the page from `into_raw`, and it leaves the chain here.
        let block = unsafe { PageBlock::from_raw(page) };
        // INVARIANT: The rest of the chain is what is left, and the counts follow.
        self.first = NonNull::new(next.cast());
        if self.first.is_none() {
            self.last = None;
        }
        self.blocks -= 1;
        self.pages -= block.pages();
        Some(T::from_block(block))
    }

    /// Takes all blocks, and leaves the list empty.
    #[must_use]
    pub fn take(&mut self) -> Self {
        core::mem::take(self)
    }

    /// Where the blocks on the list lie, the last one first.
    pub fn extents(&self) -> impl Iterator<Item = BlockExtent> + '_ {
        let mut next = self.first;
        core::iter::from_fn(move || {
            let page = next?;
            // SAFETY: The list owns the page, and cannot lose it while it is borrowed.
            let block = ManuallyDrop::new(unsafe { PageBlock::from_raw(page) });
            // SAFETY: As above; the link belongs to the list.
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

/// Where a block lies, and how large it is.
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
