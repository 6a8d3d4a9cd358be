// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM's QMP socket, behind which a guest can be paused.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{json, Value};

/// Answers `query-status`, `stop` and `cont`, one client at a time as QEMU does, and writes them down.
pub struct FakeVmmQmp {
    pub path: PathBuf,
    commands: Arc<Mutex<Vec<String>>>,
}

impl FakeVmmQmp {
    pub fn start(directory: &Path) -> Self {
        let path = directory.join("vmm.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let commands = Arc::default();
        let vmm_qmp = Self {
            path,
            commands: Arc::clone(&commands),
        };
        // It ends with the test program.
        thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&stream.unwrap(), &commands);
            }
        });
        vmm_qmp
    }

    /// Somebody else tells it to go on.
    pub fn cont(&self) {
        self.commands.lock().unwrap().push("cont".into());
    }

    /// What it was told, in this order.
    pub fn commands(&self) -> Vec<String> {
        self.commands.lock().unwrap().clone()
    }
}

fn serve(mut stream: &UnixStream, commands: &Mutex<Vec<String>>) {
    let _ = writeln!(stream, "{}", json!({ "QMP": {} }));
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let command: Value = serde_json::from_str(&line).unwrap();
        let name = command["execute"].as_str().unwrap();
        let mut commands = commands.lock().unwrap();
        if ["stop", "cont"].contains(&name) {
            commands.push(name.to_owned());
        }
        let running = commands.last().is_none_or(|last| last == "cont");
        let value = match name {
            "query-status" => {
                let status = if running { "running" } else { "paused" };
                json!({ "running": running, "status": status })
            }
            _ => json!({}),
        };
        let _ = writeln!(
            stream,
            "{}",
            json!({ "return": value, "id": command["id"] })
        );
    }
}
