// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Measures how long commands of QMP clients wait for the device while a guest keeps it busy. Prints the figures; run it
//! with `--ignored --nocapture`. What bounds them is tested by counts in `src/device/tests/turns.rs`.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::program::Program;
use common::{QmpClient, Vmm};
use serde_json::json;
use shared_abi::features::Features;
use shared_abi::queue::Queue;

const HINT: Features = Features::STATS_VQ.union(Features::FREE_PAGE_HINT);

/// Queries the balloon while `busy` is set, and returns the longest time and the number of answers.
fn longest_wait(qmp: &mut QmpClient, busy: &AtomicBool) -> (Duration, u32) {
    let (mut longest, mut count) = (Duration::ZERO, 0);
    while busy.load(Ordering::Acquire) {
        let start = Instant::now();
        qmp.run("query-balloon");
        longest = longest.max(start.elapsed());
        count += 1;
    }
    (longest, count)
}

#[test]
#[ignore = "prints figures, and judges nothing"]
fn the_wait_of_commands() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(HINT);
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    let (mut other, busy) = (QmpClient::connect(&program.qmp), AtomicBool::new(true));

    vmm.share_sparse(16 << 40);
    thread::scope(|scope| {
        let querying = scope.spawn(|| longest_wait(&mut other, &busy));
        let start = Instant::now();
        let answer = qmp.execute("free-page-hint-start", &json!({}));
        assert!(answer.get("return").is_some(), "{answer}");
        let taken = start.elapsed();
        busy.store(false, Ordering::Release);
        let (longest, count) = querying.join().unwrap();
        println!(
            "free-page-hint-start of 16 TiB took {taken:?}; longest of {count} queries beside it: {longest:?}"
        );
    });

    let pfns: Vec<u8> = (0..1u32 << 16)
        .flat_map(|number| ((Vmm::SPARSE >> 12) as u32 + 2 * number).to_le_bytes())
        .collect();
    vmm.write(Vmm::FREE, &pfns);
    busy.store(true, Ordering::Release);
    thread::scope(|scope| {
        let querying = scope.spawn(|| longest_wait(&mut other, &busy));
        let start = Instant::now();
        for _ in 0..8 {
            vmm.post(Queue::Inflate, Vmm::FREE, pfns.len() as u32, false);
        }
        vmm.wait_used(Queue::Inflate);
        let taken = start.elapsed();
        busy.store(false, Ordering::Release);
        let (longest, count) = querying.join().unwrap();
        println!(
            "8 requests of 65536 scattered pages took {taken:?}; longest of {count} queries beside them: {longest:?}"
        );
    });
}
