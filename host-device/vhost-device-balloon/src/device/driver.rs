// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's driver: whether it runs, whether another one has taken over, and what it has promised.
//!
//! The vhost-user protocol does not report these events. The device detects them from features and queues.

use serde_json::json;
use shared_abi::command::CommandId;
use shared_abi::features::Features;
use tracing::{info, warn};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;

use super::Device;

impl Device {
    /// Returns whether the driver's queues are running: a driver is started, the guest is not paused, and its memory is
    /// shared.
    pub(super) fn is_running(&self) -> bool {
        let inflate = self
            .connection
            .as_ref()
            .and_then(|connection| connection.vrings.first());
        self.negotiated_features.is_some()
            && self.ram.size() > 0
            && inflate.is_some_and(|vring| {
                let vring = vring.get_ref();
                vring.is_enabled() && vring.get_queue().ready()
            })
    }

    /// Returns whether queues exist and are stopped: no driver runs, or the guest is paused.
    pub(super) fn are_queues_stopped(&self) -> bool {
        let vrings = self.connection.iter().flat_map(|it| &it.vrings);
        vrings
            .take(1)
            .any(|vring| !vring.get_ref().get_queue().ready())
    }

    /// Detects whether another driver has taken over since the queues were last checked. If so, resets the state
    /// of the previous driver.
    ///
    /// The front end does not tell a device reset from a paused guest: in both cases the queues stop and start again.
    /// After a reset, the queues start from the beginning. After a pause, they continue at their last index.
    pub(super) fn detect_driver_restart(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let mut restarted = false;
        for (counters, vring) in connection.counters.iter_mut().zip(&connection.vrings) {
            let avail_idx = vring.get_ref().get_queue().next_avail();
            restarted |= counters
                .last_avail_idx
                .is_some_and(|last_avail_idx| last_avail_idx != avail_idx);
            counters.last_avail_idx = counters.last_avail_idx.map(|_| avail_idx);
        }
        if restarted {
            info!("driver restarted");
            self.reset_driver_state();
        }
    }

    /// Detects whether the driver whose queues are stopped no longer exists. If so, resets its state.
    ///
    /// The front end does not tell a reset from a pause. While a guest is paused, the used rings in its memory are as
    /// the device left them. A kernel without a driver uses this memory for something else sooner or later.
    pub fn detect_driver_gone(&mut self) {
        // After new features the front end sets up the queues: then `detect_driver_restart` decides.
        let is_starting = self.connection.as_ref().is_none_or(|it| it.driver_starting);
        if self.negotiated_features.is_none() || is_starting || !self.are_queues_stopped() {
            return;
        }
        let overwritten = self.with_stable_memory(|device, _| {
            let connection = device.connection.iter();
            let mut queues = connection.flat_map(|it| it.counters.iter().zip(&it.vrings));
            queues.any(|(counters, vring)| {
                let (ready, next_used) = {
                    let state = vring.get_ref();
                    let queue = state.get_queue();
                    (queue.ready(), queue.next_used())
                };
                let used_idx = vring.queue_used_idx();
                counters.last_avail_idx.is_some()
                    && !ready
                    && used_idx.is_ok_and(|used_idx| used_idx != next_used)
            })
        });
        // Zeros that replaced a page of a truncated file look like another ring. The session ends.
        if overwritten == Some(true) && self.memory_fault().is_none() {
            info!("driver is gone: the guest has overwritten the used ring of a stopped queue");
            self.reset();
        }
    }

    /// Handles the first use of a queue after the driver has accepted its features.
    pub(super) fn handle_driver_start(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        if !std::mem::take(&mut connection.driver_starting) {
            return;
        }
        self.warn_discard_not_negotiated();
        let features: Vec<_> = self
            .negotiated_features
            .unwrap_or_default()
            .names()
            .collect();
        self.events
            .emit("DRIVER_STARTED", json!({ "features": features }));
        if self.hinting.cmd_id() != CommandId::Stop {
            // The driver was not running when the command id changed, and missed the notification.
            self.notify_config_change();
        }
    }

    /// Resets the state of the previous driver: its hint round, its statistics buffer, its poison value, the size of its
    /// balloon and the requests that it has not got back. A reset gives the guest all its memory back.
    pub(super) fn reset_driver_state(&mut self) {
        if let Some(id) = self.hinting.phase().id() {
            warn!("hint round {:#x} ended: driver was reset", id.number());
        }
        if let Some(connection) = &mut self.connection {
            connection.pending_requests = Default::default();
        }
        if std::mem::take(&mut self.config.actual) != 0 {
            self.emit_balloon_change();
        }
        let changes = self.hinting.reset();
        self.publish_changes(changes);
        self.partial_pages.clear();
        self.stats.reset();
        self.config.poison_val = 0;
        if let Some(connection) = &mut self.connection {
            connection.queues = Default::default();
        }
    }

    /// Returns whether hinted blocks are discarded (R17).
    pub fn discards_hinted(&self) -> bool {
        self.negotiated_features
            .is_some_and(|features| features.contains(Features::KEEPS_HINTED_UNTIL_RETURNED))
            && !self.is_discard_inhibited()
    }

    /// Logs, once for each connection, why hinted blocks are not discarded although that was requested.
    fn warn_discard_not_negotiated(&mut self) {
        let wanted = self
            .offered_features
            .contains(Features::KEEPS_HINTED_UNTIL_RETURNED);
        let refused = wanted && !self.discards_hinted();
        let Some(connection) = &mut self.connection else {
            return;
        };
        if refused && !std::mem::replace(&mut connection.discard_warning_logged, true) {
            warn!(
                "hinted memory is not discarded: driver did not accept the private feature bit {}, and may use a \
                 hinted block before its buffer is returned; load the driver of this project to discard hinted \
                 memory",
                Features::KEEPS_HINTED_UNTIL_RETURNED.bit_number()
            );
        }
    }
}
