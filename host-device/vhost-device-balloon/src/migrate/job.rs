// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The work of a migration's thread.

use std::sync::{Arc, Mutex};

use guest_migration::precopy::{Precopy, PrecopyError, Progress};
use guest_migration::vm::Vm;
use guest_migration::CancelToken;
use tracing::{info, warn};

use super::setup;
use crate::sync::lock;

/// The VM that a completed migration has left paused.
pub(super) type PausedVm = Arc<Mutex<Option<Box<dyn Vm>>>>;

/// The work of a migration's thread.
pub(super) struct Job {
    pub(super) config: setup::MigrationConfig,
    pub(super) claimed_device: setup::ClaimedDevice,
    pub(super) progress: Progress,
    pub(super) cancel: CancelToken,
    pub(super) vm: PausedVm,
    pub(super) on_end: Arc<dyn Fn() + Send + Sync>,
}

impl Job {
    pub(super) fn run(self) {
        let Self {
            config,
            claimed_device,
            progress,
            cancel,
            vm: paused_vm,
            on_end,
        } = self;
        // Runs after a panic as well. Unwinding has released the claim by then.
        let _over = OnDrop(|| {
            if !progress.status().status.is_over() {
                let text = "migration thread panicked";
                progress.fail(&PrecopyError::Sink(text.into()));
            }
            on_end();
        });
        let parameters = config.parameters.to_precopy(config.capabilities);
        match config.prepare(claimed_device, &progress, &cancel) {
            Ok((parts, stream_config)) => {
                let connect = stream_config.connector(&cancel);
                match Precopy::run(parameters, parts, connect, &progress, &cancel) {
                    // The VM stays paused: the guest is at the destination now.
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
