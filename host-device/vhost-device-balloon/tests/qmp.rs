// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the QMP socket.

mod common;

use std::io::{self, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use common::{QmpClient, TestServer, HANG_TIMEOUT};
use serde_json::{json, Value};
use shared_abi::features::Features;
use vhost_device_balloon::server::Exit;

fn start() -> TestServer {
    TestServer::start(Features::STATS_VQ, false)
}

#[test]
fn greeting_and_negotiation_come_first() {
    let server = start();
    let mut qmp = QmpClient::connect_without_negotiation(&server.directory.path().join("qmp"));
    let greeting = qmp.read();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    let (class, why) = qmp.fail("query-commands", &json!({}));
    assert_eq!(class, "CommandNotFound");
    assert!(why.contains("qmp_capabilities"), "{why}");
    let (class, _) = qmp.fail("qmp_capabilities", &json!({ "enable": ["oob"] }));
    assert_eq!(class, "GenericError");
    qmp.run("qmp_capabilities");
    let (class, _) = qmp.fail("qmp_capabilities", &json!({}));
    assert_eq!(class, "CommandNotFound");
    server.stop();
}

#[test]
fn ids_come_back_and_objects_need_no_lines() {
    let server = start();
    let mut qmp = server.qmp();
    qmp.send(br#"{"execute":"query-version","id":{"n":[1]}}{"execute":"nonsense","id":2}{"exec"#);
    let first = qmp.answer();
    assert_eq!(first["id"], json!({ "n": [1] }));
    assert!(first.get("return").is_some());
    let second = qmp.answer();
    assert_eq!(second["id"], 2);
    assert_eq!(second["error"]["class"], "CommandNotFound");
    qmp.send(b"ute\":\n\"query-version\" }");
    assert!(qmp.answer().get("return").is_some());
    server.stop();
}

#[test]
fn every_listed_command_exists_and_refuses_arguments_that_it_does_not_know() {
    let server = start();
    let mut qmp = server.qmp();
    let commands = qmp.run("query-commands");
    let names: Vec<&str> = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|command| command["name"].as_str().unwrap())
        .collect();
    for name in ["balloon", "query-balloon", "free-page-hint-start", "quit"] {
        assert!(names.contains(&name), "{name}");
    }
    for name in names {
        let (class, why) = qmp.fail(name, &json!({ "no-such-argument": 1 }));
        assert!(
            class == "GenericError" || name == "qmp_capabilities",
            "{name}: {class} {why}"
        );
    }
    server.stop();
}

#[test]
fn bad_input_is_answered_and_the_session_continues() {
    let server = start();
    let mut qmp = server.qmp();
    for bad in [
        &b"hello\n"[..],
        b"[1]\n",
        b"{\"execute\":17}",
        b"{\"execute\":\"balloon\",\"arguments\":{\"value\":-1}}",
        b"{\"execute\":\"balloon\",\"arguments\":{\"value\":\"1G\"}}",
        b"{\"execute\":\"balloon\"}",
        b"{\"execute\":\"query-balloon\",\"arguments\":[]}",
        b"{\"execute\":\"query-version\",\"color\":\"red\"}",
        b"{execute}",
        b"{\"execute\":\"query-version\xff\"}",
    ] {
        qmp.send(bad);
        let answer = qmp.answer();
        assert_eq!(
            answer["error"]["class"],
            "GenericError",
            "{}: {answer}",
            bad.escape_ascii()
        );
    }
    qmp.run("query-version");
    server.stop();
}

#[test]
fn oversized_input_ends_the_session() {
    let server = start();
    let mut qmp = server.qmp();
    let mut long = b"{\"execute\":\"".to_vec();
    long.resize(100_000, b'x');
    // The server may end the session before it has read the last byte.
    let _ = qmp.try_send(&long);
    let answer = qmp.answer();
    assert!(
        answer["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("longer than"),
        "{answer}"
    );
    assert_eq!(qmp.read(), Value::Null);
    // Other clients are not affected.
    server.qmp().run("query-version");
    server.stop();
}

#[test]
fn several_qmp_clients_at_once_up_to_a_limit() {
    let server = start();
    let mut qmp_clients: Vec<_> = (0..16).map(|_| server.qmp()).collect();
    let mut refused = QmpClient::connect_without_negotiation(&server.directory.path().join("qmp"));
    assert_eq!(refused.read()["error"]["class"], "GenericError");
    for qmp in &mut qmp_clients {
        qmp.run("query-version");
    }
    qmp_clients.clear();
    // A place becomes free when a client has disconnected.
    loop {
        let mut qmp = QmpClient::connect_without_negotiation(&server.directory.path().join("qmp"));
        if qmp.read().get("QMP").is_some() {
            break;
        }
    }
    server.stop();
}

#[test]
fn quit_is_answered_and_ends_the_server() {
    let server = start();
    let mut qmp = server.qmp();
    qmp.run("quit");
    assert_eq!(qmp.read(), Value::Null);
    assert_eq!(server.join().unwrap(), Exit::Stopped);
}

/// Sends commands until the server takes no more of them, and reads nothing.
fn fill(qmp: &mut QmpClient, command: &[u8]) {
    let limit = Instant::now() + HANG_TIMEOUT;
    let mut blocked = 0;
    // The server may take a while to read. It takes nothing in the end, whatever happens.
    while blocked < 20 {
        assert!(Instant::now() < limit, "the server reads without an end");
        match qmp.send_some(command) {
            Ok(()) => blocked = 0,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                blocked += 1;
                thread::sleep(Duration::from_millis(10));
            }
            Err(_) => return,
        }
    }
}

const QUERY: &[u8] = b"{\"execute\":\"query-commands\"}";

#[test]
fn a_client_that_does_not_read_delays_neither_others_nor_the_end() {
    let server = start();
    let mut silent = server.qmp();
    fill(&mut silent, QUERY);
    let mut other = server.qmp();
    other.run("query-version");
    other.run("quit");
    assert_eq!(server.join().unwrap(), Exit::Stopped);
}

#[test]
fn a_client_that_reads_late_gets_all_its_answers() {
    let server = start();
    let mut qmp = server.qmp();
    let commands = 2000;
    let mut writer = qmp.writer();
    let sending = thread::spawn(move || {
        for number in 0..commands {
            let command = json!({ "execute": "query-commands", "id": number });
            writer.write_all(command.to_string().as_bytes()).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    for number in 0..commands {
        assert_eq!(qmp.answer()["id"], number);
    }
    sending.join().unwrap();
    assert_eq!(qmp.read(), Value::Null);
    server.stop();
}

#[test]
fn silent_clients_keep_nobody_out() {
    let server = start();
    let path = server.directory.path().join("qmp");
    let mut silent: Vec<_> = (0..16)
        .map(|_| QmpClient::connect_without_negotiation(&path))
        .collect();
    for qmp in &mut silent {
        assert!(qmp.read().get("QMP").is_some());
    }
    let mut qmp = server.qmp();
    qmp.run("query-version");
    // The first one made room.
    assert_eq!(silent[0].read(), Value::Null);
    server.stop();
}

#[test]
fn an_object_with_a_key_twice_is_refused() {
    let server = start();
    let mut qmp = server.qmp();
    for bad in [
        r#"{"execute":"query-version","execute":"quit"}"#,
        r#"{"execute":"balloon","arguments":{"value":1,"value":2}}"#,
    ] {
        qmp.send(bad.as_bytes());
        let answer = qmp.answer();
        let text = answer["error"]["desc"].as_str().unwrap();
        assert!(text.contains("occurs twice"), "{answer}");
    }
    qmp.run("query-version");
    server.stop();
}
