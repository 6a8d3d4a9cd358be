// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The exit policy: when the program ends after its front end has disconnected.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{Exit, Server, ServerError};

/// How long the program stays after the migration of a guest that has disconnected, so that QMP clients can query
/// how the migration ended.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the program checks during that time whether all QMP clients have disconnected.
pub(super) const LINGER_POLL_INTERVAL: Duration = Duration::from_millis(50);

impl Server {
    /// Handles the end of the session. Returns how the program ends, if it does.
    pub(super) fn session_ended(&mut self) -> Result<Option<Exit>, ServerError> {
        let Some(session) = self.session.take() else {
            return Ok(None);
        };
        // Checked before the device is told, because that may end the migration. QMP clients can then still
        // query how it ended.
        let migrating = self.migration_manager.is_in_progress();
        let ended = session.join();
        if self.options.persistent {
            warn!("{}; waiting for the next front end", ended.reason);
            return Ok(None);
        }
        if migrating {
            info!("{}; exiting after the migration", ended.reason);
            self.session_end = Some(ended);
            return Ok(None);
        }
        if ended.is_error {
            return Err(ServerError::FrontEnd(ended.reason));
        }
        info!("exiting: {}", ended.reason);
        Ok(Some(Exit::FrontEndDisconnected(ended)))
    }

    /// Returns how the program ends, if its front end disconnected during a migration. The program ends when the
    /// migration is over and all QMP clients have disconnected, or after [`LINGER_TIMEOUT`].
    pub(super) fn exit_after_migration(&mut self) -> Result<Option<Exit>, ServerError> {
        let Some(ended) = self.session_end.as_ref() else {
            return Ok(None);
        };
        if self.migration_manager.is_in_progress() {
            return Ok(None);
        }
        let deadline = *self
            .exit_deadline
            .get_or_insert_with(|| Instant::now() + LINGER_TIMEOUT);
        if self.qmp_clients.count() > 0 && Instant::now() < deadline {
            return Ok(None);
        }
        if ended.is_error {
            return Err(ServerError::FrontEnd(ended.reason.clone()));
        }
        info!("exiting: {}, and the migration has ended", ended.reason);
        Ok(Some(Exit::FrontEndDisconnected(ended.clone())))
    }
}
