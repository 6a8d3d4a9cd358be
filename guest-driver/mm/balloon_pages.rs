// SPDX-License-Identifier: GPL-2.0

//! The pages in a balloon, and their migration.
//!
//! [`BalloonPages`] wraps the kernel's balloon code (`mm/balloon.c`), which keeps the pages of a
//! balloon in a list and lets compaction migrate them. The kernel's `balloon_pages_lock` protects
//! the list. A driver implements [`MigratePages`] to do its part of a page migration.
//!
//! C header: `include/linux/balloon.h`.

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

/// The maximum number of pages that [`BalloonPages::dequeue`] removes at once.
const CHUNK: usize = 256;
/// The maximum number of pages that the kernel removes while it holds `balloon_pages_lock` with
/// interrupts disabled. With `adjust_managed`, the kernel recomputes the lowmem reserves of all
/// zones for each page.
const MAX_PER_LOCK: usize = 32;
/// [`BalloonPages::dequeue_on`] stops its search once it has found this multiple of the requested
/// pages. It returns the surplus to the front of the list, where the next searches find it first.
const SURPLUS: usize = 16;

/// A page to put into a [`BalloonPages`], or a page removed from one.
///
/// Dropping it returns the page to the page allocator.
#[doc(alias = "page")]
pub struct BalloonPage(PageBlock);

impl BalloonPage {
    /// Allocates a page for a balloon, or returns `None` if memory is short.
    ///
    /// The page can be migrated if the kernel supports that for balloon pages. May sleep and
    /// reclaim memory, but does not retry, does not use the emergency reserves, and logs no
    /// warning.
    #[doc(alias = "balloon_page_alloc")]
    #[inline]
    pub fn alloc() -> Option<Self> {
        // SAFETY: `balloon_page_alloc()` has no requirement but a context that may sleep.
        let page = unsafe { helpers::balloon_page_alloc() };
        // SAFETY: The allocator returned a single page with one owner.
        NonNull::new(page).map(|page| Self(unsafe { PageBlock::from_page(page, 0) }))
    }

    /// Creates a `BalloonPage` from a page.
    ///
    /// # Safety
    ///
    /// As for [`PageBlock::from_page`], with order 0. The page must have no type.
    pub(super) unsafe fn from_page(page: NonNull<bindings::page>) -> Self {
        // SAFETY: By the safety requirements of this function.
        Self(unsafe { PageBlock::from_page(page, 0) })
    }

    /// Returns the physical address of the first byte.
    #[doc(alias = "page_to_phys")]
    #[inline]
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

/// Page migration: replaces pages of a balloon on behalf of the kernel, mostly for compaction.
#[doc(alias = "movable_operations")]
pub trait MigratePages: Send + Sync + 'static {
    /// Replaces `old`, a page of the balloon, by `new`.
    ///
    /// The result determines the state of the pages:
    ///
    /// - [`Migrated::Replaced`]: the host has accepted `new` into the balloon, and `old` has left
    ///   it. The kernel puts `new` into the balloon and frees `old`.
    /// - [`Migrated::Deflated`]: `old` has left the balloon. The kernel frees both pages.
    /// - An error: `old` stays in the balloon. The kernel frees `new`.
    ///
    /// A page is freed only after its [`PageRef`] is dropped. An implementation that fails while
    /// the host may still access a page keeps the `PageRef` of that page.
    ///
    /// Called in process context with both pages locked, possibly from within an allocation. May
    /// sleep for a limited time, but not with [`MigrateMode::Async`]. Must not allocate with
    /// reclaim allowed, and must not take a lock under which memory is allocated with reclaim
    /// allowed.
    ///
    /// # Errors
    ///
    /// [`EAGAIN`] if the kernel should retry at once, any other error if it should not.
    #[doc(alias = "migratepage")]
    fn migrate(
        pages: &BalloonPages<Self>,
        new: PageRef,
        old: PageRef,
        mode: MigrateMode,
    ) -> Result<Migrated>
    where
        Self: Sized;
}

/// The result of a successful page migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrated {
    /// The new page has replaced the old page in the balloon.
    Replaced,
    /// The old page has left the balloon, and no page has replaced it.
    Deflated,
}

/// How long a page migration may block (`enum migrate_mode`).
#[doc(alias = "migrate_mode")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrateMode {
    /// Must not block (`MIGRATE_ASYNC`).
    #[doc(alias = "MIGRATE_ASYNC")]
    Async,
    /// May block, but not for long (`MIGRATE_SYNC_LIGHT`).
    #[doc(alias = "MIGRATE_SYNC_LIGHT")]
    SyncLight,
    /// May block (`MIGRATE_SYNC`).
    #[doc(alias = "MIGRATE_SYNC")]
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

/// The pages in a balloon.
///
/// The pages have the type `PageOffline`, and the kernel counts them as balloon pages
/// (`NR_BALLOON_PAGES`). With `adjust_managed`, the kernel does not count them as managed memory,
/// so `MemTotal` decreases.
///
/// To migrate a page, the kernel *isolates* it: it removes the page from the list.
/// [`MigratePages::migrate`] then replaces it, or fails and the kernel puts it back.
///
/// Methods may be called from any context that may sleep, unless they say otherwise. Dropping a
/// `BalloonPages` drains it: see [`drain`](Self::drain).
#[doc(alias = "balloon_dev_info")]
#[pin_data(PinnedDrop)]
pub struct BalloonPages<M: MigratePages> {
    #[pin]
    info: Opaque<helpers::balloon_dev_info>,
    /// The number of pages in the balloon, including isolated pages, which are not in the list.
    count: Atomic<usize>,
    #[pin]
    migrator: M,
}

// SAFETY: `balloon_pages_lock` protects `info`, and `M` is `Send`.
unsafe impl<M: MigratePages> Send for BalloonPages<M> {}

// SAFETY: `balloon_pages_lock` protects `info`, and `M` is `Sync`.
unsafe impl<M: MigratePages> Sync for BalloonPages<M> {}

impl<M: MigratePages> BalloonPages<M> {
    /// Creates an empty balloon. With `adjust_managed`, the kernel does not count its pages as
    /// managed memory.
    #[doc(alias = "balloon_devinfo_init")]
    pub fn new<E>(adjust_managed: bool, migrator: impl PinInit<M, E>) -> impl PinInit<Self, Error>
    where
        Error: From<E>,
    {
        try_pin_init!(Self {
            info <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes and pinned. The kernel calls the callback with
                // a pointer to it.
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

    /// Returns the implementation of page migration.
    pub fn migrator(&self) -> &M {
        &self.migrator
    }

    extern "C" fn migrate_callback(
        info: *mut helpers::balloon_dev_info,
        new: *mut bindings::page,
        old: *mut bindings::page,
        mode: helpers::migrate_mode,
    ) -> c_int {
        // SAFETY: The kernel passes the `info` of the balloon that contains the isolated page.
        // `drop` waits for isolated pages, so the balloon is valid.
        let this = unsafe { &*container_of!(Opaque::cast_from(info), Self, info) };
        let (Some(new), Some(old)) = (NonNull::new(new), NonNull::new(old)) else {
            return EINVAL.to_errno();
        };
        let (new_page, old_page) = (new.as_ptr(), old.as_ptr());
        // SAFETY: The caller has references to both pages for the duration of the call.
        let (new, old) = unsafe { (PageRef::get(new), PageRef::get(old)) };
        match M::migrate(this, new, old, MigrateMode::from_raw(mode)) {
            Ok(Migrated::Replaced) => {
                // SAFETY: The caller has references to both pages. The old page was counted as a
                // balloon page when it was enqueued, or when it replaced another page.
                unsafe { helpers::vbrs_recount_balloon_page(old_page, new_page) };
                0
            }
            Ok(Migrated::Deflated) => {
                this.count.fetch_sub(1, Relaxed);
                // SAFETY: The caller has a reference to the page, which was counted as a balloon
                // page when it was enqueued, or when it replaced another page.
                unsafe { helpers::vbrs_uncount_balloon_page(old_page) };
                // The balloon code takes this error as a successful deflation.
                ENOENT.to_errno()
            }
            Err(error) if error == ENOENT => EBUSY.to_errno(),
            Err(error) => error.to_errno(),
        }
    }

    /// Puts all pages of `pages` into the balloon.
    #[doc(alias = "balloon_page_enqueue")]
    pub fn enqueue(&self, mut pages: BlockList<BalloonPage>) {
        self.count.fetch_add(pages.len(), Relaxed);
        while let Some(BalloonPage(block)) = pages.pop() {
            let page = block.into_raw().as_ptr();
            // SAFETY: The page is a single page from the page allocator, and we have the only
            // reference. Its `lru` is not in use, because `pop` removed the page from its list.
            // `info` is initialised and pinned.
            unsafe { helpers::balloon_page_enqueue(self.info.get(), page) };
        }
    }

    /// Removes up to `max` pages from the balloon, 256 at most.
    ///
    /// May return fewer pages, even none, although the balloon has more: isolated pages cannot be
    /// removed.
    #[doc(alias = "balloon_page_list_dequeue")]
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

    /// Removes up to `max` pages under one acquisition of `balloon_pages_lock`, with interrupts
    /// disabled. Does not update `count`.
    fn dequeue_batch(&self, max: usize) -> BlockList<BalloonPage> {
        let mut pages = BlockList::new();
        let head = Opaque::<bindings::list_head>::uninit();
        // SAFETY: `head` stays in place while entries link to it: the loop below empties the list.
        // `info` is initialised and pinned.
        unsafe {
            bindings::INIT_LIST_HEAD(head.get());
            helpers::balloon_page_list_dequeue(self.info.get(), head.get(), max);
        }
        loop {
            // SAFETY: The list head was initialised above.
            let entry = unsafe { (*head.get()).next };
            if entry == head.get() {
                break pages;
            }
            // SAFETY: Each entry is the `lru` of a page that was removed from the balloon, and we
            // have the only reference to it. The page leaves the list before it is converted.
            let page = unsafe {
                helpers::vbrs_list_del(entry);
                NonNull::new_unchecked(helpers::vbrs_lru_to_page(entry))
            };
            // SAFETY: `page` is a single page, and we have the only reference to it.
            pages.push(BalloonPage(unsafe { PageBlock::from_page(page, 0) }));
        }
    }

    /// Removes up to `max` pages that are on `nodes` from the balloon. Returns `None` if no page of
    /// the balloon is on `nodes`.
    ///
    /// May return fewer pages, even none, although the balloon has more on `nodes`: isolated pages
    /// cannot be removed. May search all pages of the balloon. May sleep.
    #[doc(alias = "balloon_page_list_dequeue")]
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

    /// Removes all pages from the balloon and frees them.
    ///
    /// Waits for isolated pages, for as long as [`MigratePages::migrate`] takes. May sleep. The
    /// caller must ensure that no page is put into the balloon meanwhile.
    pub fn drain(&self) {
        // A page that `migrate` deflated is still isolated until the kernel has finished with
        // `info`.
        while self.count() > 0 || self.isolated() > 0 {
            let pages = self.dequeue(CHUNK);
            if pages.is_empty() {
                fsleep(Delta::from_millis(1));
            }
            drop(pages);
            cond_resched();
        }
    }

    /// Returns the number of isolated pages.
    fn isolated(&self) -> usize {
        // SAFETY: `info` is initialised, and the helper only reads one word.
        unsafe { helpers::vbrs_balloon_isolated(self.info.get()) as usize }
    }

    /// Returns the number of pages in the balloon, including isolated pages. Any context.
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
