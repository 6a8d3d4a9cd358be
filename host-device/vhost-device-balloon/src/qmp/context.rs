// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state that the commands act on.

use std::path::Path;
use std::sync::Arc;

use crate::device::saved_state::{SavedState, SavedStateError};
use crate::device_lock::DeviceLock;
use crate::events::Events;
use crate::migrate::MigrationManager;

/// Writes a saved state to a file.
pub type SaveState = Box<dyn Fn(&SavedState, &Path) -> Result<(), SavedStateError> + Send + Sync>;

/// State that the commands act on.
pub struct CommandContext {
    /// The balloon.
    pub device: Arc<DeviceLock>,
    /// The migrations of its guest.
    pub migration_manager: Arc<MigrationManager>,
    /// The source of events.
    pub events: Arc<Events>,
    /// Writes a saved state to a file.
    pub save_state: SaveState,
    /// Ends the program.
    pub quit: Box<dyn Fn() + Send + Sync>,
}
