// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations of guests with hostile drivers. A guest can harm only itself. Whatever the driver sends, either the
//! destination has each page that the guest wrote, or the migration fails with an error. No timeout is exceeded.

mod common;

use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{QmpClient, TestServer, Vmm, HANG_TIMEOUT, LENGTH, START};
use guest_migration::stream::{
    Destination, Listener, Received, Receiver, ReceiverOptions, StreamError,
};
use serde_json::{json, Value};
use shared_abi::features::Features;
use shared_abi::queue::Queue;

/// Includes the promise to keep hinted blocks. These drivers break it.
const FEATURES: Features = Features::STATS_VQ
    .union(Features::FREE_PAGE_HINT)
    .union(Features::KEEPS_HINTED_UNTIL_RETURNED);
const PAGE: usize = 4096;
/// The timeout for hints that never come or never end.
const SHORT: Duration = Duration::from_millis(300);
/// The timeout for hints of a driver that finishes its round, however late.
const LONG: Duration = Duration::from_secs(600);

/// A migration of a guest whose memory is full. The guest has been asked for hints.
struct Migration {
    server: TestServer,
    qmp: QmpClient,
    vmm: Vmm,
    destination_memory: PathBuf,
    receiver: JoinHandle<Result<Received, StreamError>>,
    /// The id of the hint round.
    id: u32,
}

/// The result of a migration.
struct MigrationResult {
    status: Value,
    source_memory: Vec<u8>,
    destination_memory: Vec<u8>,
}

impl Migration {
    /// Starts a migration whose driver finishes the hint round.
    fn begin() -> Self {
        Self::with_hint_timeout(LONG)
    }

    /// Starts a migration that waits for hints for at most `limit`. On a busy host a short limit may have passed before
    /// the test knows the command id. It then starts another migration.
    fn with_hint_timeout(limit: Duration) -> Self {
        let end = Instant::now() + HANG_TIMEOUT;
        loop {
            let migration = Self::start(limit);
            if migration.id >= 0x8000_0000 {
                return migration;
            }
            let id = migration.id;
            assert!(limit < LONG && Instant::now() < end, "{id:#x}");
        }
    }

    fn start(limit: Duration) -> Self {
        let server = TestServer::start(FEATURES, false);
        let mut qmp = server.qmp();
        let mut vmm = Vmm::connect(&server.socket());
        vmm.start_driver(FEATURES);
        qmp.until_running();
        for page in (Vmm::FREE..START + LENGTH).step_by(PAGE) {
            vmm.write(page, &page.to_le_bytes().repeat(PAGE / 8));
        }
        let folder = server.directory.path();
        let (socket, destination_memory) = (folder.join("ram.sock"), folder.join("there"));
        let uri = format!("unix:{}", socket.display());
        // The receiver listens before the migration knows its address.
        let listener = Listener::bind(&uri.parse().unwrap()).unwrap();
        let destination = Destination::with_file(&destination_memory);
        let receiver = Receiver::new(listener, destination, ReceiverOptions::default()).unwrap();
        let receiver = thread::spawn(move || receiver.run());
        // This guest needs no VMM to pause it: the test performs all of its writes.
        ok(
            &mut qmp,
            "migrate-set-capabilities",
            &json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": true }] }),
        );
        ok(
            &mut qmp,
            "migrate-set-parameters",
            &json!({ "free-page-hint-wait": limit.as_millis() as u64 }),
        );
        ok(&mut qmp, "migrate", &json!({ "uri": uri }));
        vmm.config_change();
        let id = vmm.cmd_id();
        Self {
            server,
            qmp,
            vmm,
            destination_memory,
            receiver,
            id,
        }
    }

    fn send_cmd_id(&mut self, id: u32) {
        self.vmm.send(Queue::FreePage, &id.to_le_bytes());
    }

    fn hint(&mut self, address: u64, length: u32) {
        self.vmm.offer(Queue::FreePage, address, length, true);
    }

    /// Sends the id that the device waits for, and STOP.
    fn end_honestly(&mut self) {
        self.send_cmd_id(self.id);
        self.send_cmd_id(0);
    }

    /// Lets the migration complete.
    fn finish(mut self) -> MigrationResult {
        self.qmp
            .event("MIGRATION", &json!({ "status": "pre-switchover" }));
        ok(
            &mut self.qmp,
            "migrate-continue",
            &json!({ "state": "pre-switchover" }),
        );
        self.qmp
            .event("MIGRATION", &json!({ "status": "completed" }));
        let status = self.qmp.run("query-migrate");
        self.receiver.join().unwrap().unwrap();
        let source_memory = self.vmm.bytes();
        let destination_memory = std::fs::read(&self.destination_memory).unwrap();
        std::fs::remove_file(&self.destination_memory).unwrap();
        drop(self.vmm);
        self.server.join().unwrap();
        println!("{status}");
        MigrationResult {
            status,
            source_memory,
            destination_memory,
        }
    }
}

fn ok(qmp: &mut QmpClient, command: &str, arguments: &Value) {
    let answer = qmp.execute(command, arguments);
    assert!(answer.get("return").is_some(), "{command}: {answer}");
}

impl MigrationResult {
    /// Returns the addresses of pages that differ.
    fn different(&self) -> Vec<u64> {
        assert_eq!(self.source_memory.len(), self.destination_memory.len());
        let pages = self
            .source_memory
            .chunks(PAGE)
            .zip(self.destination_memory.chunks(PAGE));
        let pages = (0..).step_by(PAGE).zip(pages);
        pages
            .filter(|(_, (source_memory, destination_memory))| source_memory != destination_memory)
            .map(|(address, _)| address)
            .collect()
    }

    fn is_whole(&self) {
        let different = self.different();
        assert!(different.is_empty(), "{different:x?}: {}", self.status);
    }

    /// Returns the wait for hints, summed over all iterations.
    fn waited(&self) -> Duration {
        let iterations = self.status["rounds"].as_array().unwrap();
        let waits = iterations
            .iter()
            .map(|iteration| iteration["hint-wait-us"].as_u64());
        waits.map(|wait| Duration::from_micros(wait.unwrap())).sum()
    }

    fn pages(&self, name: &str) -> u64 {
        self.status["ram"][name].as_u64().unwrap()
    }

    /// Checks that the page at the destination has the `content` that the guest wrote.
    fn holds(&self, address: u64, content: u64) {
        let at = address as usize;
        let page = &self.destination_memory[at..at + PAGE];
        assert_eq!(page, content.to_le_bytes().repeat(PAGE / 8), "{address:#x}");
    }
}

/// Shows that honest hints count. The drivers of the other tests are hostile.
#[test]
fn r15_an_honest_driver_spares_its_pages() {
    let mut migration = Migration::begin();
    migration.send_cmd_id(migration.id);
    migration.hint(Vmm::FREE, 0x10_0000);
    migration.send_cmd_id(0);
    let result = migration.finish();
    result.is_whole();
    assert_eq!(result.pages("skipped"), 0x100);
    assert_eq!(
        result.source_memory[Vmm::FREE as usize],
        0,
        "it was discarded"
    );
    assert!(result.waited() < LONG, "{}", result.status);
}

#[test]
fn r14_a_driver_that_never_answers_is_waited_for_no_longer_than_the_limit() {
    let result = Migration::with_hint_timeout(SHORT).finish();
    result.is_whole();
    result.holds(Vmm::FREE, Vmm::FREE);
    assert_eq!(result.pages("skipped"), 0);
    // A wait without a timeout would never end.
    assert!(result.waited() >= SHORT, "{}", result.status);
}

#[test]
fn r14_a_driver_that_hints_without_end_is_waited_for_no_longer_than_the_limit() {
    let mut migration = Migration::with_hint_timeout(SHORT);
    migration.send_cmd_id(migration.id);
    let end = Instant::now() + HANG_TIMEOUT;
    while migration.qmp.run("query-migrate")["status"] != "pre-switchover" {
        assert!(Instant::now() < end, "it waits as long as hints come");
        migration.hint(Vmm::FREE + 0x20_0000, 0x1000);
    }
    let result = migration.finish();
    result.is_whole();
    assert!(result.waited() >= SHORT, "{}", result.status);
}

#[test]
fn r2_r8_hints_under_ids_that_nobody_asked_for_spare_nothing() {
    for wrong in [0x8000_0000 | 0x7abc_def0, 2, 1, 0x7fff_ffff, u32::MAX] {
        let mut migration = Migration::begin();
        if wrong == migration.id {
            continue;
        }
        migration.send_cmd_id(wrong);
        migration.hint(Vmm::FREE, 0x10_0000);
        migration.send_cmd_id(0);
        migration.end_honestly();
        let result = migration.finish();
        result.is_whole();
        result.holds(Vmm::FREE, Vmm::FREE);
        assert_eq!(result.pages("skipped"), 0, "{wrong:#x}");
    }
}

#[test]
fn r2_hints_before_the_id_and_after_the_stop_spare_nothing() {
    let mut migration = Migration::begin();
    migration.hint(Vmm::FREE, 0x10_0000);
    migration.send_cmd_id(migration.id);
    migration.send_cmd_id(0);
    migration.hint(Vmm::FREE + 0x10_0000, 0x10_0000);
    let result = migration.finish();
    result.is_whole();
    result.holds(Vmm::FREE, Vmm::FREE);
    result.holds(Vmm::FREE + 0x10_0000, Vmm::FREE + 0x10_0000);
    assert_eq!(result.pages("skipped"), 0);
}

#[test]
fn r5_hints_outside_memory_or_across_its_end_are_applied_nowhere_else() {
    let mut migration = Migration::begin();
    migration.send_cmd_id(migration.id);
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
    // Half of the block is guest memory, and counts. The other half applies nowhere else.
    migration
        .vmm
        .post(Queue::FreePage, START + LENGTH - 0x10_0000, 0x20_0000, true);
    migration.vmm.wait_used(Queue::FreePage);
    migration.send_cmd_id(0);
    let result = migration.finish();
    result.is_whole();
    result.holds(Vmm::FREE, Vmm::FREE);
    result.holds(START + LENGTH - 0x10_1000, START + LENGTH - 0x10_1000);
    assert!(result.pages("skipped") <= 0x100, "{}", result.status);
}

#[test]
fn r6_r17_a_page_that_is_written_after_its_hint_is_at_the_destination() {
    const MINE: u64 = 0x1122_3344_5566_7788;
    let mut migration = Migration::begin();
    migration.send_cmd_id(migration.id);
    for index in 0..8 {
        let address = Vmm::FREE + index * 0x2_0000;
        if index % 2 == 0 {
            migration.hint(address, 0x2_0000);
        } else {
            // The driver does not even wait until the device has seen the hint.
            migration.vmm.post(Queue::FreePage, address, 0x2_0000, true);
        }
        // Writes the old content to the first page: the page must be sent although its content has not changed.
        migration
            .vmm
            .write(address, &address.to_le_bytes().repeat(PAGE / 8));
        migration
            .vmm
            .write(address + 0x1000, &MINE.to_le_bytes().repeat(PAGE / 8));
        // Until the buffer is used, the device may discard the pages after these writes. That is the fault of the
        // driver, so it writes again.
        migration.vmm.wait_used(Queue::FreePage);
        migration
            .vmm
            .write(address, &address.to_le_bytes().repeat(PAGE / 8));
        migration
            .vmm
            .write(address + 0x1000, &MINE.to_le_bytes().repeat(PAGE / 8));
    }
    migration.send_cmd_id(0);
    let result = migration.finish();
    result.is_whole();
    for index in 0..8 {
        let address = Vmm::FREE + index * 0x2_0000;
        result.holds(address, address);
        result.holds(address + 0x1000, MINE);
    }
    assert_eq!(result.pages("skipped"), 8 * 0x1e);
}

/// The device discards the page with the ring through which the hint came. The guest loses only its own data.
#[test]
fn r17_a_driver_that_hints_its_own_rings_hurts_itself_only() {
    let mut migration = Migration::begin();
    migration.send_cmd_id(migration.id);
    migration.vmm.post(Queue::FreePage, START, 0x10_0000, true);
    // The ring is discarded, so it does not show when the buffer is used.
    let end = Instant::now() + HANG_TIMEOUT;
    while migration.qmp.run("query-free-page-hint")["blocks"] != 1 {
        assert!(Instant::now() < end, "the hint does not count");
        thread::sleep(Duration::from_millis(1));
    }
    migration.send_cmd_id(0);
    let result = migration.finish();
    result.is_whole();
    result.holds(Vmm::FREE, Vmm::FREE);
}
