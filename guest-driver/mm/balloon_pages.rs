// SPDX-License-Identifier: GPL-2.0

//! The pages in a balloon.

use core::ptr::NonNull;

use kernel::bindings;
use kernel::prelude::*;
use kernel::time::{delay::fsleep, Delta};
use kernel::types::Opaque;

use super::list::sealed::Role;
use super::{BlockList, PageBlock};
use crate::bindings as helpers;

/// A page meant for a [`BalloonPages`], or taken from one.
///
/// Dropping it gives the page back to the page allocator.
pub struct BalloonPage(PageBlock);

impl BalloonPage {
    /// Allocates a page as a balloon wants it, or returns `None` if memory is short.
    ///
    /// May sleep and reclaim memory, but neither tries hard nor prints a warning.
    pub fn alloc() -> Option<Self> {
        // SAFETY: May be called in any context that may sleep.
        let page = unsafe { helpers::balloon_page_alloc() };
        // SAFETY: The allocator gave the page to us alone.
        NonNull::new(page).map(|page| Self(unsafe { PageBlock::adopt(page, 0) }))
    }

    /// The physical address of the page's first byte.
    pub fn address(&self) -> u64 {
        self.0.address()
    }
}

impl Role for BalloonPage {
    fn into_block(self) -> PageBlock {
        self.0
    }

    fn from_block(block: PageBlock) -> Self {
        Self(block)
    }
}

/// The pages that are in a balloon, as the kernel's balloon code keeps them.
///
/// While a page is in here, the kernel knows that it is offline, counts it as ballooned and, if
/// asked to, no longer as managed memory (`MemTotal` shrinks).
///
/// The kernel may *isolate* a page for compaction; it is then missing from the list for a moment.
/// The pages here do not migrate: each request is refused, and the page comes back.
///
/// All methods may be called from any context that may sleep; the kernel's `balloon_pages_lock`
/// orders them. Dropping it takes all pages out and frees them, waiting for isolated ones.
#[pin_data(PinnedDrop)]
pub struct BalloonPages {
    #[pin]
    info: Opaque<helpers::balloon_dev_info>,
}

// SAFETY: The kernel's balloon code locks what is inside.
unsafe impl Send for BalloonPages {}

// SAFETY: As above.
unsafe impl Sync for BalloonPages {}

impl BalloonPages {
    /// An empty balloon. With `adjust_managed`, pages in it do not count as managed memory.
    pub fn new(adjust_managed: bool) -> impl PinInit<Self> {
        pin_init!(Self {
            info <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes, and pinned.
                unsafe { helpers::vbrs_balloon_devinfo_init(slot, adjust_managed) }
            }),
        })
    }

    /// Puts all pages of `pages` into the balloon.
    pub fn enqueue(&self, mut pages: BlockList<BalloonPage>) {
        while let Some(BalloonPage(block)) = pages.pop() {
            let page = block.into_raw().as_ptr();
            // SAFETY: The page is from `balloon_page_alloc` and was ours alone; its `lru` is free
            // again, now that it is on no list of ours. `info` is initialised and pinned.
            unsafe { helpers::balloon_page_enqueue(self.info.get(), page) };
        }
    }

    /// Takes up to `max` pages out of the balloon.
    ///
    /// May return fewer, even none, although there are more: isolated pages are not to be had.
    pub fn dequeue(&self, max: usize) -> BlockList<BalloonPage> {
        let mut pages = BlockList::new();
        let head = Opaque::<bindings::list_head>::uninit();
        // SAFETY: The head stays where it is for as long as it is linked: until the list is empty
        // again below. `info` is initialised and pinned.
        unsafe {
            bindings::INIT_LIST_HEAD(head.get());
            helpers::balloon_page_list_dequeue(self.info.get(), head.get(), max);
        }
        loop {
            // SAFETY: The head was initialised above.
            let entry = unsafe { (*head.get()).next };
            if entry == head.get() {
                break pages;
            }
            // SAFETY: Each entry is the `lru` of a page that was in the balloon, and that is ours
            // alone since it was dequeued. It leaves the list before it is adopted.
            let page = unsafe {
                helpers::vbrs_list_del(entry);
                NonNull::new_unchecked(helpers::vbrs_lru_to_page(entry))
            };
            // SAFETY: As above.
            pages.push(BalloonPage(unsafe { PageBlock::adopt(page, 0) }));
        }
    }

    /// How many pages are isolated for compaction now.
    fn isolated(&self) -> usize {
        // SAFETY: `info` is initialised; reads one word.
        unsafe { helpers::vbrs_balloon_isolated(self.info.get()) as usize }
    }
}

#[pinned_drop]
impl PinnedDrop for BalloonPages {
    fn drop(self: Pin<&mut Self>) {
        loop {
            // In this order: a page that is put back between the two calls is on the list.
            let isolated = self.isolated();
            drop(self.dequeue(usize::MAX));
            if isolated == 0 {
                break;
            }
            fsleep(Delta::from_millis(1));
        }
    }
}
