// SPDX-License-Identifier: GPL-2.0

//! The hinted blocks whose buffers the device has used, kept until DONE.

use core::ops::Range;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_mutex, new_spinlock, Arc, Mutex, SpinLock};

use super::counters::Counters;
use crate::mm::{page_alloc, BalloonPage, BlockList, HintedBlock, HintedPages, Shrink};
use crate::virtio::work::{
    self, cond_resched, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem, WorkQueue,
};

/// The number of pages that are cleared ahead, once the guest has begun to reclaim pages.
const CLEARED_AHEAD: usize = 1024;

const CLEAR: u64 = 1;

/// The hinted blocks whose buffers the device has used, until the guest gets them back.
///
/// A guest that is short of memory reclaims them through the shrinker: this type is a [`Shrink`].
/// Hinted blocks in flight are not in here, so reclaiming keeps the driver's promise
/// `KEEPS_HINTED_UNTIL_RETURNED`.
///
/// Before DONE, the content of a hinted block may still change, and no new owner of its pages may
/// see that. If the page allocator initialises pages, the driver does nothing more. Otherwise the
/// driver fills the pages with zeroes; once the guest has begun to reclaim pages, a work item
/// clears some ahead.
///
/// The methods are short and may be called in any context but interrupts, unless they say
/// otherwise. Dropping this type returns all hinted blocks to the page allocator, cleared if
/// necessary.
#[pin_data]
pub(crate) struct HintedBlocks {
    #[pin]
    inner: SpinLock<HintedBlocksInner>,
    counters: Arc<Counters>,
    /// The number of pages that were returned to the page allocator, without those that went into
    /// the balloon. Wraps.
    total_freed: Atomic<usize>,
    #[pin]
    clear: DelayedWork<Self, CLEAR>,
    /// Locked by the work item while the pages that it clears are in no list, and by tasks that
    /// must not miss those pages. Comes before `inner` in the lock order.
    #[pin]
    clearing: Mutex<()>,
}

#[derive(Default)]
struct HintedBlocksInner {
    /// Hinted blocks that were offered in the current or the last hint round.
    offered: BlockList<HintedBlock>,
    /// Hinted blocks to offer again.
    to_reoffer: BlockList<HintedBlock>,
    /// Hinted blocks of hint rounds that ended with DONE. They are freed with their content.
    done: BlockList<HintedBlock>,
    /// The remaining pages of a hinted block that was split. They are not offered again.
    partial: Option<HintedPages>,
    /// Pages that are cleared ahead. They are not offered again.
    cleared: Option<HintedPages>,
    /// The number of pages that the guest reclaimed, halved with each hint round.
    reclaimed: usize,
}

impl_has_delayed_work! {
    impl HasDelayedWork<1> for HintedBlocks { self.clear }
}

impl HintedBlocksInner {
    /// Takes a whole hinted block that is not [released](HintedBlocks::release) yet.
    fn pop(&mut self) -> Option<HintedBlock> {
        self.offered.pop().or_else(|| self.to_reoffer.pop())
    }

    /// Takes up to `max` pages of one hinted block, and keeps the remaining pages in `partial`.
    /// Returns `None` if no hinted block is left.
    fn take_part(&mut self, max: usize) -> Option<HintedPages> {
        let partial = self.partial.take();
        let mut partial = partial.or_else(|| self.pop().map(HintedBlock::split))?;
        let part = partial.take(max);
        self.partial = partial.into_non_empty();
        Some(part)
    }

    /// Takes up to `max` pages that are cleared ahead.
    fn take_cleared(&mut self, max: usize) -> Option<HintedPages> {
        let mut cleared = self.cleared.take()?;
        let part = cleared.take(max);
        self.cleared = cleared.into_non_empty();
        Some(part)
    }
}

impl HintedBlocks {
    /// Creates an empty set of hinted blocks, whose work item runs on `work_queue`.
    pub(crate) fn new(counters: Arc<Counters>, work_queue: WorkQueue) -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- new_spinlock!(HintedBlocksInner::default(), "HintedBlocks::inner"),
            counters,
            total_freed: Atomic::new(0),
            clear <- new_delayed_work!(work_queue, "HintedBlocks::clear"),
            clearing <- new_mutex!((), "HintedBlocks::clearing"),
        })
    }

    /// Disables the work item permanently. May sleep.
    pub(crate) fn disable(self: &Arc<Self>) {
        work::disable::<Self, CLEAR>(self);
    }

    /// Adds a hinted block that was offered in the current hint round.
    pub(crate) fn insert(&self, block: HintedBlock) {
        self.inner.lock().offered.push(block);
    }

    /// Adds a hinted block to offer again.
    pub(crate) fn insert_to_reoffer(&self, block: HintedBlock) {
        self.inner.lock().to_reoffer.push(block);
    }

    /// Halves the number of [`reclaimed`](Self::reclaimed) pages. To be called at the start of a
    /// hint round.
    pub(crate) fn decay_reclaimed(&self) {
        self.inner.lock().reclaimed /= 2;
    }

    /// Returns the number of pages that the guest reclaimed lately. Hinting leaves that many more
    /// to the guest.
    pub(crate) fn reclaimed(&self) -> usize {
        self.inner.lock().reclaimed
    }

    /// Marks all hinted blocks to be offered again.
    pub(crate) fn reoffer_all(&self) {
        let mut inner = self.inner.lock();
        let offered = inner.offered.take();
        inner.to_reoffer.append(offered);
    }

    /// Takes a hinted block to offer again.
    pub(crate) fn next_to_reoffer(&self) -> Option<HintedBlock> {
        self.inner.lock().to_reoffer.pop()
    }

    /// Releases all hinted blocks after DONE.
    ///
    /// The remaining pages of split blocks are freed at once. Whole blocks are freed one by one by
    /// [`release_one`](Self::release_one), with their content. May sleep.
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

    /// Frees one [released](Self::release) hinted block. Returns whether it found one.
    pub(crate) fn release_one(&self) -> bool {
        self.release_done().is_some()
    }

    fn release_done(&self) -> Option<usize> {
        let block = self.inner.lock().done.pop()?;
        Some(self.release_block(block))
    }

    /// Frees `block`, which the device no longer needs, with its content. Returns its number of
    /// pages.
    pub(crate) fn release_block(&self, block: HintedBlock) -> usize {
        let pages = block.block().pages();
        block.release();
        self.total_freed.fetch_add(pages, Relaxed);
        pages
    }

    /// Returns the number of pages that were returned to the page allocator so far. Wraps.
    pub(crate) fn total_freed(&self) -> usize {
        self.total_freed.load(Relaxed)
    }

    /// Returns all hinted blocks to the page allocator, cleared if DONE has not come and the
    /// allocator does not initialise pages.
    ///
    /// May sleep and take long. Locks `clearing` for one hinted block at a time.
    pub(crate) fn free_all(&self) {
        loop {
            // Unlocked after each hinted block: another task may wait for `clearing` while it holds
            // `Hinting::inner`.
            let clearing = self.clearing.lock();
            if !self.release_one() && self.free_some(usize::MAX).is_none() {
                break;
            }
            drop(clearing);
            cond_resched();
        }
    }

    /// Frees the hinted blocks that overlap a range of physical addresses, and all pages of split
    /// blocks. Clears them if the page allocator does not initialise pages.
    ///
    /// The caller must prevent concurrent calls of [`release`](Self::release). May sleep and take
    /// long.
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

    /// Takes up to `pages` single pages for the balloon. Returns fewer, or none, if no more are
    /// available.
    ///
    /// The pages are free memory, so the balloon does not have to allocate others. Their buffers
    /// are used, so the driver keeps its promise for them. They do not count as
    /// [reclaimed](Self::reclaimed).
    ///
    /// The pages are cleared if the page allocator does not initialise pages: the balloon may
    /// return a page to the guest before DONE, if a request is not sent or the balloon deflates.
    /// May sleep and take long.
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

    /// Frees one hinted block, or up to `max` pages of one, and clears them if necessary. Returns
    /// the number of pages, or `None` if no hinted block is left.
    ///
    /// If pages have to be cleared, the guest gets at most `max` pages, because it waits for them.
    /// Otherwise it gets the whole block, so that it has to ask less often.
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

    /// Frees `block` and clears it if necessary. Returns its number of pages.
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

    /// Clears pages ahead, unless some are cleared already.
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

/// Clears pages before the guest reclaims them.
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
            // Cleared pages are ready for the next scan. Fails if the work item is queued or
            // disabled.
            work::enqueue::<Self, CLEAR>(self);
        }
        Some(freed)
    }
}

#[kunit_tests(virtio_balloon_rs_hinted_blocks)]
mod tests {
    use super::*;
    use crate::mm::PageBlock;

    /// Returns hinted blocks that contain two blocks of eight pages.
    fn hinted_blocks() -> Result<(Arc<HintedBlocks>, Arc<Counters>)> {
        let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
        let work_queue = WorkQueue::new(c"hinted_blocks")?;
        let hinted_blocks =
            Arc::pin_init(HintedBlocks::new(counters.clone(), work_queue), GFP_KERNEL)?;
        // The test calls the work item.
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
        // The remaining pages of the split block, and a part of the other one.
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
        // The remaining pages of the split block, and a part of the other one.
        let second = hinted_blocks.take_for_balloon(6);
        assert_eq!(
            (second.len(), second.pages(), hinted_blocks.count()),
            (6, 6, 7)
        );
        // The guest reclaims a page that the balloon left, and the balloon takes the rest.
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

    /// Returns how many of `pages` pages are counted as zeroed.
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
        // A released block is freed first, and as a whole, because it needs no clearing.
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
        // One block is split.
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
