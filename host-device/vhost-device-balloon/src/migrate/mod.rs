// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations of the guest whose balloon this is: one at a time, in a thread of its own.
//!
//! The rounds are those of [`migration::precopy`]. Here is what they need of this program: the guest's memory and its
//! hints ([`hints`]), what operators have set ([`parameters`]), and the choice of everything else ([`parts`]).
//!
//! Locks are taken in the order migrations, device, progress. The device tells of trouble under its own lock, and may
//! only touch what comes after it.

pub mod hints;
pub mod parameters;
mod parts;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::machine::{Machine, MachineError};
use migration::precopy::{Notice, Precopy, PrecopyError, Progress};
use migration::status::{State, Status};
use migration::stream::{Address, AddressError};
use migration::Cancel;
use serde_json::json;
use thiserror::Error;
use tracing::{info, warn};

use crate::device::lending::{ClaimError, Trouble};
use crate::device::Device;
use crate::events::Events;
use crate::lock;
use hints::Claim;
use parameters::{Capabilities, Parameters};

/// How long the end of the program waits for a driver to hear that it gets its pages back.
const HEARING: Duration = Duration::from_millis(500);

/// Why a migration was not begun, or not told what it was to be told.
#[derive(Debug, Error)]
pub enum MigrateError {
    /// One is under way.
    #[error("a migration is under way ({}): one at a time; wait for its end, or give it up with migrate-cancel", .0.name())]
    UnderWay(State),
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
    NoSuchWait(String),
    /// The guest's processes are stopped since the last one.
    #[error("the guest is at the destination of the last migration, and its processes are stopped here: let it go on with 'cont' first, if it is to be migrated once more")]
    Paused,
    /// `cont` with nothing to let go on.
    #[error("no migration from here has left the guest paused")]
    NotPaused,
    /// The guest does not go on.
    #[error("the guest does not go on: {0}")]
    Machine(#[from] MachineError),
    /// `migrate-continue` while nothing waits.
    #[error("no migration waits in the state pre-switchover: its state is {}", .0.name())]
    DoesNotWait(State),
}

/// Where to, and who pauses the guest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Request {
    /// The address of the destination, as QEMU writes it.
    pub uri: String,
    /// The VMM's QMP socket. Without it the processes that map guest memory are stopped.
    pub vmm_qmp: Option<PathBuf>,
}

/// The migrations of a device.
pub struct Migrations {
    device: Arc<Mutex<Device>>,
    events: Arc<Events>,
    /// Called after the end of each.
    when_over: Arc<dyn Fn() + Send + Sync>,
    state: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    parameters: Parameters,
    capabilities: Capabilities,
    /// The one that is under way, or was the last.
    current: Option<Current>,
}

/// A migration.
struct Current {
    progress: Progress,
    cancel: Cancel,
    failure: Failure,
    thread: Option<JoinHandle<()>>,
    machine: Kept,
    /// Whether the guest is paused by its VMM's own command, and not by stopping processes.
    by_vmm: bool,
}

/// The machine that a completed migration has left paused.
type Kept = Arc<Mutex<Option<Box<dyn Machine>>>>;

/// Why a migration was ended from here, if it was. What looks cancelled has failed then.
type Failure = Arc<OnceLock<String>>;

impl Current {
    fn status(&self) -> Status {
        shown(self.progress.status(), &self.failure)
    }

    fn is_over(&self) -> bool {
        self.progress.status().status.is_over()
    }
}

impl Migrations {
    /// None yet. `when_over` is called after the end of each, in its thread.
    pub fn new(
        device: Arc<Mutex<Device>>,
        events: Arc<Events>,
        when_over: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            device,
            events,
            when_over: Arc::new(when_over),
            state: Mutex::default(),
        }
    }

    /// How the next migration is to go.
    pub fn parameters(&self) -> Parameters {
        lock(&self.state).parameters.clone()
    }

    /// How the next migration is to go.
    pub fn capabilities(&self) -> Capabilities {
        lock(&self.state).capabilities
    }

    /// Changes how the next migration is to go. One that is under way goes on as it began.
    pub fn set<T>(&self, change: impl FnOnce(&mut Parameters, &mut Capabilities) -> T) -> T {
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
    pub fn start(&self, request: Request) -> Result<(), MigrateError> {
        let mut state = lock(&self.state);
        if let Some(current) = &mut state.current {
            if !current.is_over() {
                return Err(MigrateError::UnderWay(current.status().status));
            }
            // It has nothing left to wait for.
            current.thread.take().map(JoinHandle::join);
            // Stopped processes would go on if their machine was dropped. A VMM may have been told by others to go on,
            // and says by itself if it was not.
            if !current.by_vmm && lock(&current.machine).is_some() {
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
        let (cancel, failure) = (Cancel::default(), Failure::default());
        let machine = Kept::default();
        let progress = self.progress(&failure);
        let on_trouble = on_trouble(progress.clone(), cancel.clone(), failure.clone());
        let (claim, claimed) = Claim::new(&self.device, on_trouble)?;
        info!("migration to {address}");
        let job = Job {
            order: parts::Order {
                address,
                vmm_qmp: request.vmm_qmp,
                parameters: state.parameters.clone(),
                capabilities: state.capabilities,
            },
            found: parts::Found {
                claim,
                claimed,
                device: self.device.clone(),
            },
            progress: progress.clone(),
            cancel: cancel.clone(),
            machine: machine.clone(),
            when_over: self.when_over.clone(),
        };
        self.emit(State::Setup);
        let thread = thread::Builder::new()
            .name("migration".into())
            .spawn(move || job.run())
            .map_err(MigrateError::Thread)?;
        state.current = Some(Current {
            progress,
            cancel,
            failure,
            machine,
            by_vmm,
            thread: Some(thread),
        });
        Ok(())
    }

    /// What tells operators how it goes.
    fn progress(&self, failure: &Failure) -> Progress {
        let (events, failure) = (self.events.clone(), failure.clone());
        Progress::new(move |notice| match notice {
            Notice::State(state) => {
                let status = Status {
                    status: state,
                    ..Status::default()
                };
                emit(&events, shown(status, &failure).status);
            }
            Notice::Pass(pass) => events.emit("MIGRATION_PASS", json!({ "pass": pass })),
        })
    }

    fn emit(&self, state: State) {
        emit(&self.events, state);
    }

    /// Gives up the migration that is under way, if one is. The guest runs on, and has its pages back.
    pub fn cancel(&self) {
        let order = match &lock(&self.state).current {
            Some(current) if !current.is_over() => {
                Some((current.progress.clone(), current.cancel.clone()))
            }
            _ => None,
        };
        if let Some((progress, cancel)) = order {
            progress.cancelling();
            cancel.cancel();
        }
    }

    /// Tells the migration that waits in the state named `waits_in` that the guest is paused.
    ///
    /// # Errors
    ///
    /// If none waits there.
    pub fn go_on(&self, waits_in: &str) -> Result<(), MigrateError> {
        if waits_in != State::PreSwitchover.name() {
            let name = waits_in.chars().take(64).collect();
            return Err(MigrateError::NoSuchWait(name));
        }
        let state = lock(&self.state);
        match &state.current {
            Some(current) if current.progress.go_on() => Ok(()),
            current => Err(MigrateError::DoesNotWait(
                current
                    .as_ref()
                    .map_or(State::None, |it| it.status().status),
            )),
        }
    }

    /// Lets the guest go on that a completed migration has left paused: what the destination has is old then.
    ///
    /// # Errors
    ///
    /// If none has, or the guest does not go on.
    pub fn resume(&self) -> Result<(), MigrateError> {
        let kept = lock(&self.state).current.as_mut().map(|current| {
            if current.is_over() {
                // It may be about to hand the machine over.
                current.thread.take().map(JoinHandle::join);
            }
            current.machine.clone()
        });
        // Not under the lock of everything: it takes as long as the VMM takes to answer.
        let kept = kept.ok_or(MigrateError::NotPaused)?;
        let mut machine = lock(&kept);
        machine.as_mut().ok_or(MigrateError::NotPaused)?.resume()?;
        *machine = None;
        Ok(())
    }

    /// How the migration stands that is under way, or how the last one ended.
    pub fn status(&self) -> Status {
        let state = lock(&self.state);
        state
            .current
            .as_ref()
            .map_or_else(Status::default, Current::status)
    }

    /// Whether a migration is under way.
    pub fn under_way(&self) -> bool {
        let state = lock(&self.state);
        state.current.as_ref().is_some_and(|it| !it.is_over())
    }

    /// Gives up the migration that is under way, and waits until it has: the guest runs then, and has been told to take
    /// its pages back.
    pub fn shut_down(&self) {
        let given_up = self.under_way();
        self.cancel();
        let thread = lock(&self.state)
            .current
            .as_mut()
            .and_then(|current| current.thread.take());
        thread.map(JoinHandle::join);
        if given_up {
            self.let_the_driver_hear();
        }
        let kept = lock(&self.state)
            .current
            .as_ref()
            .map(|current| current.machine.clone());
        // A guest that is at the destination must not go on here as well, and dropping its machine might let it.
        if let Some(machine) = kept.and_then(|kept| lock(&kept).take()) {
            info!(
                "the guest was migrated, and is left as it is ({})",
                machine.describe()
            );
            std::mem::forget(machine);
        }
    }
}

impl Migrations {
    /// Waits until the driver has read what it was told last, for a moment at most: with the connection goes the
    /// configuration space that it reads it from.
    fn let_the_driver_hear(&self) {
        let limit = Instant::now() + HEARING;
        let signal = lock(&self.device).signal();
        loop {
            let seen = signal.changes();
            if lock(&self.device).is_heard() {
                break;
            }
            if !signal.wait(seen, Some(limit)) {
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
    order: parts::Order,
    found: parts::Found,
    progress: Progress,
    cancel: Cancel,
    machine: Kept,
    when_over: Arc<dyn Fn() + Send + Sync>,
}

impl Job {
    fn run(self) {
        let Self {
            order,
            found,
            progress,
            cancel,
            machine: kept,
            when_over,
        } = self;
        // Also after a panic, which has given everything back on its way.
        let _over = OnDrop(|| {
            if !progress.status().status.is_over() {
                let text = "the thread of the migration has panicked";
                progress.fail(&PrecopyError::Sink(text.into()));
            }
            when_over();
        });
        let parameters = order.parameters.precopy(order.capabilities);
        match order.choose(found, &progress, &cancel) {
            Ok((parts, way)) => {
                let connect = way.connector(&cancel);
                match Precopy::run(parameters, parts, connect, &progress, &cancel) {
                    // It stays paused: the guest is at the destination now.
                    Ok(machine) => {
                        *lock(&kept) = machine;
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

fn emit(events: &Events, state: State) {
    events.emit("MIGRATION", json!({ "status": state.name() }));
}

/// A status as operators see it: what was ended for a reason has failed, though its rounds only know that it was ended.
fn shown(mut status: Status, failure: &Failure) -> Status {
    if let Some(why) = failure.get() {
        match status.status {
            State::Cancelled => {
                status.status = State::Failed;
                status.error_desc = Some(why.clone());
            }
            State::Cancelling => status.error_desc = Some(why.clone()),
            _ => {}
        }
    }
    status
}

/// What the device tells, and what becomes of the migration then.
fn on_trouble(progress: Progress, cancel: Cancel, failure: Failure) -> Box<dyn Fn(Trouble) + Send> {
    Box::new(move |trouble| {
        let state = progress.status().status;
        let why = match trouble {
            // The balloon is unplugged then; the memory files are still here.
            Trouble::FrontEnd(why) if matches!(state, State::PreSwitchover | State::Device) => {
                info!("{why}; the migration goes on ({})", state.name());
                return;
            }
            Trouble::FrontEnd(why) => format!("the migration has lost its guest: {why}"),
            Trouble::Memory(why) => format!("the guest's memory has changed: {why}"),
        };
        if !state.is_over() {
            // The first reason counts.
            let _ = failure.set(why);
            cancel.cancel();
        }
    })
}
