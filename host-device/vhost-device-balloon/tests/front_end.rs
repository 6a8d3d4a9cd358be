// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the server with a real front end over real sockets.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use common::{TestServer, Vmm, HANG_TIMEOUT, LENGTH, START};
use serde_json::json;
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_device_balloon::server::{Exit, ServerError};
use vhost_device_balloon::vring::NotificationSuppression;

const HINT: Features = Features::STATS_VQ.union(Features::FREE_PAGE_HINT);

#[test]
fn a_hint_round_through_real_queues() {
    let server = TestServer::start(HINT, false);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    assert!(vmm.offered().contains(HINT));
    qmp.event("FRONTEND_CONNECTED", &json!({}));
    let (_, why) = qmp.fail("free-page-hint-start", &json!({}));
    assert!(why.contains("driver is not running"), "{why}");

    vmm.start_driver(HINT);
    qmp.event(
        "DRIVER_STARTED",
        &json!({ "features": ["stats", "free-page-hint"] }),
    );
    let id = qmp.run("free-page-hint-start")["id"].as_u64().unwrap() as u32;
    vmm.config_change();
    assert_eq!(vmm.cmd_id(), id);
    vmm.send(Queue::FreePage, &id.to_le_bytes());
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "started", "id": id }));
    vmm.offer(Queue::FreePage, Vmm::FREE, 0x10_0000, true);
    vmm.send(Queue::FreePage, &[0; 4]);
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "finished", "id": id }));

    let state = qmp.run("query-free-page-hint");
    assert_eq!(state["status"], "finished");
    assert_eq!(state["pages-cleared"], 0x100);
    assert_eq!(
        state["pages-dirty"],
        state["pages-total"].as_u64().unwrap() - 0x100
    );
    let ranges = qmp.run("query-hinted-ranges");
    assert_eq!(ranges, json!([{ "start": Vmm::FREE, "length": 0x10_0000 }]));
    qmp.run("free-page-hint-done");
    vmm.config_change();
    assert_eq!(vmm.cmd_id(), 1);
    drop(vmm);
    let Exit::FrontEndDisconnected(ended) = server.join().unwrap() else {
        panic!("the server ends with its front end");
    };
    assert_eq!(ended.reason, "front end closed the connection");
}

#[test]
fn inflate_through_real_queues() {
    let server = TestServer::start(Features::NONE, false);
    let mut qmp = server.qmp();
    let (_, why) = qmp.fail("balloon", &json!({ "value": 1 << 20 }));
    assert!(why.contains("no front end"), "{why}");
    // A pipe for messages of the device, as in user-mode Linux.
    let mut vmm = Vmm::connect_with_pipe(&server.socket());
    vmm.start_driver(Features::NONE);
    qmp.event("DRIVER_STARTED", &json!({}));
    assert_eq!(qmp.run("query-balloon")["actual"], LENGTH);

    qmp.execute("balloon", &json!({ "value": LENGTH - 0x2000 }));
    vmm.config_change();
    assert_eq!(vmm.config(8), [2, 0, 0, 0, 0, 0, 0, 0]);
    let before = qmp.run("query-guest-memory")["allocated"].as_u64().unwrap();
    let pfn = |address: u64| ((address >> 12) as u32).to_le_bytes();
    // The first page holds the request: writing the request allocates the page, and the inflation releases it. The
    // second page was never allocated.
    vmm.send(
        Queue::Inflate,
        &[pfn(START + 0x10_0000), pfn(Vmm::FREE)].concat(),
    );
    vmm.write_config(4, &2u32.to_le_bytes());
    qmp.event("BALLOON_CHANGE", &json!({ "actual": LENGTH - 0x2000 }));
    let after = qmp.run("query-guest-memory");
    assert_eq!(
        before + 0x1000 - after["allocated"].as_u64().unwrap(),
        0x1000
    );
    assert_eq!(after["regions"][0]["start"], START);
    let status = qmp.run("query-virtio-status");
    assert_eq!(status["pages-inflated"], 2);
    assert_eq!(status["queues"][0]["requests"], 1);
    server.stop();
}

#[test]
fn r13_a_second_front_end_is_refused_and_the_first_goes_on() {
    let server = TestServer::start(HINT, false);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    qmp.event("FRONTEND_CONNECTED", &json!({}));
    let mut second = UnixStream::connect(server.socket()).unwrap();
    second.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
    let mut nothing = [0; 1];
    let end = second.read(&mut nothing);
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    vmm.start_driver(HINT);
    qmp.event("DRIVER_STARTED", &json!({}));
    assert_eq!(qmp.run("query-virtio-status")["status"], "running");
    server.stop();
}

#[test]
fn r13_a_silent_connection_is_no_front_end() {
    let server = TestServer::start(HINT, false);
    let mut qmp = server.qmp();
    for _ in 0..3 {
        drop(UnixStream::connect(server.socket()).unwrap());
    }
    // This connection sends nothing, and does not block others.
    let _silent = UnixStream::connect(server.socket()).unwrap();
    let vmm = Vmm::connect(&server.socket());
    qmp.event("FRONTEND_CONNECTED", &json!({}));
    drop(vmm);
    qmp.event("FRONTEND_DISCONNECTED", &json!({}));
    assert!(matches!(server.join(), Ok(Exit::FrontEndDisconnected(_))));
}

#[test]
fn a_persistent_server_takes_the_next_front_end() {
    let server = TestServer::start(HINT, true);
    let mut qmp = server.qmp();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let mut vmm = Vmm::connect(&server.socket());
        vmm.start_driver(HINT);
        qmp.until_running();
        ids.push(qmp.run("free-page-hint-start")["id"].as_u64().unwrap());
        drop(vmm);
        qmp.event("FRONTEND_DISCONNECTED", &json!({}));
        assert_eq!(qmp.run("query-free-page-hint")["status"], "stopped");
        assert_eq!(qmp.run("query-virtio-status")["connected"], false);
    }
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "R8: {ids:?}");
    server.stop();
}

#[test]
fn r16_a_qmp_client_that_disconnects_leaves_the_hint_round_to_others() {
    let server = TestServer::start(HINT, false);
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(HINT);
    let mut second = server.qmp();
    second.until_running();
    let mut first = server.qmp();
    let id = first.run("free-page-hint-start")["id"].as_u64().unwrap() as u32;
    vmm.send(Queue::FreePage, &id.to_le_bytes());
    drop(first);
    vmm.offer(Queue::FreePage, Vmm::FREE, 0x1000, true);
    let state = second.run("query-free-page-hint");
    assert_eq!(
        (&state["status"], &state["blocks"]),
        (&json!("started"), &json!(1))
    );
    // The other client ends the hint round, and the guest is notified that it may free its hinted blocks.
    second.run("free-page-hint-done");
    vmm.config_change();
    assert_eq!(vmm.cmd_id(), 1);
    server.stop();
}

#[test]
fn r16_a_restarted_driver_finds_no_hint_round() {
    let server = TestServer::start(HINT, false);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(HINT);
    qmp.event("DRIVER_STARTED", &json!({}));
    let id = qmp.run("free-page-hint-start")["id"].as_u64().unwrap() as u32;
    vmm.send(Queue::FreePage, &id.to_le_bytes());
    vmm.stop_driver();
    assert_eq!(qmp.run("query-virtio-status")["status"], "no-driver");
    vmm.start_driver(HINT);
    assert_eq!(vmm.cmd_id(), 0);
    qmp.event("FREE_PAGE_HINT", &json!({ "status": "stopped" }));
    server.stop();
}

#[test]
fn event_index_is_offered_unless_it_is_not_wanted() {
    for (suppression, offered) in [
        (NotificationSuppression::EventIdx, true),
        (NotificationSuppression::Flag, false),
        (NotificationSuppression::Never, false),
    ] {
        let server = TestServer::start_with(HINT, suppression, false);
        let mut qmp = server.qmp();
        let mut vmm = Vmm::connect(&server.socket());
        assert_eq!(vmm.event_idx, offered, "{suppression:?}");
        vmm.start_driver(HINT);
        qmp.until_running();
        for _ in 0..3 {
            vmm.send(Queue::Inflate, &[]);
        }
        let queue = &qmp.run("query-virtio-status")["queues"][0];
        assert_eq!(
            (&queue["notifications"], &queue["interrupts"]),
            (&json!(3), &json!(3)),
            "{suppression:?}: {queue}"
        );
        server.stop();
    }
}

#[test]
fn a_front_end_that_breaks_the_protocol_is_named() {
    for garbage in [&[0xff; 64][..], b"GET / HTTP/1.1\r\nHost: balloon\r\n\r\n"] {
        let server = TestServer::start(HINT, false);
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        stream.write_all(garbage).unwrap();
        match server.join() {
            Err(ServerError::FrontEnd(why)) => assert!(why.contains("front end"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_guest_without_statistics_is_an_error() {
    let server = TestServer::start(HINT, false);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(HINT);
    qmp.event("DRIVER_STARTED", &json!({}));
    let (_, why) = qmp.fail("query-guest-stats", &json!({}));
    assert!(why.contains("no statistics"), "{why}");
    server.stop();
}

#[test]
fn the_latest_of_many_changes_is_reported() {
    let server = TestServer::start(Features::NONE, false);
    let mut qmp = server.qmp();
    let mut vmm = Vmm::connect(&server.socket());
    vmm.start_driver(Features::NONE);
    qmp.event("DRIVER_STARTED", &json!({}));
    let changes = 500u32;
    for pages in 1..=changes {
        vmm.write_config(4, &pages.to_le_bytes());
    }
    let actual = LENGTH - u64::from(changes) * 0x1000;
    // Nothing happens in between: the event comes at the end of its interval.
    qmp.event("BALLOON_CHANGE", &json!({ "actual": actual }));
    let events = qmp
        .events
        .iter()
        .filter(|it| it["event"] == "BALLOON_CHANGE");
    assert!(events.count() < 100, "{:?}", qmp.events);
    server.stop();
}
