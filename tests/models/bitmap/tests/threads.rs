// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Loom tests of concurrent hints, sending and dirty syncs, in every interleaving.

use bitmap_model::{DirtyBitmap, HintWindow, Layout, PageRun, Region, SyncPhase, PAGE_SIZE};
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// Number of pages: two words of bits, the second of which is partial.
const PAGES: u64 = 66;
/// The last page of the first word. The next page is the first of the second word.
const BORDER: u64 = 63;

fn all_dirty() -> HintWindow {
    let region = Region::new(0, PAGES * PAGE_SIZE).unwrap();
    let sync = SyncPhase::new(&Layout::from_regions([region]).unwrap().into()).unwrap();
    sync.set_all();
    sync.finish()
}

fn run(first: u64, pages: u64) -> PageRun {
    let block = 0;
    PageRun {
        block,
        first,
        pages,
    }
}

fn hint(window: &HintWindow, first: u64, pages: u64) -> u64 {
    let hinted = window.hint(first * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
    assert_eq!(hinted.pages, pages);
    hinted.cleared
}

/// Returns the number of pages in `runs`, which come from the bits and not from the counts.
fn number(runs: impl Iterator<Item = PageRun>) -> u64 {
    runs.map(|run| run.pages).sum()
}

fn counts_are_exact(bitmap: &DirtyBitmap) {
    assert_eq!(bitmap.dirty_pages(), number(bitmap.dirty_runs()));
    assert_eq!(bitmap.skipped_pages(), number(bitmap.skipped_runs()));
}

/// Two hints overlap, and a sender takes pages of both. Each page is counted exactly once.
#[test]
fn r12_hints_and_sending_count_each_page_once_in_any_order() {
    loom::model(|| {
        let window = Arc::new(all_dirty());
        let other = Arc::clone(&window);
        let hints = thread::spawn(move || hint(&other, 0, BORDER + 1));
        let other = Arc::clone(&window);
        let sender = thread::spawn(move || other.bitmap().take(run(BORDER - 1, 3)));
        let hinted = hint(&window, BORDER, 3);
        let (sent, more) = (sender.join().unwrap(), hints.join().unwrap());
        assert_eq!(hinted + more + sent, PAGES);
        assert_eq!(window.bitmap().dirty_pages(), 0);
        assert_eq!(window.bitmap().skipped_pages(), hinted + more);
        counts_are_exact(window.bitmap());
    });
}

/// A thread that reads a count of 0 ends the iteration, so no bit may be set then.
#[test]
fn r12_a_count_of_nothing_is_never_seen_while_a_bit_is_set() {
    loom::model(|| {
        let window = Arc::new(all_dirty());
        hint(&window, 0, BORDER);
        let other = Arc::clone(&window);
        let hints = thread::spawn(move || hint(&other, BORDER, 2));
        let other = Arc::clone(&window);
        let sender = thread::spawn(move || other.bitmap().take(run(BORDER + 1, 2)));
        let bitmap = window.bitmap();
        if bitmap.dirty_pages() == 0 {
            assert_eq!(bitmap.dirty_runs().next(), None);
        }
        hints.join().unwrap();
        sender.join().unwrap();
        assert_eq!(bitmap.dirty_pages(), 0);
        counts_are_exact(bitmap);
    });
}

/// A guest page: its content, and the kernel's record that the guest has written it.
struct Page {
    value: AtomicU64,
    written: AtomicU64,
}

/// The guest writes a page while one thread sends it and another hints the next page. Then a dirty sync runs, possibly
/// while the sender still runs. The written content was sent, or the page is dirty, or the next dirty sync marks it.
#[test]
fn r6_no_page_that_was_written_after_the_sync_is_lost_in_any_order() {
    loom::model(|| {
        let page = Arc::new(Page {
            value: AtomicU64::new(1),
            written: AtomicU64::new(0),
        });
        let window = all_dirty();
        let bitmap = window.bitmap().clone();
        let sent = Arc::new(Mutex::new(0));

        let guest = thread::spawn({
            let page = Arc::clone(&page);
            move || {
                page.value.store(2, Ordering::Relaxed);
                page.written.fetch_or(1, Ordering::AcqRel);
            }
        });
        let sender = thread::spawn({
            let (page, sent) = (Arc::clone(&page), Arc::clone(&sent));
            let bitmap = bitmap.clone();
            move || {
                if bitmap.take(run(BORDER, 1)) == 1 {
                    *sent.lock().unwrap() = page.value.load(Ordering::Relaxed);
                }
            }
        });
        hint(&window, BORDER + 1, 1);
        let sync = window.close();
        if page.written.swap(0, Ordering::AcqRel) == 1 {
            sync.mark(run(BORDER, 1));
        }
        let window = sync.finish();
        sender.join().unwrap();
        guest.join().unwrap();

        let there = *sent.lock().unwrap();
        let to_come = page.written.load(Ordering::Acquire) == 1;
        let dirty = bitmap
            .dirty_runs()
            .any(|run| run.first <= BORDER && run.end() > BORDER);
        assert!(there == 2 || dirty || to_come, "the guest's write is lost");
        assert_eq!(window.bitmap().dirty_pages(), number(bitmap.dirty_runs()));
    });
}

/// A sender takes pages while a dirty sync marks them. Each page is taken after the mark or stays dirty, and the counts
/// are exact when both have ended.
#[test]
fn r12_marking_and_sending_at_once_do_not_make_counts_drift() {
    const HINTED: u64 = 8;
    loom::model(|| {
        let window = all_dirty();
        hint(&window, 0, HINTED);
        let bitmap = window.bitmap().clone();
        let sender = thread::spawn({
            let bitmap = bitmap.clone();
            move || bitmap.take(run(BORDER, 2))
        });
        let sync = window.close();
        let marked = sync.mark(run(BORDER, 2));
        let sent = sender.join().unwrap();
        assert_eq!(sent, 2);
        assert_eq!(bitmap.dirty_pages(), PAGES - HINTED - sent + marked);
        assert_eq!(bitmap.dirty_pages(), number(bitmap.dirty_runs()));
        // After everything is sent, the counts are as with one thread.
        bitmap.take(run(0, PAGES));
        assert_eq!(bitmap.dirty_pages(), 0);
        assert_eq!(bitmap.skipped_pages(), HINTED);
        counts_are_exact(sync.bitmap());
    });
}

/// A thread that sees a bit set by a dirty sync does not read a count of 0.
#[test]
fn r12_a_bit_that_a_sync_has_set_is_counted_as_soon_as_it_can_be_seen() {
    loom::model(|| {
        let window = all_dirty();
        window.bitmap().take(run(0, PAGES));
        let bitmap = window.bitmap().clone();
        let reader = thread::spawn(move || {
            if bitmap.dirty_runs().next().is_some() {
                assert_ne!(bitmap.dirty_pages(), 0);
            }
        });
        let sync = window.close();
        sync.mark(run(BORDER, 2));
        reader.join().unwrap();
        assert_eq!(sync.bitmap().dirty_pages(), 2);
    });
}
