// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM that is asked over its QMP socket, as QEMU is.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use qmp_client::Client;
use serde::Deserialize;
use serde_json::json;

use super::{Machine, MachineError};

/// How long the VMM may take to greet, to answer, and to come to rest.
const LIMIT: Duration = Duration::from_secs(10);
/// How often it is asked whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What `query-status` says.
#[derive(Deserialize)]
struct RunState {
    running: bool,
    status: String,
}

/// A virtual machine whose VMM has a QMP socket.
///
/// It is connected to only while it is asked: a monitor of QEMU serves one client at a time, and others may want it.
#[derive(Debug)]
pub struct QmpMachine {
    path: PathBuf,
    limit: Duration,
    paused: bool,
}

impl QmpMachine {
    /// The machine behind the socket at `path`. It is asked once, so that a wrong path shows now and not when the guest is to be
    /// paused.
    ///
    /// # Errors
    ///
    /// If nobody answers there, or not as a VMM does.
    pub fn new(path: &Path) -> Result<Self, MachineError> {
        Self::within(path, LIMIT)
    }

    fn within(path: &Path, limit: Duration) -> Result<Self, MachineError> {
        let machine = Self {
            path: path.to_owned(),
            limit,
            paused: false,
        };
        let state = machine.state(&mut machine.connect()?)?;
        if state.running {
            Ok(machine)
        } else {
            Err(machine.error(&format!("the guest does not run: {}", state.status)))
        }
    }

    fn connect(&self) -> Result<Client, MachineError> {
        Client::connect_within(&self.path, self.limit).map_err(|error| self.failed(&error))
    }

    fn state(&self, vmm: &mut Client) -> Result<RunState, MachineError> {
        vmm.query("query-status")
            .map_err(|error| self.failed(&error))
    }

    /// Gives a command, and waits until the guest runs or does not.
    fn command(&self, vmm: &mut Client, name: &str, running: bool) -> Result<(), MachineError> {
        vmm.command(name, json!({}))
            .map_err(|error| self.failed(&error))?;
        let deadline = Instant::now() + self.limit;
        loop {
            let state = self.state(vmm)?;
            if state.running == running {
                return Ok(());
            }
            if Instant::now() > deadline {
                let (status, limit) = (state.status, self.limit);
                return Err(self.error(&format!("it is {status} {limit:?} after '{name}'")));
            }
            sleep(LOOK_EVERY);
        }
    }

    fn failed(&self, error: &qmp_client::Error) -> MachineError {
        let cause = std::error::Error::source(error);
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        self.error(&format!("{error}{cause}"))
    }

    fn error(&self, what: &str) -> MachineError {
        MachineError(format!("{}: {what}", self.describe()))
    }
}

impl Machine for QmpMachine {
    fn describe(&self) -> String {
        format!("QMP at {}", self.path.display())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        let mut vmm = self.connect()?;
        if !self.state(&mut vmm)?.running {
            // Somebody else has paused it, and it is for him to let it go on.
            return Ok(());
        }
        match self.command(&mut vmm, "stop", false) {
            Ok(()) => {
                self.paused = true;
                Ok(())
            }
            Err(error) => {
                // It may have been heard. This connection may be of no more use, and there may be one at a time.
                drop(vmm);
                let running = self
                    .connect()
                    .and_then(|mut vmm| self.command(&mut vmm, "cont", true));
                Err(match running {
                    Ok(()) => error,
                    Err(other) => {
                        MachineError(format!("{error}; nor is it known to go on: {other}"))
                    }
                })
            }
        }
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.paused {
            let mut vmm = self.connect()?;
            self.command(&mut vmm, "cont", true)?;
            self.paused = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};
    use std::thread;

    use serde_json::Value;

    use super::*;

    /// What takes longer hangs.
    const LONG: Duration = Duration::from_secs(600);

    /// A VMM that comes to rest, or goes on, only when it has been asked for its state a few times, and that serves one
    /// client at a time.
    struct Vmm {
        _folder: tempfile::TempDir,
        path: PathBuf,
        running: Arc<AtomicBool>,
        orders: Arc<Mutex<Vec<String>>>,
    }

    fn vmm(obeys: &'static [&'static str]) -> Vmm {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let running = Arc::new(AtomicBool::new(true));
        let orders = Arc::new(Mutex::new(Vec::new()));
        let (state, journal) = (running.clone(), orders.clone());
        thread::spawn(move || {
            let asked = AtomicUsize::new(0);
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let _ = writeln!(stream, r#"{{"QMP": {{}}}}"#);
                for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                    let Ok(line) = line else { break };
                    let command: Value = serde_json::from_str(&line).unwrap();
                    let name = command["execute"].as_str().unwrap();
                    let mut answer = json!({ "return": {}, "id": command["id"] });
                    match name {
                        "query-status" => {
                            if asked.fetch_add(1, Ordering::SeqCst) % 3 == 2 {
                                match journal.lock().unwrap().last().map(String::as_str) {
                                    Some("stop") => state.store(false, Ordering::SeqCst),
                                    Some("cont") => state.store(true, Ordering::SeqCst),
                                    _ => {}
                                }
                            }
                            let running = state.load(Ordering::SeqCst);
                            let status = if running { "running" } else { "paused" };
                            answer["return"] = json!({ "running": running, "status": status });
                        }
                        "stop" | "cont" if obeys.contains(&name) => {
                            journal.lock().unwrap().push(name.to_owned());
                        }
                        "stop" | "cont" => {
                            answer = json!({
                                "error": { "class": "GenericError", "desc": "I will not" },
                                "id": command["id"],
                            });
                        }
                        _ => {}
                    }
                    let _ = writeln!(stream, "{answer}");
                }
            }
        });
        Vmm {
            _folder: folder,
            path,
            running,
            orders,
        }
    }

    #[test]
    fn it_has_come_to_rest_when_pause_returns() {
        let vmm = vmm(&["stop", "cont"]);
        let mut machine = QmpMachine::within(&vmm.path, LONG).unwrap();
        machine.pause().unwrap();
        assert!(!vmm.running.load(Ordering::SeqCst));
        machine.resume().unwrap();
        assert!(vmm.running.load(Ordering::SeqCst));
        machine.resume().unwrap();
        assert_eq!(*vmm.orders.lock().unwrap(), ["stop", "cont"]);
    }

    #[test]
    fn what_somebody_else_has_paused_is_left_so() {
        let vmm = vmm(&["stop", "cont"]);
        let mut machine = QmpMachine::within(&vmm.path, LONG).unwrap();
        vmm.running.store(false, Ordering::SeqCst);
        machine.pause().unwrap();
        machine.resume().unwrap();
        assert!(vmm.orders.lock().unwrap().is_empty());
        let error = QmpMachine::within(&vmm.path, LONG).unwrap_err().to_string();
        assert!(error.ends_with("the guest does not run: paused"), "{error}");
    }

    #[test]
    fn a_refusal_names_the_socket_and_the_guest_is_told_to_go_on() {
        let vmm = vmm(&["cont"]);
        let mut machine = QmpMachine::within(&vmm.path, LONG).unwrap();
        let error = machine.pause().unwrap_err().to_string();
        let path = vmm.path.display().to_string();
        assert!(
            error.contains(&path) && error.contains("I will not"),
            "{error}"
        );
        assert_eq!(*vmm.orders.lock().unwrap(), ["cont"]);
    }

    #[test]
    fn a_vmm_that_does_not_come_to_rest_is_an_error() {
        let vmm = vmm(&[]);
        let mut machine = QmpMachine::within(&vmm.path, LONG).unwrap();
        let mut client = machine.connect().unwrap();
        // The connection has its limit already; this one is for coming to rest.
        machine.limit = Duration::from_millis(50);
        let error = machine.command(&mut client, "query-status", false);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("it is running 50ms after"), "{error}");
        let missing = QmpMachine::new(&vmm.path.with_extension("none")).unwrap_err();
        assert!(missing.to_string().contains("vmm.none"), "{missing}");
    }
}
