// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM that is paused through the QMP socket of its VMM, such as QEMU.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use qmp_client::Client;
use serde::Deserialize;
use serde_json::json;

use super::{PausedGuest, Vm, VmError};
use crate::guard::ResumeGuard;
use crate::CancelToken;

/// Timeout for the greeting, for each answer, and for pausing and resuming.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The same for resuming the guest of a cancelled migration. If the VMM takes longer, the guard process resumes the guest.
const CANCELLED_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval at which a connection that is not accepted checks for a cancellation.
const CANCEL_INTERVAL: Duration = Duration::from_millis(100);
/// Interval between two queries of the run state.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// How long a guard process tries to resume the guest. Another client may use the VMM's QMP socket meanwhile.
const RESUME_TIMEOUT: Duration = Duration::from_secs(300);
/// Interval between two of these attempts.
const RESUME_INTERVAL: Duration = Duration::from_millis(100);

/// The answer to `query-status`.
#[derive(Deserialize)]
struct RunState {
    running: bool,
    status: String,
}

/// A VM whose VMM has a QMP socket.
///
/// It connects only for the time of an operation. A QEMU monitor serves one client at a time, and other clients may
/// need it. A [guard process](crate::guard) resumes the guest if this process ends while it has paused the guest.
///
/// Cancelling the migration ends the wait for the VMM.
#[derive(Debug)]
pub struct QmpVm {
    path: PathBuf,
    timeout: Duration,
    cancel: CancelToken,
    paused: bool,
    guard: ResumeGuard,
}

/// A connection to the VMM that a cancellation closes.
struct Connection {
    client: Client,
    /// The same connection, which the cancellation reaches as long as this exists.
    _stream: Arc<UnixStream>,
}

impl QmpVm {
    /// Returns the VM behind the socket at `path`, for a migration that `cancel` cancels. Queries its state once, so that
    /// a wrong path is found now and not at the switchover.
    ///
    /// # Errors
    ///
    /// If the socket does not answer as a VMM does, if the guest does not run, or if the migration is cancelled.
    pub fn new(path: &Path, cancel: &CancelToken) -> Result<Self, VmError> {
        Self::with_timeout(path, TIMEOUT, cancel)
    }

    fn with_timeout(path: &Path, timeout: Duration, cancel: &CancelToken) -> Result<Self, VmError> {
        let mut vm = Self {
            path: path.to_owned(),
            timeout,
            cancel: cancel.clone(),
            paused: false,
            guard: ResumeGuard::default(),
        };
        let state = vm.state(&mut vm.connect_until_cancelled()?.client)?;
        if !state.running {
            return Err(vm.error(&format!(
                "guest is not running: {}; resume it before the migration",
                state.status
            )));
        }
        vm.guard = ResumeGuard::start();
        Ok(vm)
    }

    /// Returns the VM behind the socket at `path`, which another process has paused.
    pub(super) fn paused(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            timeout: TIMEOUT,
            cancel: CancelToken::default(),
            paused: true,
            guard: ResumeGuard::default(),
        }
    }

    /// Resumes the guest of the VMM at `path` after the process that has paused it was killed. Repeats the attempt for
    /// some minutes if the VMM does not answer.
    ///
    /// # Errors
    ///
    /// The error of the last attempt.
    pub(crate) fn resume_of_ended_process(path: &Path) -> Result<(), VmError> {
        let mut vm = Self::paused(path);
        let begun = Instant::now();
        loop {
            match vm.resume() {
                Err(_) if begun.elapsed() < RESUME_TIMEOUT => sleep(RESUME_INTERVAL),
                result => return result,
            }
        }
    }

    /// Connects, to resume the guest.
    fn connect(&self) -> Result<Client, VmError> {
        Client::connect_timeout(&self.path, self.resume_timeout())
            .map_err(|error| self.failed(&error))
    }

    fn resume_timeout(&self) -> Duration {
        match self.cancel.is_cancelled() {
            true => self.timeout.min(CANCELLED_TIMEOUT),
            false => self.timeout,
        }
    }

    /// Connects. A cancellation closes the connection.
    fn connect_until_cancelled(&self) -> Result<Connection, VmError> {
        let begun = Instant::now();
        let stream = loop {
            if self.cancel.is_cancelled() {
                return Err(self.error("migration was cancelled"));
            }
            let left = self.timeout.saturating_sub(begun.elapsed());
            match qmp_client::connect(&self.path, left.min(CANCEL_INTERVAL)) {
                Err(error) if error.kind() == ErrorKind::TimedOut && left > CANCEL_INTERVAL => {}
                result => break result,
            }
        };
        let stream = stream.map_err(|source| {
            self.failed(&qmp_client::Error::Connect {
                path: self.path.clone(),
                source,
            })
        })?;
        let peer = stream.try_clone();
        let peer = peer.map_err(|error| self.error(&format!("connection failed: {error}")))?;
        let peer = Arc::new(peer);
        let weak = Arc::downgrade(&peer);
        self.cancel.on_cancel(move || {
            if let Some(stream) = weak.upgrade() {
                // Fails if the VMM has closed the connection.
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        let name = format!("QMP server at {}", self.path.display());
        let client = Client::from_stream(stream, &name, self.timeout);
        Ok(Connection {
            client: client.map_err(|error| self.failed(&error))?,
            _stream: peer,
        })
    }

    fn state(&self, vmm: &mut Client) -> Result<RunState, VmError> {
        vmm.query("query-status")
            .map_err(|error| self.failed(&error))
    }

    /// Executes a command, and waits until the guest runs or is paused, as `running` states.
    fn command(&self, vmm: &mut Client, name: &str, running: bool) -> Result<(), VmError> {
        vmm.command(name, json!({}))
            .map_err(|error| self.failed(&error))?;
        let begun = Instant::now();
        loop {
            let state = self.state(vmm)?;
            if state.running == running {
                return Ok(());
            }
            let timeout = match running {
                true => self.resume_timeout(),
                false => self.timeout,
            };
            if begun.elapsed() > timeout {
                let status = state.status;
                return Err(self.error(&format!(
                    "guest is still {status} {timeout:?} after '{name}'"
                )));
            }
            sleep(POLL_INTERVAL);
        }
    }

    fn failed(&self, error: &qmp_client::Error) -> VmError {
        let cause = std::error::Error::source(error);
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        self.error(&format!("{error}{cause}"))
    }

    fn error(&self, what: &str) -> VmError {
        VmError(format!("{}: {what}", self.describe()))
    }
}

impl Vm for QmpVm {
    fn describe(&self) -> String {
        format!("QMP at {}", self.path.display())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let mut vmm = self.connect_until_cancelled()?;
        if !self.state(&mut vmm.client)?.running {
            // Another client has paused the guest and is responsible for resuming it.
            return Ok(());
        }
        self.guard.watch_vmm(&self.path);
        match self.command(&mut vmm.client, "stop", false) {
            Ok(()) => {
                self.paused = true;
                Ok(())
            }
            Err(error) => {
                // The VMM may have received the command. Use a new connection, because this one may be unusable. Close
                // this one first, because the VMM may serve one client at a time.
                drop(vmm);
                let running = self
                    .connect()
                    .and_then(|mut vmm| self.command(&mut vmm, "cont", true));
                Err(match running {
                    Ok(()) => {
                        self.guard.clear();
                        error
                    }
                    Err(other) => {
                        // Dropping the VM tries again, and says that the guest is paused.
                        self.paused = true;
                        VmError(format!("{error}; guest may still be paused: {other}"))
                    }
                })
            }
        }
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if self.paused {
            let resumed = self
                .connect()
                .and_then(|mut vmm| self.command(&mut vmm, "cont", true));
            resumed.map_err(|error| match self.guard.is_armed() {
                true => VmError(format!(
                    "{error}; a guard process tries again for {} s",
                    RESUME_TIMEOUT.as_secs()
                )),
                false => error,
            })?;
            self.paused = false;
            self.guard.clear();
        }
        Ok(())
    }

    fn keep_paused(&mut self) {
        self.guard.dismiss();
    }

    fn paused_guest(&self) -> PausedGuest {
        match self.paused {
            true => PausedGuest::of_vmm(self.path.clone()),
            false => PausedGuest::default(),
        }
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

    /// A limit that only a hanging test exceeds.
    const LONG: Duration = Duration::from_secs(600);

    /// A VMM that changes its run state only after several `query-status`, and that serves one client at a time.
    struct Vmm {
        _folder: tempfile::TempDir,
        path: PathBuf,
        running: Arc<AtomicBool>,
        commands: Arc<Mutex<Vec<String>>>,
    }

    fn vmm(accepts: &'static [&'static str]) -> Vmm {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let running = Arc::new(AtomicBool::new(true));
        let commands = Arc::new(Mutex::new(Vec::new()));
        let (state, journal) = (running.clone(), commands.clone());
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
                        "stop" if accepts.contains(&"silent") => {
                            journal.lock().unwrap().push(name.to_owned());
                            continue;
                        }
                        "stop" | "cont" if accepts.contains(&name) => {
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
            commands,
        }
    }

    #[test]
    fn the_guest_is_paused_when_pause_returns() {
        let vmm = vmm(&["stop", "cont"]);
        let mut vm = QmpVm::with_timeout(&vmm.path, LONG, &CancelToken::default()).unwrap();
        vm.pause().unwrap();
        assert!(!vmm.running.load(Ordering::SeqCst));
        vm.resume().unwrap();
        assert!(vmm.running.load(Ordering::SeqCst));
        vm.resume().unwrap();
        assert_eq!(*vmm.commands.lock().unwrap(), ["stop", "cont"]);
    }

    #[test]
    fn what_somebody_else_has_paused_is_left_so() {
        let vmm = vmm(&["stop", "cont"]);
        let mut vm = QmpVm::with_timeout(&vmm.path, LONG, &CancelToken::default()).unwrap();
        vmm.running.store(false, Ordering::SeqCst);
        vm.pause().unwrap();
        vm.resume().unwrap();
        assert!(vmm.commands.lock().unwrap().is_empty());
        let error = QmpVm::with_timeout(&vmm.path, LONG, &CancelToken::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("guest is not running: paused; resume it"),
            "{error}"
        );
    }

    #[test]
    fn a_refusal_names_the_socket_and_the_guest_is_told_to_go_on() {
        let vmm = vmm(&["cont"]);
        let mut vm = QmpVm::with_timeout(&vmm.path, LONG, &CancelToken::default()).unwrap();
        let error = vm.pause().unwrap_err().to_string();
        let path = vmm.path.display().to_string();
        assert!(
            error.contains(&path) && error.contains("I will not"),
            "{error}"
        );
        assert_eq!(*vmm.commands.lock().unwrap(), ["cont"]);
    }

    #[test]
    fn a_vmm_that_does_not_pause_is_an_error() {
        let vmm = vmm(&[]);
        let mut vm = QmpVm::with_timeout(&vmm.path, LONG, &CancelToken::default()).unwrap();
        let mut client = vm.connect().unwrap();
        // The connection has its own timeout. This one limits the wait for the pause.
        vm.timeout = Duration::from_millis(50);
        let error = vm.command(&mut client, "query-status", false);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("guest is still running 50ms after"),
            "{error}"
        );
        let missing =
            QmpVm::new(&vmm.path.with_extension("none"), &CancelToken::default()).unwrap_err();
        assert!(missing.to_string().contains("vmm.none"), "{missing}");
    }

    /// The kinds of silence: no accepted connection, no greeting, no answer to `stop`.
    #[test]
    fn a_cancelled_migration_does_not_wait_for_a_silent_vmm() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("silent.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let cancel = CancelToken::default();
        thread::scope(|scope| {
            let waits = scope.spawn(|| QmpVm::with_timeout(&path, LONG, &cancel));
            // The connection is in the queue of the listener, which sends no greeting.
            let _accepted = listener.accept().unwrap();
            cancel.cancel();
            waits.join().unwrap().unwrap_err();
        });
        let error = QmpVm::with_timeout(&path, LONG, &cancel).unwrap_err();
        assert!(error.to_string().contains("was cancelled"), "{error}");

        let vmm = vmm(&["silent", "cont"]);
        let cancel = CancelToken::default();
        let mut vm = QmpVm::with_timeout(&vmm.path, LONG, &cancel).unwrap();
        thread::scope(|scope| {
            let waits = scope.spawn(|| vm.pause());
            while !vmm.commands.lock().unwrap().contains(&"stop".to_owned()) {
                thread::yield_now();
            }
            cancel.cancel();
            waits.join().unwrap().unwrap_err();
        });
        // It may have received the command, so it is told to continue.
        assert_eq!(*vmm.commands.lock().unwrap(), ["stop", "cont"]);
    }
}
