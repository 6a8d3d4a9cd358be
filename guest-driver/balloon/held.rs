// SPDX-License-Identifier: GPL-2.0

//! The hinted blocks that have come back from the device, and are held until it is done with them.

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_mutex, new_spinlock, Arc, Mutex, SpinLock};

use super::counters::Counters;
use crate::mm::{state, BalloonPage, BlockList, LentBlock, LentPages, Shrink};
use crate::virtio::work::{self, give_way, impl_has_task, new_task, Run, Task, WorkQueue};

/// How many pages are kept cleared once the guest has begun to take pages back.
const CLEARED_AHEAD: usize = 1024;

const CLEAR: u64 = 1;

/// Hinted blocks that are neither with the device nor the guest's yet.
///
/// The guest may take blocks back when it is short of memory: this is a [`Shrink`]. Only blocks
/// that the device has returned are in here, so that holds for those too.
///
/// Before the device is done with a block, who gets its pages must not meet what is in them. Where
/// the page allocator fills pages anyway, nothing more is done. Elsewhere they are filled with
/// zeroes, and once the guest has begun to take some a work item does so ahead of it.
///
/// All methods are short, and callable from any context that is not an interrupt, unless they say
/// otherwise. Dropping it gives all blocks back, without their content.
#[pin_data]
pub(crate) struct Held {
    #[pin]
    blocks: SpinLock<Blocks>,
    counters: Arc<Counters>,
    /// How many pages went back to the guest, ever; those that went into the balloon are not among them.
    given_back: Atomic<usize>,
    #[pin]
    clear: Task<Self, CLEAR>,
    /// Held while pages are on their way to being [`cleared`](Blocks::cleared).
    #[pin]
    clearing: Mutex<()>,
}

#[derive(Default)]
struct Blocks {
    /// Offered in the current round, or the last.
    offered: BlockList<LentBlock>,
    /// To be offered again.
    again: BlockList<LentBlock>,
    /// What the device is done with: goes back to the guest as it is.
    done: BlockList<LentBlock>,
    /// What is left of a block of which the guest has taken a part back. It is not offered again.
    opened: Option<LentPages>,
    /// Pages that are cleared already. They are not offered again.
    cleared: Option<LentPages>,
    /// How many pages the guest took back lately because it was short of memory.
    claimed: usize,
}

impl_has_task! {
    impl HasTask<1> for Held { self.clear }
}

impl Blocks {
    /// Takes a block.
    fn pop(&mut self) -> Option<LentBlock> {
        self.offered.pop().or_else(|| self.again.pop())
    }

    /// Takes up to `max` pages of one block, and leaves it opened; `None` if there is no block.
    fn take_part(&mut self, max: usize) -> Option<LentPages> {
        let opened = self.opened.take();
        let mut opened = opened.or_else(|| self.pop().map(LentBlock::open))?;
        let part = opened.take(max);
        self.opened = opened.unless_empty();
        Some(part)
    }

    /// Takes up to `max` pages that are cleared already.
    fn take_cleared(&mut self, max: usize) -> Option<LentPages> {
        let mut cleared = self.cleared.take()?;
        let part = cleared.take(max);
        self.cleared = cleared.unless_empty();
        Some(part)
    }
}

impl Held {
    /// Holds nothing. Its work will be done by `work_queue`.
    pub(crate) fn new(counters: Arc<Counters>, work_queue: WorkQueue) -> impl PinInit<Self> {
        pin_init!(Self {
            blocks <- new_spinlock!(Blocks::default(), "Held::blocks"),
            counters,
            given_back: Atomic::new(0),
            clear <- new_task!(work_queue, "Held::clear"),
            clearing <- new_mutex!((), "Held::clearing"),
        })
    }

    /// Ends all work for good. May sleep.
    pub(crate) fn disable(self: &Arc<Self>) {
        work::disable::<Self, CLEAR>(self);
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
        let offered = blocks.offered.take();
        blocks.again.append(offered);
    }

    /// Takes a block that is to be offered again.
    pub(crate) fn next_again(&self) -> Option<LentBlock> {
        self.blocks.lock().again.pop()
    }

    /// The device is done with all blocks: they go back to the guest as they are, by
    /// [`release_one`](Self::release_one). May sleep.
    pub(crate) fn release(&self) {
        let _clearing = self.clearing.lock();
        let mut blocks = self.blocks.lock();
        let lists = [blocks.offered.take(), blocks.again.take()];
        for list in lists {
            blocks.done.append(list);
        }
        let parts = [blocks.opened.take(), blocks.cleared.take()];
        drop(blocks);
        for part in parts.into_iter().flatten() {
            let pages = part.pages();
            part.release();
            self.given_back.fetch_add(pages, Relaxed);
        }
    }

    /// Gives a block back that the device is done with. Returns whether there was one.
    pub(crate) fn release_one(&self) -> bool {
        self.release_done().is_some()
    }

    fn release_done(&self) -> Option<usize> {
        let block = self.blocks.lock().done.pop()?;
        Some(self.release_block(block))
    }

    /// Gives a block back as it is, which the device is done with, and returns how many pages it has.
    pub(crate) fn release_block(&self, block: LentBlock) -> usize {
        let pages = block.block().pages();
        block.release();
        self.given_back.fetch_add(pages, Relaxed);
        pages
    }

    /// How many pages went back to the guest so far. Wraps.
    pub(crate) fn given_back(&self) -> usize {
        self.given_back.load(Relaxed)
    }

    /// Returns all blocks to the page allocator, without their content. May sleep, and take long.
    ///
    /// Takes `clearing` for one block at a time.
    pub(crate) fn give_up(&self) {
        loop {
            // Not held across iterations: another task may wait for it while it holds the hint round's lock.
            let clearing = self.clearing.lock();
            if !self.release_one() && self.give_back_some(usize::MAX).is_none() {
                break;
            }
            drop(clearing);
            give_way();
        }
    }

    /// Gives all blocks back to the guest, without their content, that lie at these physical
    /// addresses or reach into them.
    ///
    /// May sleep, and take long. Nobody must [release](Self::release) meanwhile.
    pub(crate) fn give_back_within(&self, range: &Range<u64>) {
        let _clearing = self.clearing.lock();
        let mut blocks = self.blocks.lock();
        let lists = [
            (blocks.offered.take(), Self::hold as fn(&Self, LentBlock)),
            (blocks.again.take(), Self::hold_again),
            (blocks.done.take(), |held, block| {
                held.blocks.lock().done.push(block);
            }),
        ];
        let mut parts = [blocks.opened.take(), blocks.cleared.take()];
        drop(blocks);
        for (mut list, hold) in lists {
            while let Some(block) = list.pop() {
                let shape = block.block();
                let (start, end) = (shape.address(), shape.address() + shape.size() as u64);
                if start < range.end && end > range.start {
                    self.give_back(block);
                } else {
                    hold(self, block);
                }
                give_way();
            }
        }
        for part in parts.iter_mut().filter_map(Option::take) {
            self.give_back_part(part);
        }
    }

    /// Takes up to `pages` single pages for the balloon: fewer, or none, if no more are held.
    ///
    /// The pages are free memory that nobody uses, and that the guest need not look for. The device
    /// has returned their blocks, so its promise that it has seen the hint holds for them. They do
    /// not count as [claimed](Self::claimed).
    ///
    /// The balloon may give a page to the guest before the device is done with its block: if the
    /// request is dropped unsent, or the balloon is deflated. Therefore the pages go into the
    /// balloon without their content. May sleep, and take long.
    pub(crate) fn take_for_balloon(&self, pages: usize) -> BlockList<BalloonPage> {
        let mut taken = BlockList::new();
        while taken.pages() < pages {
            let part = self.blocks.lock().take_part(pages - taken.pages());
            let Some(part) = part else {
                break;
            };
            if !state::allocator_fills_pages() {
                self.count_zeroed(part.pages());
            }
            part.into_balloon_pages(&mut taken);
            give_way();
        }
        self.counters
            .hinted_pages_inflated
            .add(taken.pages() as u64);
        taken
    }

    /// Gives one block back, without its content, or a part of one if it has more than `max` pages.
    /// Returns how many pages that were.
    ///
    /// The guest wants its memory now: where pages have to be cleared, it gets no more than it asks
    /// for. Elsewhere it gets whole blocks, so that it need not ask again soon.
    fn give_back_some(&self, max: usize) -> Option<usize> {
        let mut blocks = self.blocks.lock();
        let part = match blocks.take_cleared(max) {
            Some(part) => part,
            None => {
                if blocks.opened.is_none() {
                    let block = blocks.pop()?;
                    if block.block().pages() <= max || state::allocator_fills_pages() {
                        drop(blocks);
                        return Some(self.give_back(block));
                    }
                    blocks.opened = Some(block.open());
                }
                blocks.take_part(max)?
            }
        };
        drop(blocks);
        Some(self.give_back_part(part))
    }

    /// Gives `block` back, without its content, and returns how many pages it has.
    fn give_back(&self, block: LentBlock) -> usize {
        let pages = block.block().pages();
        if !state::allocator_fills_pages() {
            self.count_zeroed(pages);
        }
        drop(block);
        self.given_back.fetch_add(pages, Relaxed);
        pages
    }

    fn give_back_part(&self, part: LentPages) -> usize {
        let pages = part.pages();
        if !state::allocator_fills_pages() {
            self.count_zeroed(pages);
        }
        drop(part);
        self.given_back.fetch_add(pages, Relaxed);
        pages
    }

    fn count_zeroed(&self, pages: usize) {
        self.counters.zeroed_blocks.add(1);
        self.counters.zeroed_pages.add(pages as u64);
    }

    /// Clears pages, if there are none that are cleared.
    fn clear_ahead(&self) {
        let _clearing = self.clearing.lock();
        let mut blocks = self.blocks.lock();
        if blocks.cleared.is_some() {
            return;
        }
        let Some(mut part) = blocks.take_part(CLEARED_AHEAD) else {
            return;
        };
        drop(blocks);
        part.clear();
        self.blocks.lock().cleared = Some(part);
    }
}

/// Clears pages before the guest needs them.
impl Run<1> for Held {
    fn run(this: Arc<Self>) {
        this.clear_ahead();
    }
}

impl Shrink for Held {
    fn count(&self) -> usize {
        let blocks = self.blocks.lock();
        let lists = [&blocks.offered, &blocks.again, &blocks.done];
        let parts = [&blocks.opened, &blocks.cleared];
        let parts = parts.into_iter().flatten().map(LentPages::pages);
        lists.map(BlockList::pages).iter().sum::<usize>() + parts.sum::<usize>()
    }

    fn scan(self: &Arc<Self>, pages: usize) -> Option<usize> {
        let mut freed = 0;
        while freed < pages {
            if let Some(pages) = self.release_done() {
                freed += pages;
                continue;
            }
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
        if !state::allocator_fills_pages() {
            // The next time it is there already. (Fails if it is queued, or disabled.)
            work::enqueue::<Self, CLEAR>(self);
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
        let work_queue = WorkQueue::new(c"held")?;
        let held = Arc::pin_init(Held::new(counters.clone(), work_queue), GFP_KERNEL)?;
        // Nothing is done beside the test.
        held.disable();
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
        assert_eq!(counters.zeroed_pages.get(), zeroed(16));
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
        assert_eq!(counters.zeroed_pages.get(), zeroed(16));
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
        assert_eq!(counters.zeroed_pages.get(), zeroed(1));
        Ok(())
    }

    /// How many pages of `pages` are counted as zeroed.
    fn zeroed(pages: u64) -> u64 {
        if state::allocator_fills_pages() {
            0
        } else {
            pages
        }
    }

    #[test]
    fn what_the_device_is_done_with_goes_back_block_by_block() -> Result {
        let (held, counters) = held()?;
        held.release();
        assert_eq!(held.count(), 16);
        assert!(held.take_for_balloon(1).is_empty());
        assert!(held.release_one());
        assert_eq!(held.count(), 8);
        // It is what the guest gets first, a whole block, for it takes no time.
        assert_eq!(held.scan(1), Some(8));
        assert!(!held.release_one());
        assert_eq!(counters.zeroed_pages.get(), 0);
        assert_eq!(counters.returned_pages.get(), 0);
        assert_eq!(held.claimed(), 0);
        Ok(())
    }

    #[test]
    fn pages_that_are_cleared_ahead_are_given_back_first() -> Result {
        let (held, counters) = held()?;
        held.clear_ahead();
        // One block, opened.
        assert_eq!(held.count(), 16);
        assert_eq!(
            held.blocks.lock().cleared.as_ref().map(LentPages::pages),
            Some(8)
        );
        assert_eq!(held.scan(3), Some(3));
        assert_eq!(
            held.blocks.lock().cleared.as_ref().map(LentPages::pages),
            Some(5)
        );
        held.clear_ahead();
        assert_eq!(
            held.blocks.lock().cleared.as_ref().map(LentPages::pages),
            Some(5)
        );
        assert_eq!(held.scan(100), Some(13));
        assert_eq!(counters.zeroed_pages.get(), zeroed(16));
        held.clear_ahead();
        assert_eq!(held.count(), 0);
        Ok(())
    }

    #[test]
    fn what_lies_within_a_range_is_given_back() -> Result {
        let (held, _) = held()?;
        let first = held.blocks.lock().offered.shapes().next().ok_or(ENOENT)?;
        held.offer_all_again();
        let block = PageBlock::take_free(2).ok_or(ENOMEM)?;
        let other = block.address();
        held.hold(LentBlock::new(block));
        // A range that begins and ends within the block.
        let middle = first.address + 4096;
        held.give_back_within(&(middle..middle + 1));
        assert_eq!(held.count(), 12);
        held.give_back_within(&(0..0));
        assert_eq!(held.count(), 12);
        held.give_back_within(&(other..other + 1));
        assert_eq!(held.count(), 8);
        held.give_back_within(&(0..u64::MAX));
        assert_eq!(held.count(), 0);
        Ok(())
    }
}
