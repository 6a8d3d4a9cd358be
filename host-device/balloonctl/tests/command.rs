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

#[test]
fn an_ambiguous_size_is_refused_before_anything_is_sent() {
    for arguments in [
        &["target", "300"][..],
        &["migrate", "--to", "unix:/s", "--max-bandwidth", "100"],
    ] {
        let refused = run(&[&["--qmp", "/nonexistent"], arguments].concat());
        assert_eq!(refused.status.code(), Some(2));
        let text = text(&refused.stderr);
        assert!(
            text.contains("has no unit: write") && text.contains("M for MiB"),
            "{text}"
        );
    }
}

/// Options of one `migrate` are not those of the next one: nothing is set in the daemon.
#[test]
fn options_of_a_migration_are_passed_with_it_and_paths_are_absolute() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let arguments = seen.clone();
    let journal = daemon(&socket, move |name, value| {
        if name == "migrate" {
            arguments.lock().unwrap().push(value.clone());
        }
        Ok(json!({ "status": "completed" }))
    });
    let qmp = socket.to_str().unwrap();
    let migrate = |options: &[&str]| {
        let arguments = [&["--qmp", qmp, "migrate"], options].concat();
        let done = balloonctl(&arguments)
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    };
    let first = [
        "--to",
        "file:ram",
        "--vmm-qmp",
        "vm/qmp",
        "--channels",
        "4",
        "--no-hints",
    ];
    migrate(&first);
    migrate(&["--to", "unix:sub/s"]);
    let here = folder.path().canonicalize().unwrap();
    let waits = json!([{ "capability": "pause-before-switchover", "state": false }]);
    let expected = [
        json!({
            "uri": format!("file:{}", here.join("ram").display()), "vmm-qmp": here.join("vm/qmp"),
            "parameters": { "multifd-channels": 4, "free-page-hint": false }, "capabilities": waits,
        }),
        json!({ "uri": format!("unix:{}", here.join("sub/s").display()), "capabilities": waits }),
    ];
    assert_eq!(*seen.lock().unwrap(), expected);
    let journal = journal.lock().unwrap();
    assert!(
        journal.iter().all(|name| !name.starts_with("migrate-set")),
        "{journal:?}"
    );
}

#[test]
fn hints_end_only_where_there_is_a_guest() {
    for (status, exit, words) in [
        ("no-front-end", 1, "no VMM is connected"),
        ("no-driver", 0, "once its driver runs"),
        ("running", 0, "hint round"),
    ] {
        for what in ["done", "stop"] {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("qmp");
            let journal = daemon(&socket, move |_, _| Ok(json!({ "status": status })));
            let done = run(&["--qmp", socket.to_str().unwrap(), "hint", what]);
            let said = format!("{}{}", text(&done.stdout), text(&done.stderr));
            assert_eq!(done.status.code(), Some(exit), "{said}");
            assert!(said.contains(words), "{said}");
            let sent = journal
                .lock()
                .unwrap()
                .iter()
                .any(|it| it.starts_with("free-page-hint"));
            assert_eq!(sent, exit == 0, "{status}");
        }
    }
}

#[test]
fn discarding_is_inhibited_allowed_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let journal = daemon(&socket, |name, _| match name {
        "query-balloon" => Ok(json!({
            "actual": 1 << 30, "discard-inhibited": true, "discard-inhibited-by": ["process 7 has VFIO devices"],
        })),
        _ => Ok(json!({})),
    });
    for (what, words) in [
        ("inhibit", "no memory is released"),
        ("allow", "memory is released"),
        ("status", "inhibited: process 7 has VFIO devices"),
    ] {
        let done = run(&["--qmp", socket.to_str().unwrap(), "discard", what]);
        assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
        assert!(text(&done.stdout).contains(words), "{}", text(&done.stdout));
    }
    let mut sent = journal.lock().unwrap().clone();
    sent.retain(|name| name != "qmp_capabilities");
    assert_eq!(sent, ["inhibit-discard", "allow-discard", "query-balloon"]);
}

/// One server accepts and says nothing, one does not accept.
#[test]
fn a_silent_socket_is_waited_for_with_a_limit_and_a_message() {
    for accepts in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut waiting = Vec::new();
        if !accepts {
            rustix::net::listen(&listener, 0).unwrap();
            waiting.push(std::os::unix::net::UnixStream::connect(&socket).unwrap());
        }
        let qmp = socket.to_str().unwrap();
        let silent = run(&["--qmp", qmp, "--timeout", "3", "status"]);
        let said = text(&silent.stderr);
        assert_eq!(silent.status.code(), Some(3), "{said}");
        assert!(said.contains("within 3s"), "{said}");
        assert!(
            said.contains(&format!("waiting for {qmp}, at most 3s")),
            "{said}"
        );
    }
    assert_eq!(run(&["status", "--timeout", "0"]).status.code(), Some(2));
}

#[test]
fn a_daemon_that_stops_answering_is_a_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = writeln!(stream, "{}", json!({ "QMP": {} }));
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            let command: Value = serde_json::from_str(&line.unwrap()).unwrap();
            if command["execute"] == "qmp_capabilities" {
                let _ = writeln!(stream, "{}", json!({ "return": {}, "id": command["id"] }));
            }
        }
    });
    let late = run(&[
        "--qmp",
        socket.to_str().unwrap(),
        "--timeout",
        "3",
        "status",
    ]);
    let said = text(&late.stderr);
    assert_eq!(late.status.code(), Some(5), "{said}");
    assert!(
        said.contains("did not answer query-balloon within 3s") && said.contains("--timeout"),
        "{said}"
    );
}

#[test]
fn ctrl_c_ends_the_wait_for_a_target() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let journal = daemon(&socket, |_, _| Ok(json!({ "actual": 2u64 << 30 })));
    let child = Running::start(&[
        "--qmp",
        socket.to_str().unwrap(),
        "target",
        "1G",
        "--wait",
        "600",
    ]);
    let asked = |count| {
        let journal = journal.lock().unwrap();
        journal.iter().filter(|it| *it == "query-balloon").count() >= count
    };
    wait_until("it never looked", || asked(2));
    child.interrupt();
    let ended = child.finish();
    assert_eq!(ended.status.code(), Some(4), "{}", text(&ended.stderr));
    assert!(text(&ended.stderr).contains("remains set"));
}
