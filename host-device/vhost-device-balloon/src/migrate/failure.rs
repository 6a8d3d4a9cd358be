// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why this program ended a migration. The device reports an invalidated claim, and the migration fails.

use std::sync::{Arc, OnceLock};

use guest_migration::precopy::Progress;
use guest_migration::status::{MigrationInfo, MigrationStatus};
use guest_migration::CancelToken;
use tracing::info;

use crate::device::migration_claim::Invalidated;

/// Why this program ended the migration, if it did. Such a migration is shown as failed, not as cancelled.
pub(super) type FailureReason = Arc<OnceLock<String>>;

/// Returns a status as QMP clients see it. A migration that this program ended for a reason is shown as failed;
/// [`Precopy`](guest_migration::precopy::Precopy) reports it as cancelled.
pub(super) fn effective_status(
    mut status: MigrationInfo,
    failure: &FailureReason,
) -> MigrationInfo {
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

/// Returns the callback for an invalidated claim. It ends the migration, unless the migration can continue.
pub(super) fn on_invalidated(
    progress: Progress,
    cancel: CancelToken,
    failure: FailureReason,
) -> Box<dyn Fn(Invalidated) + Send> {
    Box::new(move |invalidated| {
        let state = progress.status().status;
        let why = match invalidated {
            // The balloon is unplugged in these states. The memory files are still open.
            Invalidated::FrontEndDisconnected(why)
                if matches!(
                    state,
                    MigrationStatus::PreSwitchover | MigrationStatus::Device
                ) =>
            {
                info!("{why}; migration continues ({})", state.name());
                return;
            }
            Invalidated::FrontEndDisconnected(why) => {
                format!("front end disconnected during migration: {why}")
            }
            Invalidated::MemoryChanged(why) => {
                format!("guest memory regions changed during migration: {why}")
            }
        };
        if !state.is_over() {
            // The first reason is kept.
            let _ = failure.set(why);
            cancel.cancel();
        }
    })
}
