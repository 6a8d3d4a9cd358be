// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the client with peers that behave well and with peers that do not.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use qmp_client::{Client, Error};
use serde_json::{json, Value};

const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;
/// A limit that only a hanging test exceeds.
const LIMIT: Duration = Duration::from_secs(600);

/// Starts a peer that sends `greeting`, negotiates capabilities, and answers each command with the lines that `script`
/// returns. The thread returns the commands that the peer received.
fn peer(
    greeting: &'static str,
    script: impl Fn(&Value) -> Vec<String> + Send + 'static,
) -> (UnixStream, JoinHandle<Vec<Value>>) {
    let (near, far) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || {
        let mut got = Vec::new();
        let mut output = far.try_clone().unwrap();
        let _ = output.write_all(format!("{greeting}\r\n").as_bytes());
        for line in BufReader::new(far).lines() {
            let Ok(line) = line else { break };
            let command: Value = serde_json::from_str(&line).unwrap();
            let answers = if command["execute"] == "qmp_capabilities" {
                vec![json!({ "return": {}, "id": command["id"] }).to_string()]
            } else {
                script(&command)
            };
            got.push(command);
            for answer in answers {
                let _ = output.write_all(format!("{answer}\r\n").as_bytes());
            }
        }
        got
    });
    (near, thread)
}

fn client(
    script: impl Fn(&Value) -> Vec<String> + Send + 'static,
) -> (Client, JoinHandle<Vec<Value>>) {
    let (stream, thread) = peer(GREETING, script);
    (
        Client::from_stream(stream, "the peer", LIMIT).unwrap(),
        thread,
    )
}

fn answer(command: &Value, value: Value) -> String {
    json!({ "return": value, "id": command["id"] }).to_string()
}

#[test]
fn an_answer_is_that_of_its_command_and_events_are_kept() {
    let (mut client, thread) = client(|command| {
        vec![
            r#"{"event": "FIRST", "timestamp": {}}"#.into(),
            r#"{"return": "somebody else's", "id": 77}"#.into(),
            answer(command, json!({ "n": 5 })),
            r#"{"event": "SECOND", "data": {"device": "d"}}"#.into(),
        ]
    });
    let value = client.command("a", json!({ "x": 1 })).unwrap();
    assert_eq!(value, json!({ "n": 5 }));
    let event = client.wait_event(|event| event.name == "SECOND", LIMIT);
    assert_eq!(event.unwrap().unwrap().text("device"), "d");
    // `wait_event` has dropped the first event.
    let event = client.wait_event(|_| true, Duration::from_millis(1));
    assert_eq!(event.unwrap(), None);
    drop(client);
    let got = thread.join().unwrap();
    assert_eq!(
        got[1],
        json!({ "execute": "a", "arguments": { "x": 1 }, "id": 2 })
    );
}

#[test]
fn a_refusal_is_told_in_the_peers_words_and_the_connection_lives() {
    let (mut client, _thread) = client(|command| match command["execute"].as_str() {
        Some("no") => vec![json!({
            "error": { "class": "GenericError", "desc": "not today" }, "id": command["id"]
        })
        .to_string()],
        Some("garbled") => {
            vec![r#"{"error": {"class": "GenericError", "desc": "parse error"}}"#.into()]
        }
        _ => vec![answer(command, json!({}))],
    });
    for (name, words) in [("no", "not today"), ("garbled", "parse error")] {
        let error = client.command(name, json!({})).unwrap_err();
        assert_eq!(error.qmp_error().unwrap().desc, words);
        assert_eq!(
            error.to_string(),
            format!("the peer refused {name}: {words} (GenericError)")
        );
        assert!(!error.is_fatal());
    }
    client.command("yes", json!({})).unwrap();
}

#[test]
fn an_answer_of_another_shape_is_shown() {
    let (mut client, _thread) = client(|command| vec![answer(command, json!({ "odd": true }))]);
    let error = client.query::<Vec<u8>>("query-bytes").unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"the peer sent an unexpected response to query-bytes: {"odd":true}"#
    );
}

#[test]
fn peers_that_are_no_qmp_are_named() {
    let busy =
        r#"{"error": {"class": "GenericError", "desc": "too many QMP clients are connected"}}"#;
    let cases = [
        (
            r#"{"return": {}}"#,
            "the peer sent no QMP greeting: check that it is a QMP socket",
        ),
        (
            "SSH-2.0-OpenSSH",
            "the peer sent an invalid message: \"SSH-2.0-OpenSSH\"",
        ),
        (
            busy,
            "the peer refused the connection: too many QMP clients are connected (GenericError)",
        ),
    ];
    for (greeting, words) in cases {
        let (stream, _thread) = peer(greeting, |_| Vec::new());
        let error = Client::from_stream(stream, "the peer", LIMIT).unwrap_err();
        assert_eq!(error.to_string(), words);
    }
    let (near, _far) = UnixStream::pair().unwrap();
    let error = Client::from_stream(near, "the peer", Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, Error::NoGreeting { .. }), "{error}");
}

#[test]
fn a_socket_is_named_in_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let error = Client::connect(&path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot connect to {}", path.display())
    );
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || drop(listener.accept().unwrap()));
    let error = Client::connect(&path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("QMP server at {} closed the connection", path.display())
    );
    thread.join().unwrap();
}

/// The program behind the socket may be stopped. Its listener then has a full queue.
#[test]
fn a_listener_that_accepts_nothing_is_named_after_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let error = Client::connect_timeout(&path, Duration::from_millis(20)).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        cause.contains("did not accept the connection within 20ms"),
        "{cause}"
    );
}
