// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the program: its output, its exit statuses, and its response to Ctrl-C.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use guest_migration::stream::{Destination, Writer, WriterOptions};
use guest_migration::{Layout, PageRun, RamBlock, PAGE_SIZE};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Value};

/// A limit that only a hanging test exceeds.
const LIMIT: Duration = Duration::from_secs(600);

fn balloonctl(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_balloonctl"));
    command
        .args(arguments)
        .env_remove("BALLOONCTL_QMP")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(arguments: &[&str]) -> Output {
    balloonctl(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Starts a daemon at `path` that answers with `answer`. Returns the names of the commands that it receives.
fn daemon(
    path: &Path,
    answer: impl Fn(&str, &Value) -> Result<Value, &'static str> + Send + 'static,
) -> Arc<Mutex<Vec<String>>> {
    let listener = UnixListener::bind(path).unwrap();
    let journal = Arc::new(Mutex::new(Vec::new()));
    let commands = journal.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = writeln!(stream, r#"{{"QMP": {{}}}}"#);
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let Ok(line) = line else { break };
                let command: Value = serde_json::from_str(&line).unwrap();
                let name = command["execute"].as_str().unwrap();
                let mut line = match answer(name, &command["arguments"]) {
                    Ok(value) => json!({ "return": value }),
                    Err(why) => json!({ "error": { "class": "GenericError", "desc": why } }),
                };
                line["id"] = command["id"].clone();
                commands.lock().unwrap().push(name.to_owned());
                let _ = writeln!(stream, "{line}");
            }
        }
    });
    journal
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(2));
    }
}

/// The running program. It is killed if the test fails early.
struct Running(Option<Child>);

impl Running {
    fn start(arguments: &[&str]) -> Self {
        Self(Some(balloonctl(arguments).spawn().unwrap()))
    }

    fn errors(&mut self) -> BufReader<ChildStderr> {
        let child = self.0.as_mut().unwrap();
        BufReader::new(child.stderr.take().unwrap())
    }

    fn interrupt(&self) {
        let id = self.0.as_ref().unwrap().id();
        let pid = Pid::from_raw(i32::try_from(id).unwrap()).unwrap();
        kill_process(pid, Signal::INT).unwrap();
    }

    fn finish(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_target_is_set_and_waited_for_so_long_and_no_longer() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    daemon(&socket, |name, arguments| match name {
        "balloon" if arguments["value"] == 1 << 30 => Ok(json!({})),
        "balloon" => Err("there is not so much memory"),
        _ => Ok(json!({ "actual": 2u64 << 30 })),
    });
    let qmp = socket.to_str().unwrap();
    let done = run(&["--qmp", qmp, "--json", "target", "1G"]);
    assert_eq!(done.status.code(), Some(0));
    let value: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(value, json!({ "target": 1 << 30, "actual": 2u64 << 30 }));
    let late = run(&["--qmp", qmp, "target", "1G", "--wait", "0"]);
    assert_eq!(late.status.code(), Some(5));
    let refused = run(&["--qmp", qmp, "--json", "target", "8G"]);
    assert_eq!(refused.status.code(), Some(1));
    let value: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(value["error"]["exit-status"], 1);
    assert!(text(&refused.stderr).contains("there is not so much memory"));
}

#[test]
fn a_socket_that_is_missing_is_told_from_one_that_is_not_given() {
    let none = run(&["status"]);
    assert_eq!(none.status.code(), Some(2));
    assert!(text(&none.stderr).contains("BALLOONCTL_QMP"));
    let wrong = run(&["status", "--qmp", "/nonexistent/qmp"]);
    assert_eq!(wrong.status.code(), Some(3));
    assert!(text(&wrong.stderr).contains("/nonexistent/qmp"));
    assert_eq!(run(&["target", "much"]).status.code(), Some(2));
}

/// The first Ctrl-C cancels. The second one leaves without waiting for the cancellation.
#[test]
fn ctrl_c_cancels_a_migration_and_a_second_one_leaves_it() {
    for times in [1, 2] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let state = Arc::new(Mutex::new("active"));
        let seen = state.clone();
        let journal = daemon(&socket, move |name, _| match name {
            "migrate-cancel" => {
                *seen.lock().unwrap() = if times == 1 {
                    "cancelled"
                } else {
                    "cancelling"
                };
                Ok(json!({}))
            }
            "query-migrate" => Ok(json!({ "status": *seen.lock().unwrap() })),
            _ => Ok(json!({})),
        });
        let asked = |name: &str| journal.lock().unwrap().iter().any(|it| it == name);
        let qmp = socket.to_str().unwrap();
        let arguments = ["--qmp", qmp, "migrate", "--to", "unix:/nowhere"];
        let child = Running::start(&arguments);
        wait_until("it never looked", || asked("query-migrate"));
        child.interrupt();
        wait_until("it never cancelled", || asked("migrate-cancel"));
        if times == 2 {
            child.interrupt();
        }
        let ended = child.finish();
        assert_eq!(ended.status.code(), Some(4), "{}", text(&ended.stderr));
        let left = text(&ended.stderr).contains("exited before");
        assert_eq!(left, times == 2, "{}", text(&ended.stderr));
    }
}

/// Starts a receiver, and waits until it listens.
fn receiver(folder: &Path) -> (Running, String, BufReader<ChildStderr>) {
    let uri = format!("unix:{}", folder.join("ram.sock").display());
    let file = folder.join("memory");
    let arguments = ["--listen", &uri, "--memory-file", file.to_str().unwrap()];
    let arguments: Vec<&str> = ["receive"].into_iter().chain(arguments).collect();
    let mut child = Running::start(&arguments);
    let mut errors = child.errors();
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    assert!(line.starts_with("listening on"), "{line}");
    (child, uri, errors)
}

fn writer(uri: &str) -> Writer {
    let layout = Layout::new([RamBlock::new("ram", 16 * PAGE_SIZE).unwrap()], []).unwrap();
    Writer::start(
        uri.parse::<guest_migration::stream::Address>().unwrap(),
        &layout,
        WriterOptions::default(),
    )
    .unwrap()
}

#[test]
fn what_is_received_is_marked_until_it_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("memory");
    let marker = Destination::marker(&file);
    let (child, uri, _errors) = receiver(folder.path());
    assert!(marker.exists());
    let mut writer = writer(&uri);
    let run = PageRun {
        block: 0,
        first: 3,
        pages: 1,
    };
    writer.pages(run, &[7; 4096]).unwrap();
    writer.end_iteration().unwrap();
    writer.finish(None).unwrap();
    let ended = child.finish();
    assert_eq!(ended.status.code(), Some(0));
    assert!(
        text(&ended.stdout).contains("pages with content"),
        "{}",
        text(&ended.stdout)
    );
    assert!(!marker.exists());
    assert_eq!(std::fs::read(&file).unwrap()[3 * 4096], 7);
}

#[test]
fn what_is_cut_short_keeps_its_mark() {
    let folder = tempfile::tempdir().unwrap();
    let marker = Destination::marker(&folder.path().join("memory"));
    let (child, uri, mut errors) = receiver(folder.path());
    drop(writer(&uri));
    let ended = child.finish();
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut errors, &mut stderr).unwrap();
    assert_eq!(ended.status.code(), Some(6), "{stderr}");
    assert!(
        marker.exists() && stderr.contains(marker.to_str().unwrap()),
        "{stderr}"
    );

    let folder = tempfile::tempdir().unwrap();
    let (child, _uri, _errors) = receiver(folder.path());
    child.interrupt();
    assert_eq!(child.finish().status.code(), Some(4));
    assert!(Destination::marker(&folder.path().join("memory")).exists());
}
