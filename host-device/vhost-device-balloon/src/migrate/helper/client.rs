// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The end of the device process: starts a helper process, serves its requests, and shows its progress.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_migration::precopy::{PrecopyError, Progress};
use guest_migration::vm::{PausedGuest, Vm, VmError};
use guest_migration::{CancelToken, HintForwarder, HintSource, PageRun, WaitOutcome};
use qmp_client::{JsonLines, LineError};
use serde_json::Value;
use tracing::warn;

use super::messages::{
    Command, End, FromHelper, MigrationTask, Request, Task, ToHelper, MAX_RUNS, TIMEOUT,
};
use crate::broker::Broker;
use crate::device::migration_claim::ClaimedResources;
use crate::device_lock::DeviceLock;
use crate::migrate::hint_source::{ClaimGuard, DeviceHintSource};
use crate::migrate::job::{EndGuard, OnEnd, PausedVm};
use crate::migrate::parameters::{MigrationCapabilities, MigrationParameters};
use crate::packets::{PacketSocket, MAX_FDS};
use crate::sync::lock;

/// How often new hints are sent to the helper process.
const FORWARD_INTERVAL: Duration = Duration::from_millis(10);

/// A helper process that has no task yet.
pub(crate) struct Helper {
    lines: JsonLines,
    commands: Arc<PacketSocket>,
}

/// How often a cancellation is looked for while a helper process sends nothing.
const CANCEL_INTERVAL: Duration = Duration::from_millis(500);
/// How long a helper process may take to end after a cancellation.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a helper process may take to resume a guest.
const RESUME_TIMEOUT: Duration = Duration::from_secs(60);

impl Helper {
    /// Starts a helper process.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub(crate) fn start(broker: &Broker) -> io::Result<Self> {
        let (near, far) = UnixStream::pair()?;
        let (commands, output) = PacketSocket::pair()?;
        broker.start_helper(&OwnedFd::from(far), &OwnedFd::from(output))?;
        Ok(Self {
            lines: JsonLines::new(near, "migration helper process").with_write_timeout(TIMEOUT),
            commands: Arc::new(commands),
        })
    }

    /// Returns a function that tells a migration that the guest is paused.
    pub(crate) fn continuation(&self) -> Box<dyn Fn() + Send> {
        let commands = self.commands.clone();
        // Fails if the helper process has ended, and the migration with it.
        Box::new(move || drop(commands.try_send(&Command::Continue)))
    }
}

/// Resumes the guest that a completed migration has left paused, in a helper process.
fn resume(broker: &Broker, guest: &PausedGuest) -> Result<(), VmError> {
    let failed = |error: &dyn std::fmt::Display| VmError(error.to_string());
    let mut helper = Helper::start(broker).map_err(|error| failed(&error))?;
    let task = Task::Resume(guest.clone());
    helper.lines.send(&task).map_err(|error| failed(&error))?;
    let answer = helper.lines.receive::<Result<(), String>>(RESUME_TIMEOUT);
    match answer.map_err(|error| failed(&error))? {
        Some(result) => result.map_err(VmError),
        None => Err(VmError(format!(
            "migration helper process did not answer within {RESUME_TIMEOUT:?}"
        ))),
    }
}

/// A guest that a migration in a helper process has left paused.
struct RemoteVm {
    broker: Arc<Broker>,
    describe: String,
    guest: PausedGuest,
}

impl Vm for RemoteVm {
    fn describe(&self) -> String {
        self.describe.clone()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        resume(&self.broker, &self.guest)
    }

    fn paused_guest(&self) -> PausedGuest {
        self.guest.clone()
    }
}

/// What a migration in a helper process was requested with.
pub(crate) struct RemoteConfig {
    pub(crate) uri: String,
    pub(crate) vmm_qmp: Option<PathBuf>,
    pub(crate) parameters: MigrationParameters,
    pub(crate) capabilities: MigrationCapabilities,
}

/// The work of a migration's thread, for a migration in a helper process.
pub(crate) struct RemoteJob {
    pub(crate) helper: Helper,
    pub(crate) broker: Arc<Broker>,
    pub(crate) config: RemoteConfig,
    pub(crate) device: Arc<DeviceLock>,
    pub(crate) claim: ClaimGuard,
    pub(crate) claimed: ClaimedResources,
    pub(crate) progress: Progress,
    pub(crate) cancel: CancelToken,
    pub(crate) vm: PausedVm,
    pub(crate) on_end: OnEnd,
}

impl RemoteJob {
    pub(crate) fn run(self) {
        let Self {
            helper,
            broker,
            config,
            device,
            claim,
            claimed,
            progress,
            cancel,
            vm,
            on_end,
        } = self;
        let _over = EndGuard::new(&progress, &on_end);
        let relay = Relay {
            lines: helper.lines,
            device,
            source: DeviceHintSource::new(claim, claimed.discards, &cancel),
            claimed,
            progress: &progress,
            cancel: &cancel,
            window: None,
            cancelled: None,
        };
        // The claim ends with this call, before the migration does.
        match relay.run(config, &helper.commands) {
            Ok(end) => {
                *lock(&vm) = end.paused.map(|(describe, guest)| -> Box<dyn Vm> {
                    Box::new(RemoteVm {
                        broker,
                        describe,
                        guest,
                    })
                });
                progress.show(end.status);
            }
            Err(error) => {
                let text = format!("migration helper process failed: {error}");
                warn!("migration: {text}");
                progress.fail(&match cancel.is_cancelled() {
                    true => PrecopyError::Cancelled,
                    false => PrecopyError::Sink(text.into()),
                });
            }
        }
    }
}

/// The hint window of the device, while it is open.
struct Window {
    forwarder: HintForwarder,
    /// Whether the helper process knows that the hint round has ended.
    has_ended: bool,
}

/// Why a migration in a helper process cannot continue.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Connection(#[from] LineError),
    #[error("cannot send it the memory files: {0}")]
    Files(#[from] io::Error),
    #[error("it sent an unexpected message")]
    Unexpected,
    #[error("it kept the device from writing for more than {TIMEOUT:?}")]
    Quiesced,
    #[error("it has not ended {CANCEL_TIMEOUT:?} after the migration was cancelled; it is left behind, and resumes the guest")]
    NotCancelled,
}

/// Serves the requests of a helper process.
struct Relay<'a> {
    lines: JsonLines,
    device: Arc<DeviceLock>,
    source: DeviceHintSource,
    claimed: ClaimedResources,
    progress: &'a Progress,
    cancel: &'a CancelToken,
    window: Option<Window>,
    /// When the cancellation was first seen.
    cancelled: Option<Instant>,
}

impl Relay<'_> {
    fn run(
        mut self,
        config: RemoteConfig,
        commands: &Arc<PacketSocket>,
    ) -> Result<End, RelayError> {
        let task = self.task(config);
        self.lines.send(&Task::Migrate(Box::new(task)))?;
        let blocks: Vec<_> = self.claimed.memory.blocks().collect();
        for blocks in blocks.chunks(MAX_FDS) {
            let fds: Vec<BorrowedFd<'_>> = blocks.iter().map(|(_, file)| file.as_fd()).collect();
            commands.send(&Command::Files, &fds)?;
        }
        let canceller = commands.clone();
        // Never waits: it may run under the device's lock. Fails if the helper process has ended.
        self.cancel
            .on_cancel(move || drop(canceller.try_send(&Command::Cancel)));
        loop {
            match self.next()? {
                FromHelper::NeedDiscard(need) => lock(&self.device).set_hints_need_discard(need),
                FromHelper::Request(request) => self.handle(request)?,
                FromHelper::End(end) => return Ok(*end),
                other => self.show(other)?,
            }
        }
    }

    fn task(&self, config: RemoteConfig) -> MigrationTask {
        let parameters = match serde_json::to_value(&config.parameters) {
            Ok(Value::Object(parameters)) => parameters,
            // A structure always becomes an object.
            _ => serde_json::Map::new(),
        };
        let capabilities = config.capabilities.all().into_iter();
        MigrationTask {
            layout: (&**self.claimed.memory.layout()).into(),
            uri: config.uri,
            vmm_qmp: config.vmm_qmp,
            parameters,
            capabilities: capabilities
                .map(|(name, state)| (name.into(), state))
                .collect(),
            discards: self.claimed.discards,
            hints_unavailable: self
                .claimed
                .hint_availability
                .as_ref()
                .err()
                .map(ToString::to_string),
        }
    }

    /// Waits for the next message. Meanwhile sends hints, and the end of the hint round.
    fn next(&mut self) -> Result<FromHelper, RelayError> {
        loop {
            let timeout = match &self.window {
                Some(window) if !window.has_ended => {
                    let outcome = self.source.wait(FORWARD_INTERVAL, self.cancel);
                    self.forward_hints()?;
                    if outcome != WaitOutcome::TimedOut {
                        self.lines.send(&ToHelper::from(outcome))?;
                        self.window.iter_mut().for_each(|it| it.has_ended = true);
                    }
                    Duration::from_millis(1)
                }
                _ => CANCEL_INTERVAL,
            };
            if let Some(message) = self.lines.receive(timeout)? {
                return Ok(message);
            }
            self.check_cancelled()?;
        }
    }

    /// Fails if the helper process has not ended long after the migration was cancelled.
    fn check_cancelled(&mut self) -> Result<(), RelayError> {
        if !self.cancel.is_cancelled() {
            return Ok(());
        }
        let since = self.cancelled.get_or_insert_with(Instant::now);
        match since.elapsed() >= CANCEL_TIMEOUT {
            true => Err(RelayError::NotCancelled),
            false => Ok(()),
        }
    }

    /// Sends the hints that were not sent before.
    fn forward_hints(&mut self) -> Result<(), LineError> {
        let Some(window) = &mut self.window else {
            return Ok(());
        };
        let mut runs = Runs::new(&mut self.lines, ToHelper::Hints);
        window.forwarder.forward(|run| runs.push(run))?;
        runs.finish()
    }

    fn handle(&mut self, request: Request) -> Result<(), RelayError> {
        let answer = match request {
            Request::Open => self.open(),
            Request::Close => {
                // No hint is accepted any longer. Those before are sent before the answer.
                let closed = self.source.close();
                self.forward_hints()?;
                self.window = None;
                closed.map(drop).map_err(|error| error.to_string())
            }
            Request::Done => {
                self.source.done();
                self.window = None;
                Ok(())
            }
            Request::Quiesce => self.quiesce()?,
            Request::Release => return Err(RelayError::Unexpected),
        };
        Ok(self.lines.send(&ToHelper::Answer(answer))?)
    }

    fn open(&mut self) -> Result<(), String> {
        let layout = self.claimed.memory.layout();
        let (window, forwarder) = HintForwarder::new(layout).map_err(|error| error.to_string())?;
        let opened = self.source.open(window);
        opened.map_err(|(_, error)| error.to_string())?;
        self.window = Some(Window {
            forwarder,
            has_ended: false,
        });
        Ok(())
    }

    /// Holds the device's lock until the helper process releases it. Sends the punched pages first: no further page is
    /// punched under the lock.
    fn quiesce(&mut self) -> Result<Result<(), String>, RelayError> {
        let device = self.device.clone();
        let _held = lock(&device);
        let mut runs = Runs::new(&mut self.lines, ToHelper::Punched);
        for run in self.claimed.punched.drain() {
            runs.push(run)?;
        }
        runs.finish()?;
        self.lines.send(&ToHelper::Answer(Ok(())))?;
        let begun = Instant::now();
        loop {
            match self.lines.receive(CANCEL_INTERVAL)? {
                Some(FromHelper::Request(Request::Release)) => return Ok(Ok(())),
                Some(other) => self.show(other)?,
                // The connection ends, and the migration with it: from now on the device may write.
                None if begun.elapsed() >= TIMEOUT => return Err(RelayError::Quiesced),
                None => self.check_cancelled()?,
            }
        }
    }

    fn show(&self, message: FromHelper) -> Result<(), RelayError> {
        match message {
            // The end of the migration has a message of its own.
            FromHelper::Status(status) if !status.status.is_over() => self.progress.show(*status),
            FromHelper::Pass(pass) => self.progress.show_pass(pass),
            _ => return Err(RelayError::Unexpected),
        }
        Ok(())
    }
}

/// Sends runs of pages, many in a message.
struct Runs<'a, M: Fn(Vec<super::messages::Run>) -> ToHelper> {
    lines: &'a mut JsonLines,
    message: M,
    runs: Vec<super::messages::Run>,
}

impl<'a, M: Fn(Vec<super::messages::Run>) -> ToHelper> Runs<'a, M> {
    fn new(lines: &'a mut JsonLines, message: M) -> Self {
        Self {
            lines,
            message,
            runs: Vec::new(),
        }
    }

    fn push(&mut self, run: PageRun) -> Result<(), LineError> {
        self.runs.push(run.into());
        match self.runs.len() {
            MAX_RUNS.. => self.send(),
            _ => Ok(()),
        }
    }

    fn send(&mut self) -> Result<(), LineError> {
        let runs = std::mem::take(&mut self.runs);
        self.lines.send(&(self.message)(runs))
    }

    fn finish(mut self) -> Result<(), LineError> {
        match self.runs.is_empty() {
            true => Ok(()),
            false => self.send(),
        }
    }
}
