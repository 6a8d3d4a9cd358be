// SPDX-License-Identifier: GPL-2.0

//! The hinted blocks that have come back from the device, and are held until it is done with them.

use kernel::prelude::*;
use kernel::sync::{new_spinlock, Arc, SpinLock};

use super::counters::Counters;
use crate::mm::{BlockList, LentBlock, Shrink};

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
    /// The guest was short of memory and took blocks back.
    pressed: bool,
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

    /// A new round: forgets the pressure of the last one.
    pub(crate) fn forget_pressure(&self) {
        self.blocks.lock().pressed = false;
    }

    /// Whether the guest was short of memory in this round.
    pub(crate) fn pressed(&self) -> bool {
        self.blocks.lock().pressed
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

    /// The device is done with all blocks: gives them back to the guest as they are.
    pub(crate) fn release(&self) {
        let mut blocks = self.blocks.lock();
        let lists = [blocks.offered.take(), blocks.again.take()];
        drop(blocks);
        for mut list in lists {
            while let Some(block) = list.pop() {
                block.release();
            }
        }
    }

    /// Gives all blocks back to the guest, filled with zeroes. May take long.
    pub(crate) fn give_up(&self) {
        while self.give_back_one().is_some() {}
    }

    /// Gives one block back, filled with zeroes, and returns how many pages it has.
    fn give_back_one(&self) -> Option<usize> {
        let mut blocks = self.blocks.lock();
        let block = match blocks.offered.pop() {
            Some(block) => block,
            None => blocks.again.pop()?,
        };
        drop(blocks);
        Some(self.give_back(block))
    }

    /// Gives `block` back, filled with zeroes, and returns how many pages it has.
    pub(crate) fn give_back(&self, block: LentBlock) -> usize {
        let pages = block.block().pages();
        self.counters.zeroed_blocks.add(1);
        self.counters.zeroed_pages.add(pages as u64);
        drop(block);
        pages
    }
}

impl Shrink for Held {
    fn count(&self) -> usize {
        let blocks = self.blocks.lock();
        blocks.offered.pages() + blocks.again.pages()
    }

    fn scan(&self, pages: usize) -> Option<usize> {
        self.blocks.lock().pressed = true;
        let mut freed = 0;
        while freed < pages {
            match self.give_back_one() {
                Some(pages) => {
                    freed += pages;
                    self.counters.returned(pages as u64);
                }
                None if freed == 0 => return None,
                None => break,
            }
        }
        Some(freed)
    }
}
