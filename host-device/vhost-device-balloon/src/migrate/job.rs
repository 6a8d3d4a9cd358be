// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of a migration's thread.

use std::sync::{Arc, Mutex};

use guest_migration::precopy::{Precopy, PrecopyError, Progress};
use guest_migration::vm::Vm;
use guest_migration::CancelToken;
use tracing::{info, warn};

use super::device_access::DeviceAccess;
use super::setup::MigrationConfig;
use crate::sync::lock;

/// The VM that a completed migration has left paused.
pub(super) type PausedVm = Arc<Mutex<Option<Box<dyn Vm>>>>;

/// The work of a migration's thread, for a migration in this process.
pub(super) struct Job {
    pub(super) config: MigrationConfig,
    pub(super) access: DeviceAccess,
    pub(super) progress: Progress,
    pub(super) cancel: CancelToken,
    pub(super) vm: PausedVm,
    pub(super) on_end: OnEnd,
}

impl Job {
    pub(super) fn run(self) {
        let _over = EndGuard::new(&self.progress, &self.on_end);
        let vm = migrate(self.config, self.access, &self.progress, &self.cancel);
        *lock(&self.vm) = vm;
    }
}

/// Called at the end of each migration.
pub(super) type OnEnd = Arc<dyn Fn() + Send + Sync>;

/// Reports the end of a migration when it is dropped, also after a panic. Unwinding has released the claim by then.
pub(super) struct EndGuard<'a> {
    progress: &'a Progress,
    on_end: &'a OnEnd,
}

impl<'a> EndGuard<'a> {
    pub(super) fn new(progress: &'a Progress, on_end: &'a OnEnd) -> Self {
        Self { progress, on_end }
    }
}

impl Drop for EndGuard<'_> {
    fn drop(&mut self) {
        if !self.progress.status().status.is_over() {
            let text = "migration thread panicked";
            self.progress.fail(&PrecopyError::Sink(text.into()));
        }
        (self.on_end)();
    }
}

/// Runs a migration in this thread. `progress` shows how it ended. Returns the VM that a completed migration has left
/// paused.
pub(super) fn migrate(
    config: MigrationConfig,
    access: DeviceAccess,
    progress: &Progress,
    cancel: &CancelToken,
) -> Option<Box<dyn Vm>> {
    let parameters = config.parameters.to_precopy(config.capabilities);
    match config.prepare(access, progress, cancel) {
        Ok((parts, stream_config)) => {
            let connect = stream_config.connector(cancel);
            match Precopy::run(parameters, parts, connect, progress, cancel) {
                // The VM stays paused: the guest is at the destination now.
                Ok(vm) => {
                    info!("migration: completed");
                    return vm;
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
    None
}
