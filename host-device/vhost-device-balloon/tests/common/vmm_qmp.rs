// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The QMP socket of a fake VMM whose guest can be paused.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{json, Value};

/// Answers `query-status`, `stop` and `cont`, and records `stop` and `cont`. Serves one client at a
/// time, as QEMU does.
pub struct FakeVmmQmp {
    pub path: PathBuf,
    commands: Arc<Mutex<Vec<String>>>,
    is_silent: Arc<AtomicBool>,
}

impl FakeVmmQmp {
    pub fn start(directory: &Path) -> Self {
        let path = directory.join("vmm.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let commands = Arc::default();
        let is_silent = Arc::new(AtomicBool::new(false));
        let vmm_qmp = Self {
            path,
            commands: Arc::clone(&commands),
            is_silent: Arc::clone(&is_silent),
        };
        // The thread ends with the test program.
        thread::spawn(move || {
            for stream in listener.incoming() {
                while is_silent.load(Ordering::Acquire) {
                    thread::sleep(Duration::from_millis(2));
                }
                serve(&stream.unwrap(), &commands);
            }
        });
        vmm_qmp
    }

    /// Resumes the guest, as another QMP client would.
    pub fn cont(&self) {
        self.commands.lock().unwrap().push("cont".into());
    }

    /// Sets whether new connections get no greeting, as those of a VMM whose main loop is busy.
    pub fn set_silent(&self, is_silent: bool) {
        self.is_silent.store(is_silent, Ordering::Release);
    }

    /// Returns the recorded commands in order.
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
