// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state that the commands act on.

use std::sync::Arc;

use crate::device_lock::DeviceLock;
use crate::events::Events;
use crate::migrate::MigrationManager;

/// State that the commands act on.
pub struct CommandContext {
    /// The balloon.
    pub device: Arc<DeviceLock>,
    /// The migrations of its guest.
    pub migration_manager: Arc<MigrationManager>,
    /// The source of events.
    pub events: Arc<Events>,
    /// Ends the program.
    pub quit: Box<dyn Fn() + Send + Sync>,
}
