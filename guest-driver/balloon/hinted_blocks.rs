// SPDX-License-Identifier: GPL-2.0

//! The hinted blocks that have come back from the device, and are held until it is done with them.

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_mutex, new_spinlock, Arc, Mutex, SpinLock};

use super::counters::Counters;
use crate::mm::{page_alloc, BalloonPage, BlockList, HintedBlock, HintedPages, Shrink};
use crate::virtio::work::{
    self, cond_resched, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem, WorkQueue,
};

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
pub(crate) struct HintedBlocks {
    #[pin]
    inner: SpinLock<HintedBlocksInner>,
    counters: Arc<Counters>,
    /// How many pages went back to the guest, ever; those that went into the balloon are not among them.
    total_freed: Atomic<usize>,
    #[pin]
    clear: DelayedWork<Self, CLEAR>,
    /// Held while pages are on their way to being [`cleared`](HintedBlocksInner::cleared).
    #[pin]
    clearing: Mutex<()>,
}

#[derive(Default)]
struct HintedBlocksInner {
    /// Offered in the current round, or the last.
    offered: BlockList<HintedBlock>,
    /// To be offered again.
    to_reoffer: BlockList<HintedBlock>,
    /// What the device is done with: goes back to the guest as it is.
    done: BlockList<HintedBlock>,
    /// What is left of a block of which the guest has taken a part back. It is not offered again.
    partial: Option<HintedPages>,
    /// Pages that are cleared already. They are not offered again.
    cleared: Option<HintedPages>,
    /// How many pages the guest took back lately because it was short of memory.
    reclaimed: usize,
}

impl_has_delayed_work! {
    impl HasDelayedWork<1> for HintedBlocks { self.clear }
}

impl HintedBlocksInner {
    /// Takes a block.
    fn pop(&mut self) -> Option<HintedBlock> {
        self.offered.pop().or_else(|| self.to_reoffer.pop())
    }

    /// Takes up to `max` pages of one block, and leaves it opened; `None` if there is no block.
    fn take_part(&mut self, max: usize) -> Option<HintedPages> {
        let partial = self.partial.take();
        let mut partial = partial.or_else(|| self.pop().map(HintedBlock::split))?;
        let part = partial.take(max);
        self.partial = partial.into_non_empty();
        Some(part)
    }

    /// Takes up to `max` pages that are cleared already.
    fn take_cleared(&mut self, max: usize) -> Option<HintedPages> {
        let mut cleared = self.cleared.take()?;
        let part = cleared.take(max);
        self.cleared = cleared.into_non_empty();
        Some(part)
    }
}

impl HintedBlocks {
    /// Holds nothing. Its work will be done by `work_queue`.
    pub(crate) fn new(counters: Arc<Counters>, work_queue: WorkQueue) -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- new_spinlock!(HintedBlocksInner::default(), "HintedBlocks::inner"),
            counters,
            total_freed: Atomic::new(0),
            clear <- new_delayed_work!(work_queue, "HintedBlocks::clear"),
            clearing <- new_mutex!((), "HintedBlocks::clearing"),
        })
    }

    /// Ends all work for good. May sleep.
    pub(crate) fn disable(self: &Arc<Self>) {
        work::disable::<Self, CLEAR>(self);
    }

    /// Holds a block that was offered in the current round.
    pub(crate) fn insert(&self, block: HintedBlock) {
        self.inner.lock().offered.push(block);
    }

    /// Holds a block that is to be offered again.
    pub(crate) fn insert_to_reoffer(&self, block: HintedBlock) {
        self.inner.lock().to_reoffer.push(block);
    }

    /// A new round: half of what the guest has claimed is forgotten.
    pub(crate) fn decay_reclaimed(&self) {
        self.inner.lock().reclaimed /= 2;
    }

    /// How many pages the guest took back lately, for its processes: they are not to be hinted.
    pub(crate) fn reclaimed(&self) -> usize {
        self.inner.lock().reclaimed
    }

    /// All blocks that are held shall be offered again.
    pub(crate) fn reoffer_all(&self) {
        let mut inner = self.inner.lock();
        let offered = inner.offered.take();
        inner.to_reoffer.append(offered);
    }

    /// Takes a block that is to be offered again.
    pub(crate) fn next_to_reoffer(&self) -> Option<HintedBlock> {
        self.inner.lock().to_reoffer.pop()
    }

    /// The device is done with all blocks: they go back to the guest as they are, by
    /// [`release_one`](Self::release_one). May sleep.
    pub(crate) fn release(&self) {
        let _clearing = self.clearing.lock();
        let mut inner = self.inner.lock();
        let lists = [inner.offered.take(), inner.to_reoffer.take()];
        for list in lists {
            inner.done.append(list);
        }
        let parts = [inner.partial.take(), inner.cleared.take()];
        drop(inner);
        for part in parts.into_iter().flatten() {
            let pages = part.pages();
            part.release();
            self.total_freed.fetch_add(pages, Relaxed);
        }
    }

    /// Gives a block back that the device is done with. Returns whether there was one.
    pub(crate) fn release_one(&self) -> bool {
        self.release_done().is_some()
    }

    fn release_done(&self) -> Option<usize> {
        let block = self.inner.lock().done.pop()?;
        Some(self.release_block(block))
    }

    /// Gives a block back as it is, which the device is done with, and returns how many pages it has.
    pub(crate) fn release_block(&self, block: HintedBlock) -> usize {
        let pages = block.block().pages();
        block.release();
        self.total_freed.fetch_add(pages, Relaxed);
        pages
    }

    /// How many pages went back to the guest so far. Wraps.
    pub(crate) fn total_freed(&self) -> usize {
        self.total_freed.load(Relaxed)
    }

    /// Returns all blocks to the page allocator, without their content. May sleep, and take long.
    ///
    /// Takes `clearing` for one block at a time.
    pub(crate) fn free_all(&self) {
        loop {
            // Not held across iterations: another task may wait for it while it holds the hint round's lock.
            let clearing = self.clearing.lock();
            if !self.release_one() && self.free_some(usize::MAX).is_none() {
                break;
            }
            drop(clearing);
            cond_resched();
        }
    }

    /// Gives all blocks back to the guest, without their content, that lie at these physical
    /// addresses or reach into them.
    ///
    /// May sleep, and take long. Nobody must [release](Self::release) meanwhile.
    pub(crate) fn free_in_range(&self, range: &Range<u64>) {
        let _clearing = self.clearing.lock();
        let mut inner = self.inner.lock();
        let lists = [
            (inner.offered.take(), Self::insert as fn(&Self, HintedBlock)),
            (inner.to_reoffer.take(), Self::insert_to_reoffer),
            (inner.done.take(), |hinted_blocks, block| {
                hinted_blocks.inner.lock().done.push(block);
            }),
        ];
        let mut parts = [inner.partial.take(), inner.cleared.take()];
        drop(inner);
        for (mut list, insert) in lists {
            while let Some(block) = list.pop() {
                let shape = block.block();
                let (start, end) = (shape.address(), shape.address() + shape.size() as u64);
                if start < range.end && end > range.start {
                    self.free_block(block);
                } else {
                    insert(self, block);
                }
                cond_resched();
            }
        }
        for part in parts.iter_mut().filter_map(Option::take) {
            self.free_part(part);
        }
    }

    /// Takes up to `pages` single pages for the balloon: fewer, or none, if no more are held.
    ///
    /// The pages are free memory that nobody uses, and that the guest need not look for. The device
    /// has returned their blocks, so its promise that it has seen the hint holds for them. They do
    /// not count as [claimed](Self::reclaimed).
    ///
    /// The balloon may give a page to the guest before the device is done with its block: if the
    /// request is dropped unsent, or the balloon is deflated. Therefore the pages go into the
    /// balloon without their content. May sleep, and take long.
    pub(crate) fn take_for_balloon(&self, pages: usize) -> BlockList<BalloonPage> {
        let mut taken = BlockList::new();
        while taken.pages() < pages {
            let part = self.inner.lock().take_part(pages - taken.pages());
            let Some(part) = part else {
                break;
            };
            if !page_alloc::allocator_fills_pages() {
                self.count_zeroed(part.pages());
            }
            part.into_balloon_pages(&mut taken);
            cond_resched();
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
    fn free_some(&self, max: usize) -> Option<usize> {
        let mut inner = self.inner.lock();
        let part = match inner.take_cleared(max) {
            Some(part) => part,
            None => {
                if inner.partial.is_none() {
                    let block = inner.pop()?;
                    if block.block().pages() <= max || page_alloc::allocator_fills_pages() {
                        drop(inner);
                        return Some(self.free_block(block));
                    }
                    inner.partial = Some(block.split());
                }
                inner.take_part(max)?
            }
        };
        drop(inner);
        Some(self.free_part(part))
    }

    /// Gives `block` back, without its content, and returns how many pages it has.
    fn free_block(&self, block: HintedBlock) -> usize {
        let pages = block.block().pages();
        if !page_alloc::allocator_fills_pages() {
            self.count_zeroed(pages);
        }
        drop(block);
        self.total_freed.fetch_add(pages, Relaxed);
        pages
    }

    fn free_part(&self, part: HintedPages) -> usize {
        let pages = part.pages();
        if !page_alloc::allocator_fills_pages() {
            self.count_zeroed(pages);
        }
        drop(part);
        self.total_freed.fetch_add(pages, Relaxed);
        pages
    }

    fn count_zeroed(&self, pages: usize) {
        self.counters.zeroed_blocks.add(1);
        self.counters.zeroed_pages.add(pages as u64);
    }

    /// Clears pages, if there are none that are cleared.
    fn clear_ahead(&self) {
        let _clearing = self.clearing.lock();
        let mut inner = self.inner.lock();
        if inner.cleared.is_some() {
            return;
        }
        let Some(mut part) = inner.take_part(CLEARED_AHEAD) else {
            return;
        };
        drop(inner);
        part.zero();
        self.inner.lock().cleared = Some(part);
    }
}

/// Clears pages before the guest needs them.
impl WorkItem<1> for HintedBlocks {
    fn run(this: Arc<Self>) {
        this.clear_ahead();
    }
}

impl Shrink for HintedBlocks {
    fn count(&self) -> usize {
        let inner = self.inner.lock();
        let lists = [&inner.offered, &inner.to_reoffer, &inner.done];
        let parts = [&inner.partial, &inner.cleared];
        let parts = parts.into_iter().flatten().map(HintedPages::pages);
        lists.map(BlockList::pages).iter().sum::<usize>() + parts.sum::<usize>()
    }

    fn scan(self: &Arc<Self>, pages: usize) -> Option<usize> {
        let mut freed = 0;
        while freed < pages {
            if let Some(pages) = self.release_done() {
                freed += pages;
                continue;
            }
            match self.free_some(pages - freed) {
                Some(pages) => {
                    freed += pages;
                    self.counters.reclaimed(pages as u64);
                    let mut inner = self.inner.lock();
                    inner.reclaimed = inner.reclaimed.saturating_add(pages);
                }
                None if freed == 0 => return None,
                None => break,
            }
        }
        if !page_alloc::allocator_fills_pages() {
            // The next time it is there already. (Fails if it is queued, or disabled.)
            work::enqueue::<Self, CLEAR>(self);
        }
        Some(freed)
    }
}

#[kunit_tests(virtio_balloon_rs_hinted_blocks)]
mod tests {
    use super::*;
    use crate::mm::PageBlock;

    /// Holds two blocks of eight pages.
    fn hinted_blocks() -> Result<(Arc<HintedBlocks>, Arc<Counters>)> {
        let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
        let work_queue = WorkQueue::new(c"hinted_blocks")?;
        let hinted_blocks =
            Arc::pin_init(HintedBlocks::new(counters.clone(), work_queue), GFP_KERNEL)?;
        // Nothing is done beside the test.
        hinted_blocks.disable();
        for _ in 0..2 {
            hinted_blocks.insert(HintedBlock::new(PageBlock::try_alloc(3).ok_or(ENOMEM)?));
        }
        Ok((hinted_blocks, counters))
    }

    #[test]
    fn the_guest_gets_back_what_it_asks_for_and_no_more() -> Result {
        let (hinted_blocks, counters) = hinted_blocks()?;
        assert_eq!(hinted_blocks.count(), 16);
        assert_eq!(hinted_blocks.scan(3), Some(3));
        assert_eq!(hinted_blocks.count(), 13);
        // The rest of the opened block, and a part of the other.
        assert_eq!(hinted_blocks.scan(6), Some(6));
        assert_eq!(hinted_blocks.count(), 7);
        assert_eq!(hinted_blocks.scan(100), Some(7));
        assert_eq!(hinted_blocks.scan(1), None);
        assert_eq!(counters.returned_pages.get(), 16);
        assert_eq!(counters.zeroed_pages.get(), zeroed(16));
        Ok(())
    }

    #[test]
    fn inflation_takes_single_pages_of_hinted_blocks() -> Result {
        let (hinted_blocks, counters) = hinted_blocks()?;
        let first = hinted_blocks.take_for_balloon(3);
        assert_eq!(
            (first.len(), first.pages(), hinted_blocks.count()),
            (3, 3, 13)
        );
        // The rest of the opened block, and a part of the other.
        let second = hinted_blocks.take_for_balloon(6);
        assert_eq!(
            (second.len(), second.pages(), hinted_blocks.count()),
            (6, 6, 7)
        );
        // The guest may have what the balloon left, and the balloon what is left then.
        assert_eq!(hinted_blocks.scan(1), Some(1));
        let mut third = hinted_blocks.take_for_balloon(100);
        assert_eq!(
            (third.len(), third.pages(), hinted_blocks.count()),
            (6, 6, 0)
        );
        assert!(hinted_blocks.take_for_balloon(1).is_empty());
        let mut last = u64::MAX;
        while let Some(page) = third.pop() {
            assert!(page.address() % 4096 == 0 && page.address() != last);
            last = page.address();
        }
        assert_eq!(counters.hinted_pages_inflated.get(), 15);
        assert_eq!(hinted_blocks.reclaimed(), 1);
        assert_eq!(counters.zeroed_pages.get(), zeroed(16));
        Ok(())
    }

    #[test]
    fn reclaimed_pages_decay_from_round_to_round() -> Result {
        let (hinted_blocks, _) = hinted_blocks()?;
        assert_eq!(hinted_blocks.reclaimed(), 0);
        hinted_blocks.scan(9);
        assert_eq!(hinted_blocks.reclaimed(), 9);
        hinted_blocks.decay_reclaimed();
        assert_eq!(hinted_blocks.reclaimed(), 4);
        hinted_blocks.scan(2);
        assert_eq!(hinted_blocks.reclaimed(), 6);
        Ok(())
    }

    #[test]
    fn what_is_left_of_an_opened_block_is_released_too() -> Result {
        let (hinted_blocks, counters) = hinted_blocks()?;
        hinted_blocks.scan(1);
        hinted_blocks.reoffer_all();
        assert!(hinted_blocks.next_to_reoffer().is_some());
        assert!(hinted_blocks.next_to_reoffer().is_none());
        assert_eq!(hinted_blocks.count(), 7);
        hinted_blocks.release();
        assert_eq!(hinted_blocks.count(), 0);
        assert_eq!(counters.zeroed_pages.get(), zeroed(1));
        Ok(())
    }

    /// How many pages of `pages` are counted as zeroed.
    fn zeroed(pages: u64) -> u64 {
        if page_alloc::allocator_fills_pages() {
            0
        } else {
            pages
        }
    }

    #[test]
    fn what_the_device_is_done_with_goes_back_block_by_block() -> Result {
        let (hinted_blocks, counters) = hinted_blocks()?;
        hinted_blocks.release();
        assert_eq!(hinted_blocks.count(), 16);
        assert!(hinted_blocks.take_for_balloon(1).is_empty());
        assert!(hinted_blocks.release_one());
        assert_eq!(hinted_blocks.count(), 8);
        // It is what the guest gets first, a whole block, for it takes no time.
        assert_eq!(hinted_blocks.scan(1), Some(8));
        assert!(!hinted_blocks.release_one());
        assert_eq!(counters.zeroed_pages.get(), 0);
        assert_eq!(counters.returned_pages.get(), 0);
        assert_eq!(hinted_blocks.reclaimed(), 0);
        Ok(())
    }

    #[test]
    fn pages_that_are_cleared_ahead_are_given_back_first() -> Result {
        let (hinted_blocks, counters) = hinted_blocks()?;
        hinted_blocks.clear_ahead();
        // One block, opened.
        assert_eq!(hinted_blocks.count(), 16);
        assert_eq!(
            hinted_blocks
                .inner
                .lock()
                .cleared
                .as_ref()
                .map(HintedPages::pages),
            Some(8)
        );
        assert_eq!(hinted_blocks.scan(3), Some(3));
        assert_eq!(
            hinted_blocks
                .inner
                .lock()
                .cleared
                .as_ref()
                .map(HintedPages::pages),
            Some(5)
        );
        hinted_blocks.clear_ahead();
        assert_eq!(
            hinted_blocks
                .inner
                .lock()
                .cleared
                .as_ref()
                .map(HintedPages::pages),
            Some(5)
        );
        assert_eq!(hinted_blocks.scan(100), Some(13));
        assert_eq!(counters.zeroed_pages.get(), zeroed(16));
        hinted_blocks.clear_ahead();
        assert_eq!(hinted_blocks.count(), 0);
        Ok(())
    }

    #[test]
    fn what_lies_within_a_range_is_given_back() -> Result {
        let (hinted_blocks, _) = hinted_blocks()?;
        let first = hinted_blocks
            .inner
            .lock()
            .offered
            .extents()
            .next()
            .ok_or(ENOENT)?;
        hinted_blocks.reoffer_all();
        let block = PageBlock::try_alloc(2).ok_or(ENOMEM)?;
        let other = block.address();
        hinted_blocks.insert(HintedBlock::new(block));
        // A range that begins and ends within the block.
        let middle = first.address + 4096;
        hinted_blocks.free_in_range(&(middle..middle + 1));
        assert_eq!(hinted_blocks.count(), 12);
        hinted_blocks.free_in_range(&(0..0));
        assert_eq!(hinted_blocks.count(), 12);
        hinted_blocks.free_in_range(&(other..other + 1));
        assert_eq!(hinted_blocks.count(), 8);
        hinted_blocks.free_in_range(&(0..u64::MAX));
        assert_eq!(hinted_blocks.count(), 0);
        Ok(())
    }
}
