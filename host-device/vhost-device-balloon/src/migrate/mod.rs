// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations of the guest whose balloon this is: one at a time, in a thread of its own.
//!
//! The rounds are those of [`guest_migration::precopy`]. Here is what they need of this program: the guest's memory and its
//! hints ([`hint_source`]), what operators have set ([`parameters`]), and the choice of everything else ([`setup`]).
//!
//! Locks are taken in the order migrations, device, progress. The device tells of trouble under its own lock, and may
//! only touch what comes after it.

pub mod hint_source;
pub mod parameters;
mod setup;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest_migration::precopy::{Precopy, PrecopyError, Progress, ProgressEvent};
use guest_migration::status::{MigrationInfo, MigrationStatus};
use guest_migration::stream::{Address, AddressError};
use guest_migration::vm::{Vm, VmError};
use guest_migration::CancelToken;
use serde_json::json;
use thiserror::Error;
use tracing::{info, warn};

use crate::device::migration_claim::{ClaimError, Invalidated};
use crate::device::Device;
use crate::events::Events;
use crate::lock;
use hint_source::ClaimGuard;
use parameters::{MigrationCapabilities, MigrationParameters};

/// How long the end of the program waits for a driver to hear that it gets its pages back.
const CMD_ID_READ_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a migration was not begun, or not told what it was to be told.
#[derive(Debug, Error)]
pub enum MigrateError {
    /// One is under way.
    #[error("a migration is under way ({}): one at a time; wait for its end, or give it up with migrate-cancel", .0.name())]
    InProgress(MigrationStatus),
    /// There is no such place.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// See [`ClaimError`].
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// What was set does not go together.
    #[error(transparent)]
    Refused(PrecopyError),
    /// The host refuses a thread.
    #[error("the migration cannot be started: {0}")]
    Thread(std::io::Error),
    /// `migrate-continue` for a state in which nothing waits.
    #[error("a migration waits to be continued in the state pre-switchover only, not in '{0}'")]
    NotAWaitState(String),
    /// The guest's processes are stopped since the last one.
    #[error("the guest is at the destination of the last migration, and its processes are stopped here: let it go on with 'cont' first, if it is to be migrated once more")]
    Paused,
    /// `cont` with nothing to let go on.
    #[error("no migration from here has left the guest paused")]
    NotPaused,
    /// The guest does not go on.
    #[error("the guest does not go on: {0}")]
    Vm(#[from] VmError),
    /// `migrate-continue` while nothing waits.
    #[error("no migration waits in the state pre-switchover: its state is {}", .0.name())]
    NotWaiting(MigrationStatus),
}

/// Where to, and who pauses the guest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MigrateRequest {
    /// The address of the destination, as QEMU writes it.
    pub uri: String,
    /// The VMM's QMP socket. Without it the processes that map guest memory are stopped.
    pub vmm_qmp: Option<PathBuf>,
}

/// The migrations of a device.
pub struct MigrationManager {
    device: Arc<Mutex<Device>>,
    events: Arc<Events>,
    /// Called after the end of each.
    on_end: Arc<dyn Fn() + Send + Sync>,
    state: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    parameters: MigrationParameters,
    capabilities: MigrationCapabilities,
    /// The one that is under way, or was the last.
    current: Option<CurrentMigration>,
}

/// A migration.
struct CurrentMigration {
    progress: Progress,
    cancel: CancelToken,
    failure: FailureReason,
    thread: Option<JoinHandle<()>>,
    vm: PausedVm,
    /// Whether the guest is paused by its VMM's own command, and not by stopping processes.
    by_vmm: bool,
}

/// The machine that a completed migration has left paused.
type PausedVm = Arc<Mutex<Option<Box<dyn Vm>>>>;

/// Why a migration was ended from here, if it was. What looks cancelled has failed then.
type FailureReason = Arc<OnceLock<String>>;

impl CurrentMigration {
    fn status(&self) -> MigrationInfo {
        effective_status(self.progress.status(), &self.failure)
    }

    fn is_over(&self) -> bool {
        self.progress.status().status.is_over()
    }
}

impl MigrationManager {
    /// None yet. `on_end` is called after the end of each, in its thread.
    pub fn new(
        device: Arc<Mutex<Device>>,
        events: Arc<Events>,
        on_end: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            device,
            events,
            on_end: Arc::new(on_end),
            state: Mutex::default(),
        }
    }

    /// How the next migration is to go.
    pub fn parameters(&self) -> MigrationParameters {
        lock(&self.state).parameters.clone()
    }

    /// How the next migration is to go.
    pub fn capabilities(&self) -> MigrationCapabilities {
        lock(&self.state).capabilities
    }

    /// Changes how the next migration is to go. One that is under way goes on as it began.
    pub fn set<T>(
        &self,
        change: impl FnOnce(&mut MigrationParameters, &mut MigrationCapabilities) -> T,
    ) -> T {
        let mut state = lock(&self.state);
        let Shared {
            parameters,
            capabilities,
            ..
        } = &mut *state;
        change(parameters, capabilities)
    }

    /// Begins a migration, which goes on by itself. What can be known to be wrong is an error at once; the rest shows in
    /// the status.
    ///
    /// # Errors
    ///
    /// If one is under way, if what was asked for does not go together, or if there is nothing that can be migrated.
    pub fn start(&self, request: MigrateRequest) -> Result<(), MigrateError> {
        let mut state = lock(&self.state);
        if let Some(current) = &mut state.current {
            if !current.is_over() {
                return Err(MigrateError::InProgress(current.status().status));
            }
            // It has nothing left to wait for.
            current.thread.take().map(JoinHandle::join);
            // Stopped processes would go on if their machine was dropped. A VMM may have been told by others to go on,
            // and says by itself if it was not.
            if !current.by_vmm && lock(&current.vm).is_some() {
                return Err(MigrateError::Paused);
            }
        }
        let by_vmm = request.vmm_qmp.is_some();
        let address: Address = request.uri.parse()?;
        if state.capabilities.postcopy_ram {
            return Err(MigrateError::Refused(
                match state.parameters.free_page_hint {
                    true => PrecopyError::PostcopyWithHints,
                    false => PrecopyError::Postcopy,
                },
            ));
        }
        let (cancel, failure) = (CancelToken::default(), FailureReason::default());
        let vm = PausedVm::default();
        let progress = self.progress(&failure);
        let on_invalidated = on_invalidated(progress.clone(), cancel.clone(), failure.clone());
        let (claim, claimed) = ClaimGuard::new(&self.device, on_invalidated)?;
        info!("migration to {address}");
        let job = Job {
            config: setup::MigrationConfig {
                address,
                vmm_qmp: request.vmm_qmp,
                parameters: state.parameters.clone(),
                capabilities: state.capabilities,
            },
            claimed_device: setup::ClaimedDevice {
                claim,
                claimed,
                device: self.device.clone(),
            },
            progress: progress.clone(),
            cancel: cancel.clone(),
            vm: vm.clone(),
            on_end: self.on_end.clone(),
        };
        self.emit(MigrationStatus::Setup);
        let thread = thread::Builder::new()
            .name("migration".into())
            .spawn(move || job.run())
            .map_err(MigrateError::Thread)?;
        state.current = Some(CurrentMigration {
            progress,
            cancel,
            failure,
            vm,
            by_vmm,
            thread: Some(thread),
        });
        Ok(())
    }

    /// What tells operators how it goes.
    fn progress(&self, failure: &FailureReason) -> Progress {
        let (events, failure) = (self.events.clone(), failure.clone());
        Progress::new(move |event| match event {
            ProgressEvent::State(state) => {
                let status = MigrationInfo {
                    status: state,
                    ..MigrationInfo::default()
                };
                emit(&events, effective_status(status, &failure).status);
            }
            ProgressEvent::Pass(pass) => events.emit("MIGRATION_PASS", json!({ "pass": pass })),
        })
    }

    fn emit(&self, state: MigrationStatus) {
        emit(&self.events, state);
    }

    /// Gives up the migration that is under way, if one is. The guest runs on, and has its pages back.
    pub fn cancel(&self) {
        let active = match &lock(&self.state).current {
            Some(current) if !current.is_over() => {
                Some((current.progress.clone(), current.cancel.clone()))
            }
            _ => None,
        };
        if let Some((progress, cancel)) = active {
            progress.set_cancelling();
            cancel.cancel();
        }
    }

    /// Tells the migration that waits in the state named `waits_in` that the guest is paused.
    ///
    /// # Errors
    ///
    /// If none waits there.
    pub fn continue_migration(&self, waits_in: &str) -> Result<(), MigrateError> {
        if waits_in != MigrationStatus::PreSwitchover.name() {
            let name = waits_in.chars().take(64).collect();
            return Err(MigrateError::NotAWaitState(name));
        }
        let state = lock(&self.state);
        match &state.current {
            Some(current) if current.progress.continue_migration() => Ok(()),
            current => Err(MigrateError::NotWaiting(
                current
                    .as_ref()
                    .map_or(MigrationStatus::None, |it| it.status().status),
            )),
        }
    }

    /// Lets the guest go on that a completed migration has left paused: what the destination has is old then.
    ///
    /// # Errors
    ///
    /// If none has, or the guest does not go on.
    pub fn resume(&self) -> Result<(), MigrateError> {
        let paused_vm = lock(&self.state).current.as_mut().map(|current| {
            if current.is_over() {
                // It may be about to hand the machine over.
                current.thread.take().map(JoinHandle::join);
            }
            current.vm.clone()
        });
        // Not under the lock of everything: it takes as long as the VMM takes to answer.
        let paused_vm = paused_vm.ok_or(MigrateError::NotPaused)?;
        let mut vm = lock(&paused_vm);
        vm.as_mut().ok_or(MigrateError::NotPaused)?.resume()?;
        *vm = None;
        Ok(())
    }

    /// How the migration stands that is under way, or how the last one ended.
    pub fn status(&self) -> MigrationInfo {
        let state = lock(&self.state);
        state
            .current
            .as_ref()
            .map_or_else(MigrationInfo::default, CurrentMigration::status)
    }

    /// Whether a migration is under way.
    pub fn is_in_progress(&self) -> bool {
        let state = lock(&self.state);
        state.current.as_ref().is_some_and(|it| !it.is_over())
    }

    /// Gives up the migration that is under way, and waits until it has: the guest runs then, and has been told to take
    /// its pages back.
    pub fn shut_down(&self) {
        let given_up = self.is_in_progress();
        self.cancel();
        let thread = lock(&self.state)
            .current
            .as_mut()
            .and_then(|current| current.thread.take());
        thread.map(JoinHandle::join);
        if given_up {
            self.wait_for_cmd_id_read();
        }
        let paused_vm = lock(&self.state)
            .current
            .as_ref()
            .map(|current| current.vm.clone());
        // A guest that is at the destination must not go on here as well, and dropping its machine might let it.
        if let Some(vm) = paused_vm.and_then(|paused_vm| lock(&paused_vm).take()) {
            info!(
                "the guest was migrated, and is left as it is ({})",
                vm.describe()
            );
            std::mem::forget(vm);
        }
    }
}

impl MigrationManager {
    /// Waits until the driver has read what it was told last, for a moment at most: with the connection goes the
    /// configuration space that it reads it from.
    fn wait_for_cmd_id_read(&self) {
        let deadline = Instant::now() + CMD_ID_READ_TIMEOUT;
        let hinting_events = lock(&self.device).hinting_events();
        loop {
            let seen = hinting_events.generation();
            if lock(&self.device).is_cmd_id_read() {
                break;
            }
            if !hinting_events.wait(seen, Some(deadline)) {
                info!("the guest's driver has not looked in time whether it gets its pages back");
                return;
            }
        }
        // What it has read is still on its way through the connection.
        thread::sleep(Duration::from_millis(10));
    }
}

/// What a thread does for a migration.
struct Job {
    config: setup::MigrationConfig,
    claimed_device: setup::ClaimedDevice,
    progress: Progress,
    cancel: CancelToken,
    vm: PausedVm,
    on_end: Arc<dyn Fn() + Send + Sync>,
}

impl Job {
    fn run(self) {
        let Self {
            config,
            claimed_device,
            progress,
            cancel,
            vm: paused_vm,
            on_end,
        } = self;
        // Also after a panic, which has given everything back on its way.
        let _over = OnDrop(|| {
            if !progress.status().status.is_over() {
                let text = "the thread of the migration has panicked";
                progress.fail(&PrecopyError::Sink(text.into()));
            }
            on_end();
        });
        let parameters = config.parameters.to_precopy(config.capabilities);
        match config.prepare(claimed_device, &progress, &cancel) {
            Ok((parts, stream_config)) => {
                let connect = stream_config.connector(&cancel);
                match Precopy::run(parameters, parts, connect, &progress, &cancel) {
                    // It stays paused: the guest is at the destination now.
                    Ok(vm) => {
                        *lock(&paused_vm) = vm;
                        info!("migration: completed");
                    }
                    Err(error) => warn!("migration: {error}"),
                }
            }
            Err(error) => {
                warn!("migration: {error}");
                progress.fail(&match cancel.is_cancelled() {
                    true => PrecopyError::Cancelled,
                    false => error,
                });
            }
        }
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn emit(events: &Events, state: MigrationStatus) {
    events.emit("MIGRATION", json!({ "status": state.name() }));
}

/// A status as operators see it: what was ended for a reason has failed, though its rounds only know that it was ended.
fn effective_status(mut status: MigrationInfo, failure: &FailureReason) -> MigrationInfo {
    if let Some(why) = failure.get() {
        match status.status {
            MigrationStatus::Cancelled => {
                status.status = MigrationStatus::Failed;
                status.error_desc = Some(why.clone());
            }
            MigrationStatus::Cancelling => status.error_desc = Some(why.clone()),
            _ => {}
        }
    }
    status
}

/// What the device tells, and what becomes of the migration then.
fn on_invalidated(
    progress: Progress,
    cancel: CancelToken,
    failure: FailureReason,
) -> Box<dyn Fn(Invalidated) + Send> {
    Box::new(move |invalidated| {
        let state = progress.status().status;
        let why = match invalidated {
            // The balloon is unplugged then; the memory files are still here.
            Invalidated::FrontEndDisconnected(why)
                if matches!(
                    state,
                    MigrationStatus::PreSwitchover | MigrationStatus::Device
                ) =>
            {
                info!("{why}; the migration goes on ({})", state.name());
                return;
            }
            Invalidated::FrontEndDisconnected(why) => {
                format!("the migration has lost its guest: {why}")
            }
            Invalidated::MemoryChanged(why) => format!("the guest's memory has changed: {why}"),
        };
        if !state.is_over() {
            // The first reason counts.
            let _ = failure.set(why);
            cancel.cancel();
        }
    })
}
