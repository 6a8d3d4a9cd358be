// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that a front end shares, changes, truncates, or lies about.

mod common;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use common::program::Program;
use common::{QmpClient, TestServer, Vmm, LENGTH, START};
use rustix::fs::{
    fallocate, flock, ftruncate, memfd_create, FallocateFlags, FlockOperation, MemfdFlags,
};
use rustix::process::Signal;
use serde_json::{json, Value};
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

fn pfns(addresses: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let numbers = addresses.into_iter().map(|it| (it >> 12) as u32);
    numbers.flat_map(u32::to_le_bytes).collect()
}

fn reason(qmp: &mut QmpClient) -> String {
    let event = qmp.event("FRONTEND_DISCONNECTED", &json!({}));
    event["data"]["reason"].as_str().unwrap().to_owned()
}

/// Ends the program with a signal, and returns its log. Its sockets must be gone.
fn end(program: Program, directory: &tempfile::TempDir) -> String {
    program.signal(Signal::TERM);
    let (output, log) = program.finish();
    assert_eq!(output.status.code(), Some(0), "{:?}\n{log}", output.status);
    let left: Vec<_> = directory.path().read_dir().unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    log
}

#[test]
fn a_region_larger_than_its_file_is_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--persistent"]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    for by_table in [true, false] {
        let mut vmm = Vmm::connect(&program.socket);
        let region = vmm.region(START, 2 * LENGTH, START);
        // The queues are in the part of the region that the file does not have.
        let _ = match by_table {
            true => vmm.frontend().set_mem_table(&[region]).map(drop),
            false => vmm.frontend().add_mem_region(&region).map(drop),
        };
        let _ = vmm.frontend().set_vring_num(0, 16);
        let addresses = vhost::VringConfigData {
            queue_max_size: 16,
            queue_size: 16,
            flags: 0,
            desc_table_addr: START + LENGTH,
            avail_ring_addr: START + LENGTH + 0x1000,
            used_ring_addr: START + LENGTH + 0x2000,
            log_addr: None,
        };
        let _ = vmm.frontend().set_vring_addr(0, &addresses);
        // The daemon answers, or closes the connection.
        let _ = vmm.frontend().get_features();
        let why = reason(&mut qmp);
        let size = START + LENGTH;
        assert!(why.contains("is refused"), "{why}");
        assert!(why.contains(&format!("of {size} bytes")), "{why}");
    }
    // The next front end is served.
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(Features::STATS_VQ);
    qmp.until_running();
    drop(vmm);
    let log = end(program, &directory);
    assert!(log.contains("is refused"), "{log}");
}

#[test]
fn a_front_end_that_truncates_its_memory_ends_its_session_only() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--persistent"]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(Features::STATS_VQ);
    qmp.until_running();
    ftruncate(vmm.file(), START).unwrap();
    vmm.kick(Queue::Inflate);
    let why = reason(&mut qmp);
    assert!(why.contains("truncated the memory file"), "{why}");
    drop(vmm);
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(Features::STATS_VQ);
    qmp.event("DRIVER_STARTED", &json!({}));
    drop(vmm);
    let log = end(program, &directory);
    assert!(log.contains("memory files can be truncated"), "{log}");
    assert!(log.contains("truncated the memory file"), "{log}");
}

#[test]
fn regions_come_and_go_while_the_driver_runs() {
    /// More than one message can carry.
    const REGIONS: u64 = 100;
    const REGION: u64 = 0x1000;
    let region = |vmm: &Vmm, index: u64| {
        let offset = LENGTH / 2 + index * REGION;
        vmm.region(0x1_0000_0000 + 2 * index * REGION, REGION, START + offset)
    };
    let server = TestServer::start(Features::NONE, false);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(Features::NONE);
    qmp.until_running();
    vmm.share_half_the_memory();
    for index in 0..REGIONS {
        let region = region(&vmm, index);
        vmm.frontend().add_mem_region(&region).unwrap();
    }
    // An answer to a later message.
    vmm.frontend().get_features().unwrap();
    let memory = qmp.run("query-guest-memory");
    assert_eq!(
        memory["regions"].as_array().unwrap().len() as u64,
        REGIONS + 1
    );
    assert_eq!(
        qmp.run("query-balloon")["actual"],
        LENGTH / 2 + REGIONS * REGION
    );
    // Every page of an added region is released, and none between them.
    vmm.write(START + LENGTH / 2, &vec![0x5a; (REGIONS * REGION) as usize]);
    let pages =
        (0..REGIONS).flat_map(|it| [0, 1].map(|odd| 0x1_0000_0000 + (2 * it + odd) * REGION));
    vmm.send(Queue::Inflate, &pfns(pages));
    let status = qmp.run("query-virtio-status");
    assert_eq!(status["bytes-released"], REGIONS * REGION, "{status}");
    assert_eq!(status["errors"], 1);
    for index in 0..REGIONS {
        let region = region(&vmm, index);
        vmm.frontend().remove_mem_region(&region).unwrap();
    }
    vmm.frontend().get_features().unwrap();
    let memory = qmp.run("query-guest-memory");
    assert_eq!(memory["regions"].as_array().unwrap().len(), 1, "{memory}");
    // The queues are still served.
    vmm.send(Queue::Inflate, &pfns([START + LENGTH / 4]));
    server.stop();
}

#[test]
fn more_regions_than_are_offered_end_the_session() {
    const REGION: u64 = 0x1000;
    let server = TestServer::start(Features::NONE, true);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(Features::NONE);
    vmm.share_half_the_memory();
    let most = vmm.frontend().get_max_mem_slots().unwrap();
    for index in 1..=most {
        let (address, offset) = (0x1_0000_0000 + index * REGION, LENGTH / 2 + index * REGION);
        let region = vmm.region(address, REGION, START + offset);
        // The last one is one too many. Without an answer, the front end learns of it at its next request.
        let added = vmm.frontend().add_mem_region(&region);
        assert!(index == most || added.is_ok());
    }
    let why = reason(&mut qmp);
    assert!(why.contains("more than 509 memory regions"), "{why}");
    drop(vmm);
    server.stop();
}

#[test]
fn regions_that_overlap_in_guest_memory_are_refused() {
    for by_table in [true, false] {
        let server = TestServer::start(Features::NONE, true);
        let mut qmp = server.qmp();
        let mut vmm = Vmm::connect(&server.socket());
        let first = vmm.region(START, LENGTH / 2, START);
        let second = vmm.region(START + LENGTH / 4, LENGTH / 2, START + LENGTH / 2);
        let _ = match by_table {
            true => vmm.frontend().set_mem_table(&[first, second]).map(drop),
            false => {
                vmm.frontend().add_mem_region(&first).unwrap();
                vmm.frontend().add_mem_region(&second).map(drop)
            }
        };
        let _ = vmm.frontend().get_features();
        reason(&mut qmp);
        drop(vmm);
        let mut vmm = Vmm::connect(&server.socket());
        vmm.start_driver(Features::NONE);
        qmp.event("DRIVER_STARTED", &json!({}));
        server.stop();
    }
}

#[test]
fn regions_that_share_a_part_of_a_file_release_it_once() {
    let server = TestServer::start(Features::NONE, false);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(Features::NONE);
    // The same part of the file at two guest physical addresses.
    let alias = vmm.region(START + LENGTH, LENGTH / 2, START + LENGTH / 2);
    vmm.frontend().add_mem_region(&alias).unwrap();
    vmm.frontend().get_features().unwrap();
    vmm.write(START + LENGTH / 2, &[0x5a; 0x4000]);
    let before = qmp.run("query-guest-memory")["allocated"].as_u64().unwrap();
    vmm.send(Queue::Inflate, &pfns([START + LENGTH]));
    let after = qmp.run("query-guest-memory");
    // The request itself needed a page.
    assert_eq!(before - after["allocated"].as_u64().unwrap(), 0, "{after}");
    assert_eq!(vmm.bytes()[(START + LENGTH / 2) as usize..][..2], [0, 0]);
    // A migration is refused or runs, and the balloon survives it.
    let answer = qmp.execute("migrate", &json!({ "uri": "unix:/nonexistent/socket" }));
    assert!(answer.get("return").is_some() || answer.get("error").is_some());
    assert_eq!(qmp.run("query-virtio-status")["connected"], true);
    server.stop();
}

fn discard_reasons(balloon: &Value) -> Vec<&str> {
    let reasons = balloon["discard-inhibited-by"].as_array().unwrap();
    reasons.iter().filter_map(Value::as_str).collect()
}

#[test]
fn discarding_is_inhibited_and_allowed_while_the_driver_runs() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::start(directory.path(), &["--inhibit-discard"]).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(Features::STATS_VQ);
    qmp.until_running();
    vmm.write(Vmm::FREE, &[0x5a; 0x3000]);
    let mut released = Vec::new();
    for page in 0..3 {
        let expected = page != 1;
        let balloon = qmp.run("query-balloon");
        assert_eq!(balloon["discard-inhibited"], expected, "{balloon}");
        assert_eq!(discard_reasons(&balloon).len(), usize::from(expected));
        vmm.send(Queue::Inflate, &pfns([Vmm::FREE + page * 0x1000]));
        let status = qmp.run("query-virtio-status");
        assert_eq!(status["pages-inflated"], page + 1);
        released.push(status["bytes-released"].as_u64().unwrap());
        qmp.run(match page {
            0 => "allow-discard",
            _ => "inhibit-discard",
        });
    }
    assert_eq!(released, [0, 0x1000, 0x1000]);
    let first = (Vmm::FREE) as usize;
    let bytes = vmm.bytes();
    assert_eq!(
        [bytes[first], bytes[first + 0x1000], bytes[first + 0x2000]],
        [0x5a, 0, 0x5a]
    );
    drop(vmm);
    let (_, log) = program.finish();
    assert_eq!(
        log.matches("releases no memory to the host").count(),
        2,
        "{log}"
    );
    assert!(log.contains("releases memory to the host again"), "{log}");
}

const HUGE: u64 = 2 << 20;

/// Lets the host allocate some huge pages on demand. Puts the setting back at the end.
struct HugePages {
    before: String,
    /// Locks the setting, which belongs to the host, against other runs of the tests as well. A closed file is unlocked.
    _alone: File,
}

impl HugePages {
    const SETTING: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

    fn allow(pages: u64) -> io::Result<Self> {
        let alone = File::open(Self::SETTING)?;
        flock(&alone, FlockOperation::LockExclusive)?;
        let before = fs::read_to_string(Self::SETTING)?;
        let now = before.trim().parse::<u64>().unwrap_or(0) + pages;
        fs::write(Self::SETTING, now.to_string())?;
        Ok(Self {
            before,
            _alone: alone,
        })
    }

    /// Creates a memory file of huge pages, all of them allocated.
    fn file(length: u64) -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = File::from(memfd_create("huge", flags)?);
        ftruncate(&file, length)?;
        fallocate(&file, FallocateFlags::empty(), 0, length)?;
        Ok(file)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::SETTING, &self.before);
    }
}

#[test]
fn huge_pages_are_freed_when_the_balloon_has_all_of_their_pages() {
    let length = 6 * HUGE;
    let allowed = match HugePages::allow(2 * length / HUGE) {
        Ok(allowed) => allowed,
        Err(error) => return println!("skipped: {} cannot be set: {error}", HugePages::SETTING),
    };
    for tells in [true, false] {
        let file = match HugePages::file(length) {
            Ok(file) => file,
            Err(error) => return println!("skipped: the host has no huge pages: {error}"),
        };
        let features = match tells {
            true => Features::MUST_TELL_HOST,
            false => Features::NONE,
        };
        let server = TestServer::start(features, true);
        let mut qmp = server.qmp();
        let mut vmm = Vmm::connect_with_file(&server.socket(), file, HUGE);
        vmm.start_driver(features);
        qmp.until_running();
        let before = qmp.run("query-guest-memory");
        assert_eq!(before["allocated"], length, "{before}");
        assert_eq!(before["regions"][0]["allocated"], length - HUGE, "{before}");
        // Two huge pages, page by page from both ends, 256 pages a request as in Linux.
        let (first, end) = (3 * HUGE, 5 * HUGE);
        let pages: Vec<u64> = (0..512)
            .flat_map(|it| [first + it * 0x1000, end - (it + 1) * 0x1000])
            .collect();
        for request in pages.chunks(256) {
            vmm.send(Queue::Inflate, &pfns(request.iter().copied()));
        }
        let after = qmp.run("query-guest-memory");
        let status = qmp.run("query-virtio-status");
        let freed = if tells { 2 * HUGE } else { 0 };
        println!(
            "must-tell-host {tells}: {} pages inflated, {} bytes released, {} bytes allocated",
            status["pages-inflated"], status["bytes-released"], after["allocated"]
        );
        assert_eq!(status["bytes-released"], freed, "{status}");
        assert_eq!(after["allocated"], length - freed, "{after}");
        assert_eq!(
            after["regions"][0]["allocated"],
            (length - freed).min(length - HUGE)
        );
        // A request for all pages of a huge page frees it in any case.
        vmm.send(
            Queue::Inflate,
            &pfns((0..512).map(|it| first + it * 0x1000)),
        );
        let after = qmp.run("query-guest-memory");
        assert_eq!(after["allocated"], length - freed.max(HUGE), "{after}");
        // A truncated file of huge pages ends the session, too.
        ftruncate(vmm.file(), 0).unwrap();
        vmm.kick(Queue::Inflate);
        let why = reason(&mut qmp);
        assert!(why.contains("truncated the memory file"), "{why}");
        drop(vmm);
        server.stop();
    }
    drop(allowed);
}

#[test]
fn a_region_of_a_part_of_a_huge_page_is_refused() {
    let allowed = match HugePages::allow(8) {
        Ok(allowed) => allowed,
        Err(error) => return println!("skipped: {} cannot be set: {error}", HugePages::SETTING),
    };
    let file = match HugePages::file(4 * HUGE) {
        Ok(file) => file,
        Err(error) => return println!("skipped: the host has no huge pages: {error}"),
    };
    let server = TestServer::start(Features::NONE, true);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    let region = VhostUserMemoryRegionInfo {
        mmap_handle: file.as_raw_fd(),
        ..vmm.region(0, 3 * HUGE - 0x1000, 0)
    };
    let _ = vmm.frontend().set_mem_table(&[region]);
    let _ = vmm.frontend().get_features();
    let why = reason(&mut qmp);
    assert!(why.contains("has pages of 2097152 bytes"), "{why}");
    drop(vmm);
    server.stop();
    drop(allowed);
}

/// Returns the resident set of a process in bytes.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    let status = status.unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_sparse_guest_of_64_gib_costs_the_daemon_little() {
    const SIZE: u64 = 64 << 30;
    let directory = tempfile::tempdir().unwrap();
    let options = ["--persistent", "--free-page-hint", "--must-tell-host"];
    let program = Program::start(directory.path(), &options).ready();
    let mut qmp = QmpClient::connect(&program.qmp);
    let start = resident(program.id());
    let features = Features::STATS_VQ | Features::FREE_PAGE_HINT | Features::MUST_TELL_HOST;
    let mut vmm = Vmm::connect(&program.socket);
    vmm.start_driver(features);
    qmp.until_running();
    let file = File::from(memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, SIZE).unwrap();
    let sparse = VhostUserMemoryRegionInfo {
        mmap_handle: file.as_raw_fd(),
        ..vmm.region(1 << 32, SIZE, 0)
    };
    vmm.frontend().add_mem_region(&sparse).unwrap();
    vmm.frontend().get_features().unwrap();
    assert_eq!(qmp.run("query-balloon")["actual"], LENGTH + SIZE);
    let shared = resident(program.id());
    let memory = qmp.run("query-guest-memory");
    assert_eq!(memory["regions"][1]["allocated"], 0, "{memory}");
    let pages = (0..0x1000).map(|it| (1 << 32) + it * (SIZE / 0x1000));
    vmm.send(Queue::Inflate, &pfns(pages));
    qmp.run("free-page-hint-start");
    let used = resident(program.id());
    println!("resident: {start} bytes at start, {shared} with 64 GiB, {used} in a hint round");
    assert!(used - start < 64 << 20, "{start} {shared} {used}");
    drop(vmm);
    end(program, &directory);
}
