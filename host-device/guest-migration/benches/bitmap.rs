// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Benchmark of the dirty bitmap of a 64 GiB guest on one core, compared with a plain sum and copy of as many bytes.
//!
//! After criterion's figures, the benchmark compares its own measurements with fixed limits, and fails if one exceeds
//! its limit.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput};
use guest_migration::{HintWindow, Layout, PageRun, Region, SyncPhase, PAGE_SIZE};

const GUEST: u64 = 64 << 30;
const HINT: u64 = 4 << 20;
/// Size of the guest's bitmap in bytes, with one bit for each page.
const BITMAP: usize = (GUEST / PAGE_SIZE / 8) as usize;

const HINTS_LIMIT: Duration = Duration::from_millis(5);
const SCAN_LIMIT: Duration = Duration::from_millis(1);

/// Returns the memory layout of a guest on a PC, with a hole below 4 GiB.
fn layout() -> Arc<Layout> {
    const LOW: u64 = 2 << 30;
    let low = Region::new(0, LOW).unwrap();
    let high = Region::new(4 << 30, GUEST - LOW).unwrap();
    Layout::from_regions([low, high]).unwrap().into()
}

fn all_dirty(layout: &Arc<Layout>) -> HintWindow {
    let sync = SyncPhase::new(layout).unwrap();
    sync.set_all();
    sync.finish()
}

/// Hints all guest memory, in consecutive hints of 4 MiB.
fn hint_all(window: &HintWindow) {
    for region in window.bitmap().layout().regions() {
        let mut at = region.start();
        while at < region.end() {
            let hinted = window.hint(at, HINT).unwrap();
            debug_assert_eq!(hinted.cleared, HINT / PAGE_SIZE);
            at += HINT;
        }
    }
}

/// Searches a clean bitmap for a dirty page.
fn scan(window: &HintWindow) -> Option<PageRun> {
    window.bitmap().dirty_runs().next()
}

fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

fn bitmap(criterion: &mut Criterion) {
    let layout = layout();
    let mut group = criterion.benchmark_group("64 GiB");
    group.throughput(Throughput::Bytes(BITMAP as u64));
    group.bench_function("4 MiB hints for all of it", |bencher| {
        let prepare = || all_dirty(&layout);
        bencher.iter_batched_ref(prepare, |window| hint_all(window), BatchSize::PerIteration);
    });
    let clean = all_dirty(&layout);
    hint_all(&clean);
    group.bench_function("next dirty page of an empty bitmap", |bencher| {
        bencher.iter(|| scan(black_box(&clean)));
    });
    let words = vec![1u64; BITMAP / 8];
    let mut copy = words.clone();
    group.bench_function("plain sum of as many bytes", |bencher| {
        bencher.iter(|| sum(black_box(&words)));
    });
    group.bench_function("plain copy of as many bytes", |bencher| {
        bencher.iter(|| black_box(&mut copy).copy_from_slice(black_box(&words)));
    });
    group.finish();
}

/// Returns the fastest time and the median of several runs.
///
/// The fastest time is that of an otherwise idle core. The median also shows how busy the machine is.
fn measure(mut once: impl FnMut() -> Duration) -> (Duration, Duration) {
    const TIMES: usize = 31;
    let mut all: Vec<Duration> = (0..TIMES).map(|_| once()).collect();
    all.sort();
    (all[0], all[TIMES / 2])
}

/// Measures hints and search, and asserts that the fastest times are within the limits.
fn limits() {
    let layout = layout();
    let (hints, hints_median) = measure(|| {
        let window = all_dirty(&layout);
        let start = Instant::now();
        hint_all(&window);
        let time = start.elapsed();
        assert_eq!(window.bitmap().dirty_pages(), 0);
        time
    });
    let clean = all_dirty(&layout);
    hint_all(&clean);
    let (scan, scan_median) = measure(|| {
        let start = Instant::now();
        assert_eq!(scan(black_box(&clean)), None);
        start.elapsed()
    });
    for (what, fastest, median, limit) in [
        ("4 MiB hints for 64 GiB", hints, hints_median, HINTS_LIMIT),
        (
            "next dirty page, none in 64 GiB",
            scan,
            scan_median,
            SCAN_LIMIT,
        ),
    ] {
        println!("{what}: {fastest:.2?} (median {median:.2?}), at most {limit:?}");
    }
    assert!(hints <= HINTS_LIMIT && scan <= SCAN_LIMIT, "too slow");
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    bitmap(&mut criterion);
    criterion.final_summary();
    // `cargo test --benches` only checks that the benchmark runs. Its build is not optimised.
    if !cfg!(debug_assertions) {
        limits();
    }
}
