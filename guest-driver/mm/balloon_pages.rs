// SPDX-License-Identifier: GPL-2.0

//! The pages in a balloon.

use core::ptr::NonNull;

use kernel::bindings;
use kernel::container_of;
use kernel::ffi::c_int;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::time::{delay::fsleep, Delta};
use kernel::types::Opaque;

use super::list::sealed::Role;
use super::{BlockList, NodesBelowWatermark, PageBlock, PageRef};
use crate::bindings as helpers;
use crate::virtio::work::cond_resched;

/// The most pages that are taken out of a balloon at a time.
const CHUNK: usize = 256;
/// The most of them that the kernel takes out under one lock, with interrupts off. It works out the
/// reserves of all zones of all nodes again for each page.
const MAX_PER_LOCK: usize = 32;
/// A search for pages on a node ends when it has found so many times more than are wanted: the
/// next ones who search find them first.
const SURPLUS: usize = 16;

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
        NonNull::new(page).map(|page| Self(unsafe { PageBlock::from_page(page, 0) }))
    }

    /// Becomes the owner of a page.
    ///
    /// # Safety
    ///
    /// As for [`PageBlock::from_page`], with an order of 0; the page must have no type.
    pub(super) unsafe fn from_page(page: NonNull<bindings::page>) -> Self {
        // SAFETY: By this function's requirements.
        Self(unsafe { PageBlock::from_page(page, 0) })
    }

    /// The physical address of the page's first byte.
    pub fn address(&self) -> u64 {
        self.0.address()
    }

    pub(super) fn as_raw(&self) -> NonNull<bindings::page> {
        self.0.as_raw()
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

/// Moves a balloon's pages on behalf of the kernel, which wants a page's place for something else
/// (compaction, mostly).
pub trait MigratePages: Send + Sync + 'static {
    /// Puts `new` in the place of `old`, which is in the balloon.
    ///
    /// With [`Migrated::Replaced`] the host must have taken `new`. With [`Migrated::Deflated`] `new` is not
    /// used. With both, `old` must have been given up for the balloon; it is freed when the reference to
    /// it is dropped. On failure `old` stays in the balloon, and `new` is freed when the reference to it is dropped. So
    /// whichever page the host may still touch is kept by keeping the reference.
    ///
    /// Called in process context with both pages locked, and possibly from within an allocation: may
    /// sleep, for a limited time; must not allocate with reclaim allowed, nor take a lock under which
    /// anybody does.
    ///
    /// With [`MigrateMode::Async`] it must not sleep.
    ///
    /// # Errors
    ///
    /// [`EAGAIN`] if it is worth trying again at once, any other if not.
    fn migrate(
        pages: &BalloonPages<Self>,
        new: PageRef,
        old: PageRef,
        mode: MigrateMode,
    ) -> Result<Migrated>
    where
        Self: Sized;
}

/// What became of a page that the kernel wanted to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrated {
    /// The new page is in the balloon instead of the old one.
    Replaced,
    /// The old page has left the balloon, and no other page has come.
    Deflated,
}

/// How long the kernel lets a page migration take (`enum migrate_mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrateMode {
    /// It must not block.
    Async,
    /// It may block, but not for long.
    SyncLight,
    /// It may block.
    Sync,
}

impl MigrateMode {
    fn from_raw(mode: helpers::migrate_mode) -> Self {
        match mode {
            helpers::migrate_mode_MIGRATE_ASYNC => Self::Async,
            helpers::migrate_mode_MIGRATE_SYNC_LIGHT => Self::SyncLight,
            _ => Self::Sync,
        }
    }
}

/// The pages that are in a balloon, as the kernel's balloon code keeps them, and who moves them.
///
/// While a page is in here, the kernel knows that it is offline, counts it as ballooned and, if
/// asked to, no longer as managed memory (`MemTotal` shrinks).
///
/// The kernel may *isolate* a page to move it; it is then missing from the list until
/// [`MigratePages::migrate`] has replaced it or has failed.
///
/// All methods may be called from any context that may sleep; the kernel's `balloon_pages_lock`
/// orders them. Dropping it takes all pages out and frees them, waiting for isolated ones.
#[pin_data(PinnedDrop)]
pub struct BalloonPages<M: MigratePages> {
    #[pin]
    info: Opaque<helpers::balloon_dev_info>,
    /// Isolated pages are on no list, and counted all the same.
    count: Atomic<usize>,
    #[pin]
    migrator: M,
}

// SAFETY: The kernel's balloon code locks what is inside, and `M` is `Send`.
unsafe impl<M: MigratePages> Send for BalloonPages<M> {}

// SAFETY: As above, and `M` is `Sync`.
unsafe impl<M: MigratePages> Sync for BalloonPages<M> {}

impl<M: MigratePages> BalloonPages<M> {
    /// An empty balloon. With `adjust_managed`, pages in it do not count as managed memory.
    pub fn new<E>(adjust_managed: bool, migrator: impl PinInit<M, E>) -> impl PinInit<Self, Error>
    where
        Error: From<E>,
    {
        try_pin_init!(Self {
            info <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes, and pinned. The callback gets what is in it.
                unsafe {
                    helpers::vbrs_balloon_devinfo_init(
                        slot,
                        adjust_managed,
                        Some(Self::migrate_callback),
                    )
                }
            }),
            count: Atomic::new(0),
            migrator <- migrator,
        })
    }

    /// Who moves the pages.
    pub fn migrator(&self) -> &M {
        &self.migrator
    }

    extern "C" fn migrate_callback(
        info: *mut helpers::balloon_dev_info,
        new: *mut bindings::page,
        old: *mut bindings::page,
        mode: helpers::migrate_mode,
    ) -> c_int {
        // SAFETY: The kernel calls for an isolated page of this balloon, which the drop waits for.
        let this = unsafe { &*container_of!(Opaque::cast_from(info), Self, info) };
        let (Some(new), Some(old)) = (NonNull::new(new), NonNull::new(old)) else {
            return EINVAL.to_errno();
        };
        let (new_page, old_page) = (new.as_ptr(), old.as_ptr());
        // SAFETY: The caller has references to both pages.
        let (new, old) = unsafe { (PageRef::get(new), PageRef::get(old)) };
        match M::migrate(this, new, old, MigrateMode::from_raw(mode)) {
            Ok(Migrated::Replaced) => {
                // SAFETY: The caller has references to both pages; the old one was counted as a balloon
                // page when it was enqueued, or when it replaced another.
                unsafe { helpers::vbrs_recount_balloon_page(old_page, new_page) };
                0
            }
            Ok(Migrated::Deflated) => {
                this.count.fetch_sub(1, Relaxed);
                // SAFETY: The page was counted as a balloon page when it was enqueued, and the caller
                // has a reference to it.
                unsafe { helpers::vbrs_uncount_balloon_page(old_page) };
                // To the caller it says that the page has left the balloon.
                ENOENT.to_errno()
            }
            Err(error) if error == ENOENT => EBUSY.to_errno(),
            Err(error) => error.to_errno(),
        }
    }

    /// Puts all pages of `pages` into the balloon.
    pub fn enqueue(&self, mut pages: BlockList<BalloonPage>) {
        self.count.fetch_add(pages.len(), Relaxed);
        while let Some(BalloonPage(block)) = pages.pop() {
            let page = block.into_raw().as_ptr();
            // SAFETY: The page is a single one of the page allocator's and was ours alone; its `lru` is
            // free again, now that it is on no list of ours. `info` is initialised and pinned.
            unsafe { helpers::balloon_page_enqueue(self.info.get(), page) };
        }
    }

    /// Takes up to `max` pages out of the balloon, 256 at most.
    ///
    /// May return fewer, even none, although there are more: isolated pages are not available.
    pub fn dequeue(&self, max: usize) -> BlockList<BalloonPage> {
        let max = max.min(CHUNK);
        let mut pages = BlockList::new();
        while pages.len() < max {
            let wanted = MAX_PER_LOCK.min(max - pages.len());
            let some = self.dequeue_batch(wanted);
            let are_all = some.len() < wanted;
            pages.append(some);
            if are_all {
                break;
            }
        }
        self.count.fetch_sub(pages.len(), Relaxed);
        pages
    }

    /// Takes up to `max` pages out under one lock, with interrupts off. They still count as pages of
    /// the balloon.
    fn dequeue_batch(&self, max: usize) -> BlockList<BalloonPage> {
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
            pages.push(BalloonPage(unsafe { PageBlock::from_page(page, 0) }));
        }
    }

    /// Takes up to `max` pages that lie on `nodes` out of the balloon. `None` if no page of the balloon
    /// does.
    ///
    /// May return fewer, even none, although there are more: isolated pages are not available. Looks at
    /// all pages of the balloon if need be. May sleep.
    pub fn dequeue_on(
        &self,
        nodes: &NodesBelowWatermark,
        max: usize,
    ) -> Option<BlockList<BalloonPage>> {
        if nodes.is_empty() {
            return None;
        }
        let max = max.min(CHUNK);
        let (mut found, mut others) = (BlockList::new(), BlockList::new());
        while found.len() < max || (!others.is_empty() && found.len() < SURPLUS * max) {
            let mut chunk = self.dequeue(max);
            if chunk.is_empty() {
                break;
            }
            while let Some(page) = chunk.pop() {
                if nodes.contains(&page) {
                    found.push(page);
                } else {
                    others.push(page);
                }
            }
            cond_resched();
        }
        let is_elsewhere = found.is_empty() && !others.is_empty();
        self.enqueue(others);
        let mut pages = BlockList::new();
        while pages.len() < max {
            let Some(page) = found.pop() else {
                break;
            };
            pages.push(page);
        }
        self.enqueue(found);
        (!is_elsewhere).then_some(pages)
    }

    /// Takes all pages out and frees them, waiting for isolated ones to come back: not longer than
    /// [`MigratePages::migrate`] takes. May sleep.
    ///
    /// The caller sees to it that no page is put in meanwhile.
    pub fn drain(&self) {
        // A page that was removed is isolated until the kernel has no more to do with this balloon.
        while self.count() > 0 || self.isolated() > 0 {
            let pages = self.dequeue(CHUNK);
            if pages.is_empty() {
                fsleep(Delta::from_millis(1));
            }
            drop(pages);
            cond_resched();
        }
    }

    /// How many pages are isolated now.
    fn isolated(&self) -> usize {
        // SAFETY: `info` is initialised; reads one word.
        unsafe { helpers::vbrs_balloon_isolated(self.info.get()) as usize }
    }

    /// How many pages are in the balloon, isolated ones included. Any context.
    pub fn count(&self) -> usize {
        self.count.load(Relaxed)
    }
}

#[pinned_drop]
impl<M: MigratePages> PinnedDrop for BalloonPages<M> {
    fn drop(self: Pin<&mut Self>) {
        self.drain();
    }
}
