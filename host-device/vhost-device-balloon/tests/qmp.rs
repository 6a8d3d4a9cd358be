// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The operators' socket.

mod common;

use common::{Operator, Running};
use serde_json::{json, Value};
use shared_abi::features::Features;
use vhost_device_balloon::server::Exit;

fn start() -> Running {
    Running::start(Features::STATS_VQ, false)
}

#[test]
fn greeting_and_negotiation_come_first() {
    let server = start();
    let mut operator = Operator::silent(&server.directory.path().join("qmp"));
    let greeting = operator.read();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    let (class, why) = operator.fail("query-commands", &json!({}));
    assert_eq!(class, "CommandNotFound");
    assert!(why.contains("qmp_capabilities"), "{why}");
    let (class, _) = operator.fail("qmp_capabilities", &json!({ "enable": ["oob"] }));
    assert_eq!(class, "GenericError");
    operator.run("qmp_capabilities");
    let (class, _) = operator.fail("qmp_capabilities", &json!({}));
    assert_eq!(class, "CommandNotFound");
    server.stop();
}

#[test]
fn ids_come_back_and_objects_need_no_lines() {
    let server = start();
    let mut operator = server.operator();
    operator
        .send(br#"{"execute":"query-version","id":{"n":[1]}}{"execute":"nonsense","id":2}{"exec"#);
    let first = operator.answer();
    assert_eq!(first["id"], json!({ "n": [1] }));
    assert!(first.get("return").is_some());
    let second = operator.answer();
    assert_eq!(second["id"], 2);
    assert_eq!(second["error"]["class"], "CommandNotFound");
    operator.send(b"ute\":\n\"query-version\" }");
    assert!(operator.answer().get("return").is_some());
    server.stop();
}

#[test]
fn every_listed_command_exists_and_refuses_arguments_that_it_does_not_know() {
    let server = start();
    let mut operator = server.operator();
    let commands = operator.run("query-commands");
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
        let (class, why) = operator.fail(name, &json!({ "no-such-argument": 1 }));
        assert!(
            class == "GenericError" || name == "qmp_capabilities",
            "{name}: {class} {why}"
        );
    }
    server.stop();
}

#[test]
fn bad_input_is_answered_and_the_conversation_goes_on() {
    let server = start();
    let mut operator = server.operator();
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
        operator.send(bad);
        let answer = operator.answer();
        assert_eq!(
            answer["error"]["class"],
            "GenericError",
            "{}: {answer}",
            bad.escape_ascii()
        );
    }
    operator.run("query-version");
    server.stop();
}

#[test]
fn oversized_input_ends_the_conversation() {
    let server = start();
    let mut operator = server.operator();
    let mut long = b"{\"execute\":\"".to_vec();
    long.resize(100_000, b'x');
    // The server may have ended the conversation before the last byte is out.
    let _ = operator.try_send(&long);
    let answer = operator.answer();
    assert!(
        answer["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("longer than"),
        "{answer}"
    );
    assert_eq!(operator.read(), Value::Null);
    // Others are not concerned.
    server.operator().run("query-version");
    server.stop();
}

#[test]
fn several_operators_at_once_but_not_any_number() {
    let server = start();
    let mut operators: Vec<_> = (0..16).map(|_| server.operator()).collect();
    let mut refused = Operator::silent(&server.directory.path().join("qmp"));
    assert_eq!(refused.read()["error"]["class"], "GenericError");
    for operator in &mut operators {
        operator.run("query-version");
    }
    operators.clear();
    // A place is free as soon as one has gone.
    loop {
        let mut operator = Operator::silent(&server.directory.path().join("qmp"));
        if operator.read().get("QMP").is_some() {
            break;
        }
    }
    server.stop();
}

#[test]
fn quit_is_answered_and_ends_the_server() {
    let server = start();
    let mut operator = server.operator();
    operator.run("quit");
    assert_eq!(operator.read(), Value::Null);
    assert_eq!(server.join().unwrap(), Exit::Stopped);
}
