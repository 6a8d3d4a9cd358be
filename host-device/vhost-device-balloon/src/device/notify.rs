// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Notifications: configuration changes for the driver, events for QMP clients, wakeups for a migration.

use serde_json::json;

use super::hinting::HintingChanges;
use super::status::phase_name;
use super::Device;

impl Device {
    /// Notifies the driver that its configuration has changed. Defers the notification while the queues are
    /// stopped. QEMU 11.1 crashes when it starts the queues of a generic vhost-user device that sent a notification
    /// while they were stopped.
    pub(super) fn notify_config_change(&self) {
        if let Some(connection) = &self.connection {
            if self.are_queues_stopped() {
                connection.config_change_pending.set(true);
                return;
            }
            if let Some(notifier) = &connection.notifier {
                notifier.notify();
            }
            connection.cmd_id_unread.set(true);
            connection
                .config_changes
                .set(connection.config_changes.get() + 1);
        }
    }

    /// Notifies the driver of a change that happened while the queues were stopped.
    pub(super) fn send_pending_config_change(&self) {
        let config_change_pending = self
            .connection
            .as_ref()
            .map(|it| it.config_change_pending.take());
        if config_change_pending == Some(true) {
            self.notify_config_change();
        }
    }

    pub(super) fn publish_changes(&self, changes: HintingChanges) {
        if changes.config {
            self.notify_config_change();
        }
        self.emit_phase(changes);
    }

    /// Reports the size of guest memory outside the balloon.
    pub(super) fn emit_balloon_change(&self) {
        let actual = self.actual_bytes();
        self.events
            .emit("BALLOON_CHANGE", json!({ "actual": actual }));
    }

    pub(super) fn emit_phase(&self, changes: HintingChanges) {
        if changes.phase {
            self.hinting_events.notify_all();
            let mut data = json!({ "status": phase_name(self.hinting.phase()) });
            if let (Some(id), Some(data)) = (self.hinting.phase().id(), data.as_object_mut()) {
                data.insert("id".into(), id.number().into());
            }
            self.events.emit("FREE_PAGE_HINT", data);
        }
    }
}
