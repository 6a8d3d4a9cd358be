// SPDX-License-Identifier: GPL-2.0

//! The hinted blocks that have come back from the device, and are held until it is done with them.

use kernel::prelude::*;
use kernel::sync::{new_spinlock, Arc, SpinLock};

use super::counters::Counters;
use crate::mm::{BalloonPage, BlockList, LentBlock, LentPages, Shrink};
use crate::virtio::work::give_way;

/// Hinted blocks that are neither with the device nor the guest's yet.
///
/// The guest may take blocks back when it is short of memory: this is a [`Shrink`]. Only blocks
/// that the device has returned are in here, so that holds for those too.
///
/// All methods but [`release`](Self::release) are short, and callable from any context that is not
/// an interrupt. Dropping it gives all blocks back, filled with zeroes.
#[pin_data]
pub(crate) struct Held {
    #[pin]
    blocks: SpinLock<Blocks>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Blocks {
    /// Offered in the current round, or the last.
    offered: BlockList<LentBlock>,
    /// To be offered again.
    again: BlockList<LentBlock>,
    /// What is left of a block of which the guest has taken a part back. It is not offered again.
    opened: Option<LentPages>,
    /// How many pages the guest took back lately because it was short of memory.
    claimed: usize,
}

impl Blocks {
    /// Takes a block.
    fn pop(&mut self) -> Option<LentBlock> {
        self.offered.pop().or_else(|| self.again.pop())
    }

    /// Takes up to `max` pages of one block, and leaves it opened; `None` if there is no block.
    fn take_part(&mut self, max: usize) -> Option<LentPages> {
        let mut opened = match self.opened.take() {
            Some(pages) => pages,
            None => self.pop()?.open(),
        };
        let part = opened.take(max);
        if opened.pages() > 0 {
            self.opened = Some(opened);
        }
        Some(part)
    }
}

impl Held {
    /// Holds nothing.
    pub(crate) fn new(counters: Arc<Counters>) -> impl PinInit<Self> {
        pin_init!(Self {
            blocks <- new_spinlock!(Blocks::default(), "Held::blocks"),
            counters,
        })
    }

    /// Holds a block that was offered in the current round.
    pub(crate) fn hold(&self, block: LentBlock) {
        self.blocks.lock().offered.push(block);
    }

    /// Holds a block that is to be offered again.
    pub(crate) fn hold_again(&self, block: LentBlock) {
        self.blocks.lock().again.push(block);
    }

    /// A new round: half of what the guest has claimed is forgotten.
    pub(crate) fn forget_claims(&self) {
        self.blocks.lock().claimed /= 2;
    }

    /// How many pages the guest took back lately, for its processes: they are not to be hinted.
    pub(crate) fn claimed(&self) -> usize {
        self.blocks.lock().claimed
    }

    /// All blocks that are held shall be offered again.
    pub(crate) fn offer_all_again(&self) {
        let mut blocks = self.blocks.lock();
        let mut earlier = blocks.again.take();
        blocks.again = blocks.offered.take();
        while let Some(block) = earlier.pop() {
            blocks.again.push(block);
        }
    }

    /// Takes a block that is to be offered again.
    pub(crate) fn next_again(&self) -> Option<LentBlock> {
        self.blocks.lock().again.pop()
    }

    /// The device is done with all blocks: gives them back to the guest as they are. May sleep.
    pub(crate) fn release(&self) {
        let mut blocks = self.blocks.lock();
        let lists = [blocks.offered.take(), blocks.again.take()];
        let opened = blocks.opened.take();
        drop(blocks);
        if let Some(pages) = opened {
            pages.release();
        }
        for mut list in lists {
            while let Some(block) = list.pop() {
                block.release();
                give_way();
            }
        }
    }

    /// Gives all blocks back to the guest, filled with zeroes. May sleep, and take long.
    pub(crate) fn give_up(&self) {
        while self.give_back_some(usize::MAX).is_some() {
            give_way();
        }
    }

    /// Takes up to `pages` single pages for the balloon: fewer, or none, if no more are held.
    ///
    /// They are free memory that nobody uses, and that the guest need not look for, nor clear: what
    /// is in a balloon has no content. The device has returned their blocks, so its promise that it
    /// has seen the hint holds for them. They do not count as [claimed](Self::claimed).
    pub(crate) fn take_for_balloon(&self, pages: usize) -> BlockList<BalloonPage> {
        let mut taken = BlockList::new();
        let mut blocks = self.blocks.lock();
        while taken.pages() < pages {
            let Some(part) = blocks.take_part(pages - taken.pages()) else {
                break;
            };
            part.into_balloon_pages(&mut taken);
        }
        drop(blocks);
        self.counters.hinted_pages_inflated.add(taken.pages() as u64);
        taken
    }

    /// Gives one block back, filled with zeroes, or a part of one if it has more than `max` pages.
    /// Returns how many pages that were.
    ///
    /// Zeroes take time, and the guest wants its memory now: so it gets no more than it asks for.
    fn give_back_some(&self, max: usize) -> Option<usize> {
        let mut blocks = self.blocks.lock();
        if blocks.opened.is_none() {
            let block = blocks.pop()?;
            if block.block().pages() <= max {
                drop(blocks);
                return Some(self.give_back(block));
            }
            blocks.opened = Some(block.open());
        }
        let part = blocks.take_part(max)?;
        drop(blocks);
        let pages = part.pages();
        self.count_zeroed(pages);
        drop(part);
        Some(pages)
    }

    /// Gives `block` back, filled with zeroes, and returns how many pages it has.
    pub(crate) fn give_back(&self, block: LentBlock) -> usize {
        let pages = block.block().pages();
        self.count_zeroed(pages);
        drop(block);
        pages
    }

    fn count_zeroed(&self, pages: usize) {
        self.counters.zeroed_blocks.add(1);
        self.counters.zeroed_pages.add(pages as u64);
    }
}

impl Shrink for Held {
    fn count(&self) -> usize {
        let blocks = self.blocks.lock();
        let opened = blocks.opened.as_ref().map_or(0, LentPages::pages);
        blocks.offered.pages() + blocks.again.pages() + opened
    }

    fn scan(&self, pages: usize) -> Option<usize> {
        let mut freed = 0;
        while freed < pages {
            match self.give_back_some(pages - freed) {
                Some(pages) => {
                    freed += pages;
                    self.counters.returned(pages as u64);
                    let mut blocks = self.blocks.lock();
                    blocks.claimed = blocks.claimed.saturating_add(pages);
                }
                None if freed == 0 => return None,
                None => break,
            }
        }
        Some(freed)
    }
}

#[kunit_tests(virtio_balloon_rs_held)]
mod tests {
    use super::*;
    use crate::mm::PageBlock;

    /// Holds two blocks of eight pages.
    fn held() -> Result<(Arc<Held>, Arc<Counters>)> {
        let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
        let held = Arc::pin_init(Held::new(counters.clone()), GFP_KERNEL)?;
        for _ in 0..2 {
            held.hold(LentBlock::new(PageBlock::take_free(3).ok_or(ENOMEM)?));
        }
        Ok((held, counters))
    }

    #[test]
    fn the_guest_gets_back_what_it_asks_for_and_no_more() -> Result {
        let (held, counters) = held()?;
        assert_eq!(held.count(), 16);
        assert_eq!(held.scan(3), Some(3));
        assert_eq!(held.count(), 13);
        // The rest of the opened block, and a part of the other.
        assert_eq!(held.scan(6), Some(6));
        assert_eq!(held.count(), 7);
        assert_eq!(held.scan(100), Some(7));
        assert_eq!(held.scan(1), None);
        assert_eq!(counters.returned_pages.get(), 16);
        assert_eq!(counters.zeroed_pages.get(), 16);
        Ok(())
    }

    #[test]
    fn the_balloon_gets_single_pages_of_what_is_held() -> Result {
        let (held, counters) = held()?;
        let first = held.take_for_balloon(3);
        assert_eq!((first.len(), first.pages(), held.count()), (3, 3, 13));
        // The rest of the opened block, and a part of the other.
        let second = held.take_for_balloon(6);
        assert_eq!((second.len(), second.pages(), held.count()), (6, 6, 7));
        // The guest may have what the balloon left, and the balloon what is left then.
        assert_eq!(held.scan(1), Some(1));
        let mut third = held.take_for_balloon(100);
        assert_eq!((third.len(), third.pages(), held.count()), (6, 6, 0));
        assert!(held.take_for_balloon(1).is_empty());
        let mut last = u64::MAX;
        while let Some(page) = third.pop() {
            assert!(page.address() % 4096 == 0 && page.address() != last);
            last = page.address();
        }
        assert_eq!(counters.hinted_pages_inflated.get(), 15);
        assert_eq!(held.claimed(), 1);
        assert_eq!(counters.zeroed_pages.get(), 1);
        Ok(())
    }

    #[test]
    fn what_the_guest_claimed_is_forgotten_by_and_by() -> Result {
        let (held, _) = held()?;
        assert_eq!(held.claimed(), 0);
        held.scan(9);
        assert_eq!(held.claimed(), 9);
        held.forget_claims();
        assert_eq!(held.claimed(), 4);
        held.scan(2);
        assert_eq!(held.claimed(), 6);
        Ok(())
    }

    #[test]
    fn what_is_left_of_an_opened_block_is_released_too() -> Result {
        let (held, counters) = held()?;
        held.scan(1);
        held.offer_all_again();
        assert!(held.next_again().is_some());
        assert!(held.next_again().is_none());
        assert_eq!(held.count(), 7);
        held.release();
        assert_eq!(held.count(), 0);
        assert_eq!(counters.zeroed_pages.get(), 1);
        Ok(())
    }
}
