// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations of guests whose drivers lie. A guest can hurt itself only: whatever it says, the destination has each page that
//! it wrote, or the migration fails and says why; and nothing takes longer than its limit.

mod common;

use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{Operator, Running, Vmm, HANG_LIMIT, LENGTH, START};
use migration::stream::{Destination, Listener, Received, Receiver, ReceiverOptions, StreamError};
use serde_json::{json, Value};
use shared_abi::features::Features;
use shared_abi::queue::Queue;

/// Also the promise to keep hinted blocks, which these drivers break when they like.
const FEATURES: Features = Features::STATS_VQ
    .union(Features::FREE_PAGE_HINT)
    .union(Features::KEEPS_HINTED_UNTIL_RETURNED);
const PAGE: usize = 4096;
/// How long a migration waits for hints that do not come, or do not come to an end.
const SHORT: Duration = Duration::from_millis(300);
/// How long it waits where the driver says when it is done, however late that is.
const LONG: Duration = Duration::from_secs(600);

/// A guest whose memory is full, on its way to a destination, and asked for its free pages.
struct Migration {
    server: Running,
    operator: Operator,
    vmm: Vmm,
    there: PathBuf,
    receiver: JoinHandle<Result<Received, StreamError>>,
    /// The id under which it was asked.
    id: u32,
}

/// What came of it.
struct Moved {
    status: Value,
    here: Vec<u8>,
    there: Vec<u8>,
}

impl Migration {
    /// The driver will say when it is done.
    fn begin() -> Self {
        Self::waiting(LONG)
    }

    /// It waits so long for hints.
    fn waiting(limit: Duration) -> Self {
        let server = Running::start(FEATURES, false);
        let mut operator = server.operator();
        let mut vmm = Vmm::connect(&server.socket());
        vmm.start_driver(FEATURES);
        operator.until_running();
        for page in (Vmm::FREE..START + LENGTH).step_by(PAGE) {
            vmm.write(page, &page.to_le_bytes().repeat(PAGE / 8));
        }
        let folder = server.directory.path();
        let (socket, there) = (folder.join("ram.sock"), folder.join("there"));
        let uri = format!("unix:{}", socket.display());
        // It listens before anybody is told of it.
        let listener = Listener::bind(&uri.parse().unwrap()).unwrap();
        let destination = Destination::single(&there);
        let receiver = Receiver::new(listener, destination, ReceiverOptions::default()).unwrap();
        let receiver = thread::spawn(move || receiver.run());
        // Nobody has to pause this guest: it does nothing but what the test does.
        ok(
            &mut operator,
            "migrate-set-capabilities",
            &json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": true }] }),
        );
        ok(
            &mut operator,
            "migrate-set-parameters",
            &json!({ "free-page-hint-wait": limit.as_millis() as u64 }),
        );
        ok(&mut operator, "migrate", &json!({ "uri": uri }));
        vmm.config_change();
        let id = vmm.command();
        assert!(id >= 0x8000_0000, "{id:#x}");
        Self {
            server,
            operator,
            vmm,
            there,
            receiver,
            id,
        }
    }

    fn say(&mut self, id: u32) {
        self.vmm.send(Queue::FreePage, &id.to_le_bytes());
    }

    fn hint(&mut self, address: u64, length: u32) {
        self.vmm.offer(Queue::FreePage, address, length, true);
    }

    /// Says what the device waits for, and that this is all.
    fn end_honestly(&mut self) {
        self.say(self.id);
        self.say(0);
    }

    /// Lets it go on to its end.
    fn finish(mut self) -> Moved {
        self.operator
            .event("MIGRATION", &json!({ "status": "pre-switchover" }));
        ok(
            &mut self.operator,
            "migrate-continue",
            &json!({ "state": "pre-switchover" }),
        );
        self.operator
            .event("MIGRATION", &json!({ "status": "completed" }));
        let status = self.operator.run("query-migrate");
        self.receiver.join().unwrap().unwrap();
        let here = self.vmm.bytes();
        let there = std::fs::read(&self.there).unwrap();
        std::fs::remove_file(&self.there).unwrap();
        drop(self.vmm);
        self.server.join().unwrap();
        println!("{status}");
        Moved {
            status,
            here,
            there,
        }
    }
}

fn ok(operator: &mut Operator, command: &str, arguments: &Value) {
    let answer = operator.execute(command, arguments);
    assert!(answer.get("return").is_some(), "{command}: {answer}");
}

impl Moved {
    /// The addresses of pages that differ.
    fn different(&self) -> Vec<u64> {
        assert_eq!(self.here.len(), self.there.len());
        let pages = self.here.chunks(PAGE).zip(self.there.chunks(PAGE));
        let pages = (0..).step_by(PAGE).zip(pages);
        pages
            .filter(|(_, (here, there))| here != there)
            .map(|(address, _)| address)
            .collect()
    }

    fn is_whole(&self) {
        let different = self.different();
        assert!(different.is_empty(), "{different:x?}: {}", self.status);
    }

    /// Returns the wait for hints, summed over all iterations.
    fn waited(&self) -> Duration {
        let rounds = self.status["rounds"].as_array().unwrap();
        let waits = rounds.iter().map(|round| round["hint-wait-us"].as_u64());
        waits.map(|wait| Duration::from_micros(wait.unwrap())).sum()
    }

    fn pages(&self, name: &str) -> u64 {
        self.status["ram"][name].as_u64().unwrap()
    }

    /// What the guest has written of itself is what the destination has.
    fn holds(&self, address: u64, content: u64) {
        let at = address as usize;
        let page = &self.there[at..at + PAGE];
        assert_eq!(page, content.to_le_bytes().repeat(PAGE / 8), "{address:#x}");
    }
}

/// The others lie; this one shows that hints count when they do not.
#[test]
fn r15_an_honest_driver_spares_its_pages() {
    let mut migration = Migration::begin();
    migration.say(migration.id);
    migration.hint(Vmm::FREE, 0x10_0000);
    migration.say(0);
    let moved = migration.finish();
    moved.is_whole();
    assert_eq!(moved.pages("skipped"), 0x100);
    assert_eq!(moved.here[Vmm::FREE as usize], 0, "it was discarded");
    assert!(moved.waited() < LONG, "{}", moved.status);
}

#[test]
fn r14_a_driver_that_never_answers_is_waited_for_no_longer_than_the_limit() {
    let moved = Migration::waiting(SHORT).finish();
    moved.is_whole();
    moved.holds(Vmm::FREE, Vmm::FREE);
    assert_eq!(moved.pages("skipped"), 0);
    // A wait without a limit would never end.
    assert!(moved.waited() >= SHORT, "{}", moved.status);
}

#[test]
fn r14_a_driver_that_hints_without_end_is_waited_for_no_longer_than_the_limit() {
    let mut migration = Migration::waiting(SHORT);
    migration.say(migration.id);
    let end = Instant::now() + HANG_LIMIT;
    while migration.operator.run("query-migrate")["status"] != "pre-switchover" {
        assert!(Instant::now() < end, "it waits as long as hints come");
        migration.hint(Vmm::FREE + 0x20_0000, 0x1000);
    }
    let moved = migration.finish();
    moved.is_whole();
    assert!(moved.waited() >= SHORT, "{}", moved.status);
}

#[test]
fn r2_r8_hints_under_ids_that_nobody_asked_for_spare_nothing() {
    for wrong in [0x8000_0000 | 0x7abc_def0, 2, 1, 0x7fff_ffff, u32::MAX] {
        let mut migration = Migration::begin();
        if wrong == migration.id {
            continue;
        }
        migration.say(wrong);
        migration.hint(Vmm::FREE, 0x10_0000);
        migration.say(0);
        migration.end_honestly();
        let moved = migration.finish();
        moved.is_whole();
        moved.holds(Vmm::FREE, Vmm::FREE);
        assert_eq!(moved.pages("skipped"), 0, "{wrong:#x}");
    }
}

#[test]
fn r2_hints_before_the_id_and_after_the_stop_spare_nothing() {
    let mut migration = Migration::begin();
    migration.hint(Vmm::FREE, 0x10_0000);
    migration.say(migration.id);
    migration.say(0);
    migration.hint(Vmm::FREE + 0x10_0000, 0x10_0000);
    let moved = migration.finish();
    moved.is_whole();
    moved.holds(Vmm::FREE, Vmm::FREE);
    moved.holds(Vmm::FREE + 0x10_0000, Vmm::FREE + 0x10_0000);
    assert_eq!(moved.pages("skipped"), 0);
}

#[test]
fn r5_hints_outside_memory_or_across_its_end_are_applied_nowhere_else() {
    let mut migration = Migration::begin();
    migration.say(migration.id);
    for (address, length) in [
        (0, 0x1000),
        (START - 0x10_0000, 0x8_0000),
        (START + LENGTH, 0x1000),
        (START + LENGTH + 0x1000_0000, 0x10_0000),
        (u64::MAX - 0xfff, 0x1000),
        (u64::MAX - 0xfff, 0x2000),
        (0x8000_0000_0000_0000, u32::MAX),
        (Vmm::FREE + 1, 0xffe),
        (Vmm::FREE, 0),
    ] {
        migration.vmm.post(Queue::FreePage, address, length, true);
        migration.vmm.wait_used(Queue::FreePage);
    }
    // Half of it is memory, and counts; it goes on at no other place.
    migration
        .vmm
        .post(Queue::FreePage, START + LENGTH - 0x10_0000, 0x20_0000, true);
    migration.vmm.wait_used(Queue::FreePage);
    migration.say(0);
    let moved = migration.finish();
    moved.is_whole();
    moved.holds(Vmm::FREE, Vmm::FREE);
    moved.holds(START + LENGTH - 0x10_1000, START + LENGTH - 0x10_1000);
    assert!(moved.pages("skipped") <= 0x100, "{}", moved.status);
}

#[test]
fn r6_r17_a_page_that_is_written_after_its_hint_is_at_the_destination() {
    const MINE: u64 = 0x1122_3344_5566_7788;
    let mut migration = Migration::begin();
    migration.say(migration.id);
    for block in 0..8 {
        let address = Vmm::FREE + block * 0x2_0000;
        if block % 2 == 0 {
            migration.hint(address, 0x2_0000);
        } else {
            // It does not even wait until the device has seen the hint.
            migration.vmm.post(Queue::FreePage, address, 0x2_0000, true);
        }
        // Its old content as well: a page that holds what it always held must not pass for one that was left alone.
        migration
            .vmm
            .write(address, &address.to_le_bytes().repeat(PAGE / 8));
        migration
            .vmm
            .write(address + 0x1000, &MINE.to_le_bytes().repeat(PAGE / 8));
        // Until the device is done with it, what it does to the page is the driver's own fault.
        migration.vmm.wait_used(Queue::FreePage);
        migration
            .vmm
            .write(address, &address.to_le_bytes().repeat(PAGE / 8));
        migration
            .vmm
            .write(address + 0x1000, &MINE.to_le_bytes().repeat(PAGE / 8));
    }
    migration.say(0);
    let moved = migration.finish();
    moved.is_whole();
    for block in 0..8 {
        let address = Vmm::FREE + block * 0x2_0000;
        moved.holds(address, address);
        moved.holds(address + 0x1000, MINE);
    }
    assert_eq!(moved.pages("skipped"), 8 * 0x1e);
}

/// The device makes a page zero that holds the very ring through which it was told to. What the guest loses is its own.
#[test]
fn r17_a_driver_that_hints_its_own_rings_hurts_itself_only() {
    let mut migration = Migration::begin();
    migration.say(migration.id);
    migration.vmm.post(Queue::FreePage, START, 0x10_0000, true);
    // The ring does not tell when the device is done with it.
    let end = Instant::now() + HANG_LIMIT;
    while migration.operator.run("query-free-page-hint")["blocks"] != 1 {
        assert!(Instant::now() < end, "the hint does not count");
        thread::sleep(Duration::from_millis(1));
    }
    migration.say(0);
    let moved = migration.finish();
    moved.is_whole();
    moved.holds(Vmm::FREE, Vmm::FREE);
}
