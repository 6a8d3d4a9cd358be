// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the program as a process: signals, sockets, idle time.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::program::Program;
use common::{QmpClient, Vmm, HANG_TIMEOUT};
use rustix::process::{Resource, Signal};
use serde_json::json;
use shared_abi::features::Features;
use shared_abi::queue::Queue;

const HINT: Features = Features::STATS_VQ.union(Features::FREE_PAGE_HINT);

fn empty(directory: &Path) -> bool {
    directory.read_dir().unwrap().next().is_none()
}

#[test]
fn signals_end_it_and_take_its_sockets() {
    for signal in [Signal::TERM, Signal::INT] {
        let directory = tempfile::tempdir().unwrap();
        let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
        let mut vmm = Vmm::connect(&program.socket);
        vmm.start_driver(HINT);
        program.signal(signal);
        let (output, log) = program.finish();
        assert!(output.status.success(), "{log}");
        assert!(log.contains("shutdown requested"), "{log}");
        assert!(empty(directory.path()));
    }
}

#[test]
fn a_limit_of_file_sizes_fails_the_command_and_not_the_program() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &[]).ready();
    program.limit_all(Resource::Fsize, 10);
    let mut qmp = QmpClient::connect(&program.qmp);
    let file = directory.path().join("state");
    let (_, why) = qmp.fail("save-device-state", &json!({ "filename": file }));
    assert!(why.contains("File too large"), "{why}");
    qmp.run("query-version");
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    assert!(empty(directory.path()));
}

#[test]
fn r13_a_second_program_is_refused_and_a_dead_one_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let first = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let (output, log) = Program::start(directory.path(), &[]).finish();
    assert_eq!(output.status.code(), Some(1));
    assert!(log.contains("is in use by a running process"), "{log}");

    // The first program still works. Then it is killed during a hint round.
    let mut vmm = Vmm::connect(&first.socket);
    vmm.start_driver(HINT);
    let mut qmp = QmpClient::connect(&first.qmp);
    qmp.until_running();
    qmp.run("free-page-hint-start");
    first.signal(Signal::KILL);
    first.finish();
    assert!(!empty(directory.path()));
    let third = Program::start(directory.path(), &[]).ready();
    third.signal(Signal::TERM);
    let (output, log) = third.finish();
    assert!(output.status.success(), "{log}");
    assert!(log.contains("stale socket"), "{log}");
    assert!(empty(directory.path()));
}

#[test]
fn a_front_end_that_disconnects_during_a_hint_round_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(HINT);
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    qmp.run("free-page-hint-start");
    drop(vmm);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    assert!(log.contains("hint round 0x80000000 ended"), "{log}");
    assert!(log.contains("front end closed the connection"), "{log}");
    assert!(empty(directory.path()));
}

/// Returns context switches and CPU time in clock ticks of each thread of a process.
fn activity(id: u32) -> BTreeMap<OsString, (u64, u64)> {
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{id}/task")).unwrap() {
        let task = task.unwrap();
        // A thread may end while its files are read.
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let switches = read("status")
            .lines()
            .filter(|line| line.contains("ctxt_switches"))
            .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
            .sum();
        let stat = read("stat");
        let fields = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let ticks = fields
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        threads.insert(task.file_name(), (switches, ticks));
    }
    threads
}

#[test]
fn r1_it_sleeps_while_a_hint_round_waits_for_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(HINT);
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    let id = qmp.run("free-page-hint-start")["id"].as_u64().unwrap() as u32;
    vmm.send(Queue::FreePage, &id.to_le_bytes());
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "started" }));
    // The program has some work left before it sleeps, and a busy host may delay that. After that it does nothing.
    let limit = Instant::now() + HANG_TIMEOUT;
    loop {
        let before = activity(program.id());
        thread::sleep(Duration::from_millis(500));
        let after = activity(program.id());
        if before == after {
            break;
        }
        assert!(
            Instant::now() < limit,
            "context switches and CPU time of an idle device: {before:?}, {after:?}"
        );
    }
    vmm.offer(Queue::FreePage, Vmm::FREE, 0x1000, true);
    assert_eq!(qmp.run("query-free-page-hint")["blocks"], 1);
    program.signal(Signal::TERM);
    assert!(program.finish().0.status.success());
}

#[test]
fn r17_the_log_says_once_why_nothing_is_discarded() {
    let keeps = Features::KEEPS_HINTED_UNTIL_RETURNED;
    for (accepted, said, discarded) in [(HINT, 1, 0), (HINT | keeps, 0, 0x10_0000)] {
        let directory = tempfile::tempdir().unwrap();
        let program = Program::start(directory.path(), &["--discard-hinted"]).ready();
        let mut vmm = Vmm::connect(&program.socket);
        assert!(vmm.offered().contains(HINT | keeps));
        let mut qmp = QmpClient::connect(&program.qmp);
        for _ in 0..2 {
            vmm.start_driver(accepted);
            // Until the device has seen that the queues restarted, it may take the new driver for the previous one.
            vmm.send(Queue::FreePage, &[0; 4]);
            let id = qmp.run("free-page-hint-start")["id"].as_u64().unwrap() as u32;
            vmm.send(Queue::FreePage, &id.to_le_bytes());
            vmm.offer(Queue::FreePage, Vmm::FREE, 0x8_0000, true);
            qmp.run("free-page-hint-done");
            vmm.stop_driver();
        }
        let state = qmp.run("query-free-page-hint");
        assert_eq!(state["bytes-discarded"], discarded, "{state}");
        drop(vmm);
        let (output, log) = program.finish();
        assert!(output.status.success(), "{log}");
        assert_eq!(log.matches("is not discarded").count(), said, "{log}");
    }
}

#[test]
fn r9_a_fresh_program_goes_on_from_the_state_of_another() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("state.json");
    let features = HINT | Features::PAGE_POISON;
    let options = ["--free-page-hint", "--page-poison"];
    fs::write(&file, "the state of yesterday").unwrap();

    let here = tempfile::tempdir().unwrap();
    let program = Program::start(here.path(), &options).ready();
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(features);
    vmm.write_config(12, &0xaaaa_aaaau32.to_le_bytes());
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    let id = qmp.run("free-page-hint-start")["id"].as_u64().unwrap();
    qmp.run("free-page-hint-done");
    let nowhere = directory.path().join("no/state.json");
    let (_, why) = qmp.fail("save-device-state", &json!({ "filename": nowhere }));
    assert!(why.contains("no/state.json: No such file"), "{why}");
    let answer = qmp.execute("save-device-state", &json!({ "filename": file }));
    assert!(answer.get("return").is_some(), "{answer}");
    let shown = qmp.run("query-device-state");
    let written: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(shown, written);
    assert_eq!(directory.path().read_dir().unwrap().count(), 1);
    drop(vmm);
    program.finish();

    let there = tempfile::tempdir().unwrap();
    let state = ["--device-state", file.to_str().unwrap()];
    let program = Program::start(there.path(), &[&options[..], &state].concat()).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    assert_eq!(qmp.run("query-device-state"), written);
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(features);
    assert_eq!(vmm.config(16)[12..], 0xaaaa_aaaau32.to_le_bytes());
    qmp.until_running();
    assert_eq!(qmp.run("free-page-hint-start")["id"], id + 1);
    drop(vmm);
    assert!(program.finish().0.status.success());
}

#[test]
fn r9_a_bad_file_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let good = json!({
        "device": "virtio-balloon", "version": 1, "negotiated-features": null, "num-pages": 0,
        "actual": 0, "poison-val": 0, "command-id": 0, "next-hint-id": 0x8000_0000u32,
    });
    let with = |key: &str, value: serde_json::Value| {
        let mut state = good.clone();
        state[key] = value;
        state.to_string()
    };
    let cases = [
        (String::new(), "is not a saved device state: EOF"),
        (
            good.to_string()[..60].to_owned(),
            "is not a saved device state: EOF",
        ),
        ("x".repeat(70_000), "longer than 65536 bytes"),
        (with("version", json!(2)), "has version 2"),
        (with("device", json!("toaster")), "of a 'toaster'"),
        (
            with("poison-val", json!(-1)),
            "is not a saved device state: invalid value",
        ),
        (with("wings", json!(2)), "unknown field `wings`"),
        (with("next-hint-id", json!(1)), "next hint id 0x1"),
        (
            with("negotiated-features", json!(["page-poison"])),
            "uses page-poison",
        ),
    ];
    for (text, word) in cases {
        let file = directory.path().join("state");
        fs::write(&file, &text).unwrap();
        let here = tempfile::tempdir().unwrap();
        let state = ["--device-state", file.to_str().unwrap()];
        let (output, log) = Program::start(here.path(), &state).finish();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(log.contains(word), "{text}: {log}");
        assert!(empty(here.path()));
    }
}

#[test]
fn help_explains_features_and_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-device-balloon"))
        .arg("--help")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for word in [
        "free-page-reporting",
        "vhost-user-test-device-pci",
        "virtio_uml.device",
        "--persistent",
        "migrate_cancel",
        "--device-state",
        "--discard-hinted",
    ] {
        assert!(text.contains(word), "{word}");
    }
}

fn threads(id: u32) -> usize {
    fs::read_dir(format!("/proc/{id}/task")).unwrap().count()
}

/// Returns the resident memory of a process in bytes, without shared memory.
fn resident(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

/// Clients that send commands and close their side, but read nothing.
#[test]
fn clients_that_read_nothing_cost_bounded_threads_and_memory() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &[]).ready();
    let before = threads(program.id());
    let start = Instant::now();
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut qmp = QmpClient::connect_without_negotiation(&program.qmp);
        // The greeting or a refusal: the program has decided about this client.
        assert!(!qmp.read().is_null());
        let _ = qmp.try_send(b"{\"execute\":\"qmp_capabilities\"}");
        // As many as the socket takes.
        while qmp.send_some(b"{\"execute\":\"query-commands\"}").is_ok() {}
        let _ = qmp.writer().shutdown(std::net::Shutdown::Write);
        clients.push(qmp);
    }
    assert!(threads(program.id()) <= before + 32);
    let memory = resident(program.id());
    assert!(memory < 48 << 20, "{memory} bytes");
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
    // Of each kind, 30 lines and a summary in ten seconds: clients connect, are refused and disconnect.
    let intervals = 1 + start.elapsed().as_secs() / 10;
    let lines = log.lines().count() as u64;
    assert!(lines < 100 * intervals, "{lines} lines: {log}");
}

#[test]
fn the_memory_of_the_daemon_is_a_small_part_of_that_of_its_guest() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--free-page-hint"]).ready();
    let idle = resident(program.id());
    assert!(idle < 8 << 20, "{idle} bytes while idle");
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(HINT);
    let mut qmp = QmpClient::connect(&program.qmp);
    qmp.until_running();
    vmm.share_sparse(64 << 30);
    // A second hint round has another bitmap, and frees the first one.
    for _ in 0..3 {
        qmp.run("free-page-hint-start");
    }
    let pages = qmp.run("query-free-page-hint")["pages-total"].as_u64();
    assert!(pages.unwrap() >= 64 << 18);
    let large = resident(program.id());
    println!("idle: {idle} bytes; 64 GiB with a dirty bitmap: {large} bytes");
    assert!(large < 32 << 20, "{large} bytes with a guest of 64 GiB");
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert!(output.status.success(), "{log}");
}
