// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Target `qmp`: the byte stream of one client, in chunks, to a device without a guest.
//!
//! The first [`CHUNKS`] bytes of the input are the lengths of chunks, in turn; 0 is the longest. The rest is the stream.
//! The target checks that every answer is an object of QMP, that the answers do not depend on the chunks, that a stream
//! of valid objects gets one answer for each with its `id`, and that another client is served afterwards.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;
use rustix::net::{recv, send, socketpair, AddressFamily, RecvFlags, SendFlags};
use rustix::net::{SocketFlags, SocketType};
use serde_json::{Deserializer, Value};
use vhost_device_balloon::device_lock::DeviceLock;
use vhost_device_balloon::events::Events;
use vhost_device_balloon::migrate::MigrationManager;
use vhost_device_balloon::qmp::{CommandContext, QmpClients, QmpLimits};

use crate::guest::{device, ALL};

/// The number of lengths at the start of an input.
const CHUNKS: usize = 4;
/// The longest chunk, in bytes. The server reads as many at once.
const LONGEST: usize = 8192;
/// The longest stream, in bytes. It is longer than the longest command.
const STREAM: usize = 72 << 10;
/// A wait that takes longer is regarded as hung.
const HANG_TIMEOUT: Duration = Duration::from_secs(600);

/// No client of this target is slow.
const LIMITS: QmpLimits = QmpLimits {
    negotiation: HANG_TIMEOUT,
    unread: HANG_TIMEOUT,
    closing: HANG_TIMEOUT,
    idle: HANG_TIMEOUT,
};

pub fn run(bytes: &[u8]) {
    let Some((lengths, stream)) = bytes.split_at_checked(CHUNKS) else {
        return;
    };
    let stream = stream.get(..STREAM).unwrap_or(stream);
    if !is_harmless(stream) {
        return;
    }
    let answers = serve(stream, lengths);
    if lengths.iter().any(|length| *length != 0) {
        assert_eq!(
            answers,
            serve(stream, &[0]),
            "the chunks change the answers"
        );
    }
    if let Some(objects) = objects(stream) {
        check_answers(&objects, &answers);
    }
}

/// Returns whether the stream has no command that acts outside this process: one that writes a file or connects.
///
/// A command is an object that begins at some brace. Every one is examined, whatever the server regards as commands.
fn is_harmless(stream: &[u8]) -> bool {
    let starts = stream.iter().enumerate().filter(|(_, byte)| **byte == b'{');
    starts.map(|(at, _)| &stream[at..]).all(|rest| {
        let first = Deserializer::from_slice(rest).into_iter::<Value>().next();
        let Some(Ok(command)) = first else {
            return true;
        };
        match command["execute"].as_str() {
            // Such a path cannot be created.
            Some("save-device-state") => command["arguments"]["filename"]
                .as_str()
                .is_none_or(|path| Path::new(path).starts_with("/nonexistent")),
            _ => true,
        }
    })
}

/// Returns the objects of a stream, if it consists of nothing else and no object has a key twice.
fn objects(stream: &[u8]) -> Option<Vec<Value>> {
    let values = Deserializer::from_slice(stream).into_iter::<Value>();
    let objects: Vec<Value> = values.collect::<Result<_, _>>().ok()?;
    let frames = objects.iter().all(Value::is_object) && stream.len() < 64 << 10;
    let keys: usize = objects.iter().map(count_keys).sum();
    (frames && keys == count_colons(stream)).then_some(objects)
}

/// Returns the number of keys of all objects in `value`, each once.
fn count_keys(value: &Value) -> usize {
    match value {
        Value::Array(values) => values.iter().map(count_keys).sum(),
        Value::Object(values) => values.len() + values.values().map(count_keys).sum::<usize>(),
        _ => 0,
    }
}

/// Returns the number of colons in valid JSON outside its strings: each belongs to a key.
fn count_colons(json: &[u8]) -> usize {
    let (mut count, mut string, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if string => escaped = true,
            b'"' => string = !string,
            b':' if !string => count += 1,
            _ => {}
        }
    }
    count
}

fn check_answers(objects: &[Value], answers: &[Value]) {
    assert_eq!(answers.len(), objects.len() + 1);
    let answers = answers.iter().skip(1);
    for (object, answer) in objects.iter().zip(answers) {
        let id = |value: &Value| value.get("id").filter(|id| !id.is_null()).cloned();
        assert_eq!(id(answer), id(object), "{object}: {answer}");
    }
}

/// Serves the stream to a new device. Returns the answers, the greeting first.
fn serve(stream: &[u8], lengths: &[u8]) -> Vec<Value> {
    let events = Arc::new(Events::default());
    let device = Arc::new(DeviceLock::new(device(ALL, events.clone())));
    let manager = MigrationManager::new(device.clone(), events.clone(), || {});
    let context = CommandContext {
        device,
        migration_manager: Arc::new(manager),
        events,
        save_state: Box::new(|state, path| state.write(path)),
        quit: Box::new(|| {}),
    };
    let mut clients = QmpClients::with_limits(context, LIMITS);
    // Each packet is one read, so the server gets these chunks.
    let kind = SocketType::SEQPACKET;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("a socket pair");
    let ours = UnixStream::from(ours);
    clients.serve(UnixStream::from(theirs));
    let answers = thread::scope(|scope| {
        let reading = scope.spawn(|| read_answers(&ours));
        let mut rest = stream;
        for length in lengths.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let length = match usize::from(*length) {
                0 => LONGEST,
                length => length,
            };
            let (chunk, after) = rest.split_at(length.min(rest.len()));
            // The server closes the connection after a command that is too long.
            if retry_on_intr(|| send(&ours, chunk, SendFlags::NOSIGNAL)).is_err() {
                break;
            }
            rest = after;
        }
        let _ = ours.shutdown(std::net::Shutdown::Write);
        reading.join().expect("the answers are valid")
    });
    check_other_client(&mut clients);
    wait_until_empty(&clients);
    clients.close();
    answers
}

/// Reads lines until the server closes the connection. Returns the answers, without the events.
fn read_answers(stream: &UnixStream) -> Vec<Value> {
    let mut buffer = vec![0; 1 << 18];
    let mut bytes = Vec::new();
    // A reset is an end as well: the server may close the connection before it has read all chunks.
    while let Ok((_, length @ 1..)) =
        retry_on_intr(|| recv(stream, &mut buffer[..], RecvFlags::empty()))
    {
        bytes.extend(&buffer[..length]);
    }
    let mut answers = Vec::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        assert!(line.ends_with(b"\r\n"));
        let mut value: Value = serde_json::from_slice(line).expect("a line of JSON");
        // The name of a temporary file is random.
        if let Some(Value::String(text)) = value.pointer_mut("/error/desc") {
            text.truncate(text.find("/.tmp").unwrap_or(text.len()));
        }
        let object = value.as_object().expect("an object");
        let kinds = ["QMP", "return", "error", "event"];
        let kinds = kinds.iter().filter(|key| object.contains_key(**key));
        let kinds: Vec<_> = kinds.copied().collect();
        assert_eq!(kinds.len(), 1, "{value}");
        assert_eq!(kinds[0] == "QMP", answers.is_empty(), "{value}");
        if kinds[0] != "event" {
            answers.push(value);
        }
    }
    answers
}

/// Waits until the threads of all clients have closed their descriptors.
fn wait_until_empty(clients: &QmpClients) {
    let limit = Instant::now() + HANG_TIMEOUT;
    while clients.count() > 0 {
        assert!(Instant::now() < limit, "a client that is gone has a place");
        thread::sleep(Duration::from_micros(100));
    }
}

fn check_other_client(clients: &mut QmpClients) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    ours.set_read_timeout(Some(HANG_TIMEOUT))
        .expect("a timeout");
    clients.serve(theirs);
    let commands = b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-version\",\"id\":7}";
    (&ours).write_all(commands).expect("the server reads");
    let mut lines = BufReader::new(&ours).lines();
    let mut next = || -> Value {
        let line = lines.next().expect("an answer").expect("an answer");
        serde_json::from_str(&line).expect("JSON")
    };
    assert!(next().get("QMP").is_some());
    assert!(next().get("return").is_some());
    let answer = next();
    assert!(answer.get("return").is_some() && answer["id"] == 7);
}
