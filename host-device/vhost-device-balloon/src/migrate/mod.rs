// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations of the guest: one at a time.
//!
//! [`guest_migration::precopy`] runs the iterations. This module provides guest memory and its hints
//! ([`hint_source`]), the parameters that QMP clients set ([`parameters`]), and the choice of tracker,
//! VM and stream (`setup`).
//!
//! This file contains the manager. `job` is the work of a migration's thread. A daemon runs its migrations in a process of
//! their own, see [`helper`]. `device_access` is what a migration gets of the device. `failure` is why this program ended a
//! migration.
//!
//! Locks are taken in the order manager, device, progress. The device reports an invalidated claim under its own lock,
//! so the callback takes only locks after that one.

mod device_access;
mod failure;
pub mod helper;
pub mod hint_source;
mod job;
pub mod parameters;
mod setup;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest_migration::precopy::{PrecopyError, Progress, ProgressEvent};
use guest_migration::status::{MigrationInfo, MigrationStatus};
use guest_migration::stream::{Address, AddressError};
use guest_migration::vm::VmError;
use guest_migration::CancelToken;
use serde_json::{json, Map, Value};
use thiserror::Error;
use tracing::{info, warn};

use crate::broker::Broker;
use crate::device::migration_claim::ClaimError;
use crate::device_lock::DeviceLock;
use crate::events::Events;
use crate::sync::lock;
use device_access::DeviceAccess;
use failure::{effective_status, on_invalidated, FailureReason};
use helper::client::{Helper, RemoteConfig, RemoteJob};
use hint_source::ClaimGuard;
use job::{Job, OnEnd, PausedVm};
use parameters::{MigrationCapabilities, MigrationParameters, ParameterError};
use setup::MigrationConfig;

/// How long the program waits at its end for a migration in a helper process.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval between two checks whether it has ended.
const END_INTERVAL: Duration = Duration::from_millis(5);

/// How long the program waits at its end for the driver to read that it may free its hinted blocks.
const CMD_ID_READ_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a migration command fails.
#[derive(Debug, Error)]
pub enum MigrateError {
    /// A migration is in progress.
    #[error("a migration is in progress ({}): wait for its end, or cancel it with migrate-cancel", .0.name())]
    InProgress(MigrationStatus),
    /// The address of the destination is invalid.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A parameter or capability of this migration is invalid.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// See [`ClaimError`].
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The parameters and capabilities contradict each other.
    #[error(transparent)]
    Refused(PrecopyError),
    /// The host cannot start a thread.
    #[error("migration thread cannot be started: {0}")]
    Thread(std::io::Error),
    /// The broker process cannot start a helper process.
    #[error("migration helper process cannot be started: {0}")]
    Helper(std::io::Error),
    /// `migrate-continue` names a state in which no migration waits.
    #[error("migrate-continue expects the state 'pre-switchover', not '{0}'")]
    NotAWaitState(String),
    /// The last migration left the guest's processes stopped.
    #[error("the last migration has completed, and the guest's processes are stopped: resume them with 'cont' before the next migration")]
    Paused,
    /// `cont` while no migration has left the guest paused.
    #[error("no migration has left the guest paused")]
    NotPaused,
    /// The guest cannot be resumed.
    #[error("guest cannot be resumed: {0}")]
    Vm(#[from] VmError),
    /// `migrate-continue` while no migration waits.
    #[error("no migration waits in the state pre-switchover; the migration state is {}", .0.name())]
    NotWaiting(MigrationStatus),
}

/// Arguments of `migrate`: the destination, how to pause the guest, and what differs from the parameters and
/// capabilities that QMP clients have set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MigrateRequest {
    /// Address of the destination, as QEMU writes it.
    pub uri: String,
    /// The VMM's QMP socket. Without it, the processes that map guest memory are stopped.
    pub vmm_qmp: Option<PathBuf>,
    /// Parameters of this migration only.
    pub parameters: Map<String, Value>,
    /// Capabilities of this migration only.
    pub capabilities: Vec<(String, bool)>,
}

/// Starts and controls the migrations of a device.
pub struct MigrationManager {
    device: Arc<DeviceLock>,
    events: Arc<Events>,
    /// Called at the end of each migration.
    on_end: OnEnd,
    /// Starts a helper process for each migration. Without it, migrations run in this process.
    broker: Option<Arc<Broker>>,
    state: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    parameters: MigrationParameters,
    capabilities: MigrationCapabilities,
    /// The migration in progress, or the last one.
    current: Option<CurrentMigration>,
}

/// A migration that is in progress or has ended.
struct CurrentMigration {
    progress: Progress,
    cancel: CancelToken,
    failure: FailureReason,
    /// Tells the helper process that the guest is paused, if there is one.
    tell_continued: Option<Box<dyn Fn() + Send>>,
    thread: Option<JoinHandle<()>>,
    vm: PausedVm,
    /// Whether the VMM pauses the guest through QMP. Otherwise the guest's processes are stopped.
    by_vmm: bool,
}

impl CurrentMigration {
    fn status(&self) -> MigrationInfo {
        effective_status(self.progress.status(), &self.failure)
    }

    fn is_over(&self) -> bool {
        self.progress.status().status.is_over()
    }
}

impl MigrationManager {
    /// Creates a manager without migrations. `on_end` is called at the end of each migration, in its thread.
    pub fn new(
        device: Arc<DeviceLock>,
        events: Arc<Events>,
        on_end: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            device,
            events,
            on_end: Arc::new(on_end),
            broker: None,
            state: Mutex::default(),
        }
    }

    /// Lets `broker` start a process of its own for each migration.
    #[must_use]
    pub fn with_broker(mut self, broker: Option<Arc<Broker>>) -> Self {
        self.broker = broker;
        self
    }

    /// Returns the parameters of the next migration.
    pub fn parameters(&self) -> MigrationParameters {
        lock(&self.state).parameters.clone()
    }

    /// Returns the capabilities of the next migration.
    pub fn capabilities(&self) -> MigrationCapabilities {
        lock(&self.state).capabilities
    }

    /// Changes the parameters and capabilities of the next migrations. A migration in progress keeps its own.
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

    /// Starts a migration in a thread, and a process, of its own. Returns the errors that are known at once. Later errors
    /// are in the status.
    ///
    /// # Errors
    ///
    /// If a migration is in progress, if the last one left the guest's processes stopped, if the arguments, parameters
    /// or capabilities are invalid, or if guest memory cannot be migrated.
    pub fn start(&self, request: MigrateRequest) -> Result<(), MigrateError> {
        let mut state = lock(&self.state);
        if let Some(current) = &mut state.current {
            if !current.is_over() {
                return Err(MigrateError::InProgress(current.status().status));
            }
            // The migration is over, so this wait is short.
            current.thread.take().map(JoinHandle::join);
            // Dropping the VM of stopped processes would resume them. A VMM is different: another QMP client may have
            // resumed the guest, and if none has, the new migration fails with the VMM's answer.
            if !current.by_vmm && lock(&current.vm).is_some() {
                return Err(MigrateError::Paused);
            }
        }
        let by_vmm = request.vmm_qmp.is_some();
        let address: Address = request.uri.parse()?;
        let (mut parameters, mut capabilities) = (state.parameters.clone(), state.capabilities);
        parameters.set(&request.parameters)?;
        let states = request.capabilities.iter();
        capabilities.set(states.map(|(name, state)| (name.as_str(), *state)))?;
        if capabilities.postcopy_ram {
            return Err(MigrateError::Refused(match parameters.free_page_hint {
                true => PrecopyError::PostcopyWithHints,
                false => PrecopyError::Postcopy,
            }));
        }
        let (cancel, failure) = (CancelToken::default(), FailureReason::default());
        let vm = PausedVm::default();
        let progress = self.progress(&failure);
        let on_invalidated = on_invalidated(progress.clone(), cancel.clone(), failure.clone());
        let (claim, claimed) = ClaimGuard::new(&self.device, on_invalidated)?;
        let helper = self.broker.as_ref().map(|broker| {
            let helper = Helper::start(broker).map_err(MigrateError::Helper)?;
            Ok::<_, MigrateError>((helper, broker.clone()))
        });
        let helper = helper.transpose()?;
        info!("migration: starting, destination {address}");
        let tell_continued = helper.as_ref().map(|(helper, _)| helper.continuation());
        let (device, on_end) = (self.device.clone(), self.on_end.clone());
        let (shown, cancelled, paused_vm) = (progress.clone(), cancel.clone(), vm.clone());
        let work: Box<dyn FnOnce() + Send> = match helper {
            Some((helper, broker)) => {
                let job = RemoteJob {
                    helper,
                    broker,
                    config: RemoteConfig {
                        uri: request.uri,
                        vmm_qmp: request.vmm_qmp,
                        parameters,
                        capabilities,
                    },
                    device,
                    claim,
                    claimed,
                    progress: shown,
                    cancel: cancelled,
                    vm: paused_vm,
                    on_end,
                };
                Box::new(move || job.run())
            }
            None => {
                let job = Job {
                    config: MigrationConfig {
                        address,
                        vmm_qmp: request.vmm_qmp,
                        parameters,
                        capabilities,
                    },
                    access: DeviceAccess::local(&device, claim, claimed, &cancel),
                    progress: shown,
                    cancel: cancelled,
                    vm: paused_vm,
                    on_end,
                };
                Box::new(move || job.run())
            }
        };
        self.emit(MigrationStatus::Setup);
        let thread = thread::Builder::new()
            .name("migration".into())
            .spawn(work)
            .map_err(MigrateError::Thread)?;
        state.current = Some(CurrentMigration {
            progress,
            cancel,
            failure,
            tell_continued,
            vm,
            by_vmm,
            thread: Some(thread),
        });
        Ok(())
    }

    /// Creates the progress of a migration. It emits events for QMP clients.
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

    /// Cancels the migration in progress, if there is one. The guest keeps running and gets its hinted blocks back.
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
    /// If no migration waits in that state.
    pub fn continue_migration(&self, waits_in: &str) -> Result<(), MigrateError> {
        if waits_in != MigrationStatus::PreSwitchover.name() {
            let name = waits_in.chars().take(64).collect();
            return Err(MigrateError::NotAWaitState(name));
        }
        let state = lock(&self.state);
        match &state.current {
            Some(current) if current.progress.continue_migration() => {
                if let Some(tell_continued) = &current.tell_continued {
                    tell_continued();
                }
                Ok(())
            }
            current => Err(MigrateError::NotWaiting(
                current
                    .as_ref()
                    .map_or(MigrationStatus::None, |it| it.status().status),
            )),
        }
    }

    /// Resumes the guest that a completed migration has left paused. The memory at the destination is outdated then.
    ///
    /// # Errors
    ///
    /// If no migration has left the guest paused, or the guest cannot be resumed.
    pub fn resume(&self) -> Result<(), MigrateError> {
        let paused_vm = lock(&self.state).current.as_mut().map(|current| {
            if current.is_over() {
                // The thread may not have stored the VM yet.
                current.thread.take().map(JoinHandle::join);
            }
            current.vm.clone()
        });
        // Under no lock, which the end of the program needs: resuming takes as long as the VMM takes to answer.
        let paused_vm = paused_vm.ok_or(MigrateError::NotPaused)?;
        let mut vm = lock(&paused_vm).take().ok_or(MigrateError::NotPaused)?;
        vm.resume().map_err(|error| {
            *lock(&paused_vm) = Some(vm);
            error.into()
        })
    }

    /// Returns the status of the migration in progress, or of the last one.
    pub fn status(&self) -> MigrationInfo {
        let state = lock(&self.state);
        state
            .current
            .as_ref()
            .map_or_else(MigrationInfo::default, CurrentMigration::status)
    }

    /// Returns whether a migration is in progress.
    pub fn is_in_progress(&self) -> bool {
        let state = lock(&self.state);
        state.current.as_ref().is_some_and(|it| !it.is_over())
    }

    /// Cancels the migration in progress, and waits for its end. Unless it completed, the guest runs then and has been
    /// notified that it may free its hinted blocks. A helper process that waits for its VMM is left behind: it resumes the
    /// guest without this program.
    pub fn shut_down(&self) {
        let given_up = self.is_in_progress();
        self.cancel();
        let thread = lock(&self.state)
            .current
            .as_mut()
            .and_then(|current| current.thread.take());
        if let Some(thread) = thread {
            let deadline = self.broker.as_ref().map(|_| Instant::now() + END_TIMEOUT);
            while !thread.is_finished() {
                if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                    warn!(
                        "migration does not end: its helper process remains, and resumes the guest"
                    );
                    return;
                }
                thread::sleep(END_INTERVAL);
            }
            let _ = thread.join();
        }
        if given_up {
            self.wait_for_cmd_id_read();
        }
        let paused_vm = lock(&self.state)
            .current
            .as_ref()
            .map(|current| current.vm.clone());
        // The guest is at the destination and must not run here as well. Dropping the VM might resume it.
        if let Some(vm) = paused_vm.and_then(|paused_vm| lock(&paused_vm).take()) {
            info!(
                "guest was migrated and is not resumed here ({})",
                vm.describe()
            );
            std::mem::forget(vm);
        }
    }

    /// Waits until the driver has read the last command id, for at most [`CMD_ID_READ_TIMEOUT`]. The driver cannot
    /// read configuration space after the connection is closed.
    fn wait_for_cmd_id_read(&self) {
        let deadline = Instant::now() + CMD_ID_READ_TIMEOUT;
        let hinting_events = lock(&self.device).hinting_events();
        loop {
            let seen = hinting_events.generation();
            if lock(&self.device).is_cmd_id_read() {
                break;
            }
            if !hinting_events.wait(seen, Some(deadline)) {
                info!("driver did not read the command id in time; it may still keep its hinted blocks");
                return;
            }
        }
        // The answer to the driver's read is still on its way through the connection.
        thread::sleep(Duration::from_millis(10));
    }
}

fn emit(events: &Events, state: MigrationStatus) {
    events.emit("MIGRATION", json!({ "status": state.name() }));
}
