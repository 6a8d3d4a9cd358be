// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the hinting rules (`docs/rules.md`) against a model that handles each page separately.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use guest_migration::{
    HintError, HintWindow, Layout, PageRun, RamBlock, Region, SyncPhase, PAGE_SIZE,
};
use proptest::prelude::*;

/// Most test ranges start below this page number.
const SPACE: u64 = 400;

/// Generates layouts from gaps and lengths, in pages. A gap of 0 makes adjacent regions.
///
/// All regions map one RAM block, some with unmapped pages between them. With `turned`, their order in the RAM block is
/// reversed.
fn layouts() -> impl Strategy<Value = Arc<Layout>> {
    let pieces = prop::collection::vec((0u64..40, 1u64..150, 0u64..5), 1..4);
    (pieces, any::<bool>()).prop_map(|(pieces, turned)| {
        let (mut at, mut offset) = (0, 0);
        let mut places: Vec<_> = pieces
            .iter()
            .map(|(_, pages, hidden)| {
                let place = offset + hidden;
                offset = place + pages;
                place
            })
            .collect();
        let block = RamBlock::new("ram", offset * PAGE_SIZE).unwrap();
        let end = offset;
        if turned {
            for (place, (_, pages, _)) in places.iter_mut().zip(&pieces) {
                *place = end - *place - pages;
            }
        }
        let regions = pieces.iter().zip(places).map(|((gap, pages, _), place)| {
            let start = at + gap;
            at = start + pages;
            Region::new(start * PAGE_SIZE, pages * PAGE_SIZE)
                .unwrap()
                .backed_by(0, place * PAGE_SIZE)
        });
        Arc::new(Layout::new([block], regions).unwrap())
    })
}

/// Generates byte ranges: aligned and unaligned, short and long, at both ends of the address space.
fn ranges() -> impl Strategy<Value = (u64, u64)> {
    let start = prop_oneof![
        4 => (0..SPACE).prop_map(|page| page * PAGE_SIZE),
        3 => 0..SPACE * PAGE_SIZE,
        1 => (u64::MAX - 3 * PAGE_SIZE)..=u64::MAX,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => (0..64u64).prop_map(|pages| pages * PAGE_SIZE),
        3 => 0..64 * PAGE_SIZE,
        1 => any::<u64>(),
    ];
    (start, length)
}

/// Returns the guest page numbers of all regions.
fn pages_of(layout: &Layout) -> BTreeSet<u64> {
    layout
        .regions()
        .iter()
        .flat_map(|region| region.start() / PAGE_SIZE..region.end() / PAGE_SIZE)
        .collect()
}

/// Returns the guest page numbers at which regions map the pages `run` of the RAM block.
fn shown(layout: &Layout, run: PageRun) -> impl Iterator<Item = u64> + '_ {
    layout.regions().iter().flat_map(move |region| {
        let offset = region.offset() / PAGE_SIZE;
        (run.first..run.end())
            .filter(move |page| (offset..offset + region.length() / PAGE_SIZE).contains(page))
            .map(move |page| region.start() / PAGE_SIZE + page - offset)
    })
}

/// Returns the dirty guest pages from the runs of the bitmap. Asserts that the runs ascend and are maximal.
fn dirty(window: &HintWindow) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let mut last = None;
    for run in window.bitmap().dirty_runs() {
        assert!(run.pages > 0);
        assert!(last.is_none_or(|last| last < run.first), "runs ascend");
        last = Some(run.end());
        pages.extend(shown(window.bitmap().layout(), run));
    }
    pages
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn r5_r11_r12_hints_clear_exactly_the_whole_pages_inside(
        layout in layouts(),
        clean in prop::collection::vec(ranges(), 0..4),
        hints in prop::collection::vec(ranges(), 1..20),
    ) {
        let memory = pages_of(&layout);
        let mut model = memory.clone();
        let sync = SyncPhase::new(&layout).unwrap();
        sync.set_all();
        let hidden = sync.bitmap().pages() - memory.len() as u64;
        prop_assert_eq!(sync.bitmap().pages(), layout.pages());
        let window = sync.finish();

        for (start, length) in clean.into_iter().chain(hints) {
            let before = model.len();
            match window.hint(start, length) {
                Ok(hinted) => {
                    let end = start + length;
                    let inside = |page: &u64| page * PAGE_SIZE >= start && (page + 1) * PAGE_SIZE <= end;
                    let whole = memory.iter().filter(|page| inside(page)).count() as u64;
                    model.retain(|page| !inside(page));
                    prop_assert_eq!(hinted.pages, whole);
                    prop_assert_eq!(hinted.cleared, (before - model.len()) as u64);
                    prop_assert_eq!(hinted.ignored_bytes, length - whole * PAGE_SIZE);
                }
                Err(HintError::Wraps { .. }) => prop_assert!(start.checked_add(length).is_none()),
                Err(HintError::Outside { .. }) => {
                    let end = start + length;
                    let touches = |page: &u64| page * PAGE_SIZE < end && (page + 1) * PAGE_SIZE > start;
                    prop_assert!(!memory.iter().any(touches));
                }
            }
            prop_assert_eq!(window.bitmap().dirty_pages(), hidden + model.len() as u64);
            prop_assert_eq!(&dirty(&window), &model);
            let clean: u64 = window.bitmap().clean_runs().map(|run| run.pages).sum();
            prop_assert_eq!(clean, (memory.len() - model.len()) as u64);
        }
    }

    #[test]
    fn r12_a_sync_marks_every_page_that_was_touched(
        layout in layouts(),
        writes in prop::collection::vec(ranges(), 1..12),
    ) {
        let memory = pages_of(&layout);
        let mut model = BTreeSet::new();
        let sync = SyncPhase::new(&layout).unwrap();
        for (start, length) in writes {
            let before = model.len();
            if let Ok(marked) = sync.mark_dirty(start, length) {
                let end = start + length;
                let touched = |page: &&u64| length > 0 && **page * PAGE_SIZE < end && (**page + 1) * PAGE_SIZE > start;
                model.extend(memory.iter().filter(touched));
                prop_assert_eq!(marked, (model.len() - before) as u64);
            }
            prop_assert_eq!(sync.bitmap().dirty_pages(), model.len() as u64);
        }
        prop_assert_eq!(dirty(&sync.finish()), model);
    }
}

#[test]
fn r11_the_first_page_of_a_hint_is_its_start_and_the_count_its_length() {
    // Regression test: the start of the hint must not be computed from its length.
    let layout = Layout::from_regions([Region::new(0, 1024 * PAGE_SIZE).unwrap()])
        .unwrap()
        .into();
    let sync = SyncPhase::new(&layout).unwrap();
    sync.set_all();
    let window = sync.finish();
    let hinted = window.hint(100 * PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
    assert_eq!((hinted.pages, hinted.cleared), (3, 3));
    let clean: Vec<_> = window
        .bitmap()
        .clean_runs()
        .map(|run| (run.offset(), run.pages))
        .collect();
    assert_eq!(clean, [(100 * PAGE_SIZE, 3)]);
}

#[test]
fn r5_a_hint_is_never_applied_elsewhere() {
    // A region with a start that is only page-aligned, a hole, and a second region.
    let layout = Layout::from_regions([
        Region::new(0x3e_f000, 16 * PAGE_SIZE).unwrap(),
        Region::new(0x100_0000, 16 * PAGE_SIZE).unwrap(),
    ])
    .unwrap()
    .into();
    let sync = SyncPhase::new(&layout).unwrap();
    sync.set_all();
    let window = sync.finish();

    // A hint beyond the end of the first region, into the hole, is clamped.
    let hinted = window
        .hint(0x3e_f000 + 15 * PAGE_SIZE, 8 * PAGE_SIZE)
        .unwrap();
    assert_eq!((hinted.cleared, hinted.ignored_bytes), (1, 7 * PAGE_SIZE));
    // A hint across the hole clears pages in both regions, and none for the hole.
    let hinted = window
        .hint(0x3e_f000 + 14 * PAGE_SIZE, 0x100_1000 - 0x3f_d000)
        .unwrap();
    assert_eq!((hinted.pages, hinted.cleared), (3, 2));
    assert!(matches!(
        window.hint(0x1000, 0x1000),
        Err(HintError::Outside { .. })
    ));
    assert!(matches!(
        window.hint(0x100_0000, u64::MAX),
        Err(HintError::Wraps { .. })
    ));
    assert_eq!(window.bitmap().dirty_pages(), 29);
}

#[test]
fn r6_closing_the_window_waits_for_hints_under_way() {
    let layout = Layout::from_regions([Region::new(0, 4096 * PAGE_SIZE).unwrap()])
        .unwrap()
        .into();
    let sync = SyncPhase::new(&layout).unwrap();
    sync.set_all();
    let bitmap = sync.bitmap().clone();
    let window = RwLock::new(Some(sync.finish()));
    let synced = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (window, synced) = (&window, &synced);
            scope.spawn(move || loop {
                let window = window.read().unwrap();
                let Some(window) = window.as_ref() else {
                    break;
                };
                // No dirty sync can start while a thread has a reference to the window.
                assert!(!synced.load(Ordering::Acquire));
                let _ = window
                    .hint(thread * 64 * PAGE_SIZE, 64 * PAGE_SIZE)
                    .unwrap();
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        let closed = window.write().unwrap().take().unwrap().close();
        synced.store(true, Ordering::Release);
        closed.set_all();
    });
    assert_eq!(
        bitmap.dirty_pages(),
        4096,
        "no late hint took a bit that the sync set"
    );
}

#[test]
fn r12_hints_and_sending_at_once_count_each_page_once() {
    const PAGES: u64 = 100_000;
    let layout = Layout::from_regions([
        Region::new(0, PAGES / 2 * PAGE_SIZE).unwrap(),
        Region::new(PAGES * PAGE_SIZE, PAGES / 2 * PAGE_SIZE).unwrap(),
    ])
    .unwrap()
    .into();
    let sync = SyncPhase::new(&layout).unwrap();
    sync.set_all();
    let window = sync.finish();
    let (sent, hinted) = std::thread::scope(|scope| {
        let window = &window;
        let hints: Vec<_> = (0..3u64)
            .map(|thread| {
                scope.spawn(move || {
                    let starts = (thread * 7..2 * PAGES).step_by(37);
                    starts
                        .filter_map(|page| window.hint(page * PAGE_SIZE, 29 * PAGE_SIZE).ok())
                        .map(|hinted| hinted.cleared)
                        .sum::<u64>()
                })
            })
            .collect();
        let senders: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(move || {
                    let bitmap = window.bitmap();
                    let mut sent = 0;
                    while let Some(run) = bitmap.dirty_runs().next() {
                        sent += bitmap.take(run.chunks(5).next().unwrap());
                        assert!(bitmap.dirty_pages() <= PAGES);
                    }
                    sent
                })
            })
            .collect();
        let sum = |threads: Vec<std::thread::ScopedJoinHandle<'_, u64>>| -> u64 {
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        };
        (sum(senders), sum(hints))
    });
    assert_eq!(sent + hinted, PAGES);
    assert_eq!(window.bitmap().dirty_pages(), 0);
}
