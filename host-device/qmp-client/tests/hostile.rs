// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the client with peers that send anything.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use qmp_client::{Client, Error, JsonLines, LineError};
use serde_json::{json, Value};

const GREETING: &[u8] = b"{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n";
/// A limit that only a hanging test exceeds.
const LIMIT: Duration = Duration::from_secs(600);
/// The id of the first command after `qmp_capabilities`.
const ID: u64 = 2;

/// How a command ends.
#[derive(Clone, Debug, PartialEq)]
enum End {
    Answered(Value),
    Refused(String),
    Invalid,
    Closed,
}

/// One line of a peer, and how it ends the command if it does.
#[derive(Clone, Debug)]
struct Line {
    text: String,
    end: Option<End>,
}

fn line(text: String, end: Option<End>) -> Line {
    Line { text, end }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z]{1,5}", inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// An id that does not belong to the command.
fn other_id() -> impl Strategy<Value = Value> {
    value().prop_filter("the id of the command", |id| *id != json!(ID))
}

fn peer_line() -> impl Strategy<Value = Line> {
    let error = |desc: &str| json!({ "class": "GenericError", "desc": desc });
    prop_oneof![
        6 => ("[A-Z_]{1,20}", value())
            .prop_map(|(name, data)| line(json!({ "event": name, "data": data }).to_string(), None)),
        3 => (value(), other_id())
            .prop_map(|(value, id)| line(json!({ "return": value, "id": id }).to_string(), None)),
        1 => value().prop_map(|value| line(json!({ "return": value }).to_string(), None)),
        2 => other_id().prop_filter("an error without an id counts", |id| !id.is_null())
            .prop_map(move |id| line(json!({ "error": error("no"), "id": id }).to_string(), None)),
        1 => value().prop_map(|value| line(json!({ "QMP": value }).to_string(), None)),
        2 => value().prop_map(|value| {
            line(json!({ "return": value, "id": ID }).to_string(), Some(End::Answered(value)))
        }),
        1 => (any::<bool>(), "[a-z ]{1,20}").prop_map(move |(with_id, desc)| {
            let mut answer = json!({ "error": error(&desc) });
            if with_id {
                answer["id"] = ID.into();
            }
            line(answer.to_string(), Some(End::Refused(desc)))
        }),
        // Wrong types, an object that is no message, nesting that is too deep, no JSON, no UTF-8 of JSON.
        1 => prop::sample::select(vec![
            json!({ "event": 5 }).to_string(),
            json!({ "error": "no", "id": ID }).to_string(),
            json!({ "error": { "class": 1, "desc": [] }, "id": ID }).to_string(),
            json!({}).to_string(),
            json!([{ "return": {}, "id": ID }]).to_string(),
            "5".to_owned(),
            format!("{{\"return\": {}{}, \"id\": {ID}}}", "[".repeat(500), "]".repeat(500)),
            "[".repeat(100_000),
            "{\"return\": {}, \"id\": 2".to_owned(),
            "{\"return\": \"\\ud800\", \"id\": 2}".to_owned(),
            String::new(),
        ]).prop_map(|text| line(text, Some(End::Invalid))),
        1 => "[^\n]{1,40}".prop_filter("JSON", |text| serde_json::from_str::<Value>(text).is_err())
            .prop_map(|text| line(text, Some(End::Invalid))),
    ]
}

/// Starts a peer that sends `bytes` in pieces after it has received a command, and then closes the connection.
fn peer(bytes: Vec<u8>, cuts: Vec<Index>) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut output = far.try_clone().unwrap();
        output.write_all(GREETING).unwrap();
        // `qmp_capabilities` and the command.
        let lines = BufReader::new(far).lines().take(2).count();
        assert_eq!(lines, 2);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        for piece in cuts.windows(2) {
            // The client may have ended.
            let _ = output.write_all(&bytes[piece[0]..piece[1]]);
        }
    });
    near
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the peer sends, the command ends with the first line that concerns it, or at the first invalid one.
    #[test]
    fn a_command_ends_as_the_first_line_that_concerns_it_says(
        lines in prop::collection::vec(peer_line(), 0..20),
        tail in prop::option::of("[^\n]{0,20}"),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let mut bytes = Vec::new();
        for line in &lines {
            bytes.extend_from_slice(line.text.as_bytes());
            bytes.push(b'\n');
        }
        // A line that does not end is no line.
        bytes.extend_from_slice(tail.unwrap_or_default().as_bytes());
        let expected = lines.iter().find_map(|line| line.end.clone()).unwrap_or(End::Closed);
        let mut client = Client::from_stream(peer(bytes, cuts), "the peer", LIMIT).unwrap();
        let end = match client.command("anything", json!({})) {
            Ok(value) => End::Answered(value),
            Err(Error::Refused { qmp_error, .. }) => End::Refused(qmp_error.desc),
            Err(Error::Line(LineError::Json { .. })) => End::Invalid,
            Err(Error::Line(LineError::Closed { .. })) => End::Closed,
            Err(error) => panic!("{error}"),
        };
        prop_assert_eq!(end, expected);
    }

    /// Any bytes are values or an error, and never a panic.
    #[test]
    fn any_bytes_are_values_or_an_error(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b'1')], 0..400),
        max_line in 0usize..40,
    ) {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(&bytes).unwrap();
        drop(far);
        let mut lines = JsonLines::new(near, "the peer").with_max_line(max_line);
        for text in bytes.split(|&byte| byte == b'\n') {
            let value = serde_json::from_slice::<Value>(text).ok();
            match lines.receive::<Value>(LIMIT) {
                Ok(got) => {
                    prop_assert!(text.len() <= max_line);
                    prop_assert_eq!(got, value);
                }
                Err(LineError::Json { .. }) => {
                    prop_assert!(value.is_none() && text.len() <= max_line);
                }
                Err(LineError::TooLong { .. }) => {
                    prop_assert!(text.len() > max_line);
                    break;
                }
                // The last line has no end.
                Err(LineError::Closed { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Answers the first command with `lines`.
fn client(lines: &[Value]) -> Client {
    let lines = lines.iter().map(|line| format!("{line}\n"));
    let bytes = lines.collect::<String>().into_bytes();
    Client::from_stream(peer(bytes, Vec::new()), "the peer", LIMIT).unwrap()
}

#[test]
fn a_flood_of_events_keeps_little_memory() {
    let events = 100;
    let mut lines: Vec<Value> = (0..events)
        .map(|number| json!({ "event": "NEWS", "data": [number, "x".repeat(1 << 20)] }))
        .collect();
    lines.push(json!({ "return": {}, "id": ID }));
    let mut client = client(&lines);
    client.command("anything", json!({})).unwrap();
    let mut kept = Vec::new();
    // The peer has closed the connection.
    while let Ok(Some(event)) = client.wait_event(|_| true, LIMIT) {
        kept.push(event.data[0].as_u64().unwrap());
    }
    assert_eq!(kept.last(), Some(&(events - 1)), "the newest are kept");
    assert!(kept.len() < 8, "{kept:?}");
}

#[test]
fn the_text_of_a_peer_is_cut_and_cannot_control_a_terminal() {
    let desc = format!("no\u{1b}[2J\r\n{}", "x".repeat(1 << 20));
    let error = json!({ "class": "Generic\u{7}Error", "desc": desc });
    let mut client = client(&[json!({ "error": error, "id": ID })]);
    let error = client.command("anything", json!({})).unwrap_err();
    let text = error.to_string();
    assert!(
        !text.contains(char::is_control) && text.len() < 2000,
        "{text}"
    );
    assert!(
        text.starts_with("the peer refused anything: no [2J  xxx"),
        "{text}"
    );
}
