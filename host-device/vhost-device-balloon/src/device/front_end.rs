// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests of the front end: connection, guest memory, features, reset. The caller holds the device's lock.

use std::sync::Arc;

use serde_json::json;
use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;
use tracing::{info, warn};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::connection::{Connection, NotifyConfigChange};
use super::migration_claim::Invalidated;
use super::Device;
use crate::memory::Ram;

impl Device {
    /// Handles the connection of a front end. `notifier` reports configuration changes to it.
    pub fn front_end_connected(&mut self, notifier: Arc<dyn NotifyConfigChange>) {
        self.connection = Some(Connection {
            notifier: Some(notifier),
            ..Connection::default()
        });
        self.events.emit("FRONTEND_CONNECTED", json!({}));
    }

    /// Handles the disconnection of the front end, for this `reason`. Drops the state of the driver, the
    /// queues and guest memory.
    pub fn front_end_disconnected(&mut self, reason: &str) {
        if let Some(id) = self.hinting.phase().id() {
            let status = self.hinting.status();
            warn!(
                "hint round {:#x} ended after {} blocks: {reason}",
                id.number(),
                status.blocks
            );
        }
        let changes = self.hinting.reset();
        self.emit_phase(changes);
        let changes = self.hinting.handle_memory_change();
        self.emit_phase(changes);
        self.connection = None;
        self.negotiated_features = None;
        self.ram = Ram::default();
        self.stats.reset();
        self.config = ConfigSpace {
            num_pages: self.config.num_pages,
            ..ConfigSpace::default()
        };
        self.invalidate_claim(Invalidated::FrontEndDisconnected(reason.into()));
        self.events
            .emit("FRONTEND_DISCONNECTED", json!({ "reason": reason }));
    }

    /// Handles the guest memory that the front end shares. A changed layout ends the hint round and
    /// invalidates a migration's claim.
    pub fn set_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) {
        let mut ram = Ram::new(&memory.memory());
        if !self.ram.has_same_layout(&ram) {
            info!(
                "guest memory: {} MiB in {} regions",
                ram.size() >> 20,
                ram.num_regions()
            );
            if let Some(id) = self.hinting.phase().id() {
                warn!(
                    "hint round {:#x} ended: guest memory regions changed",
                    id.number()
                );
            }
            let changes = self.hinting.handle_memory_change();
            self.publish_changes(changes);
            let text = "front end changed the layout of guest memory or its files";
            self.invalidate_claim(Invalidated::MemoryChanged(text.into()));
        } else {
            ram.set_hole_recorder(self.ram.hole_recorder());
        }
        self.ram = ram;
        if let Some(connection) = &mut self.connection {
            connection.memory = Some(memory);
        }
    }

    /// Handles the features that the driver accepted. Features that differ from the last ones are those
    /// of a new driver.
    pub fn set_features(&mut self, bits: u64) {
        let features = Features::from_bits(bits) & self.offered_features;
        if let Some(permit) = self.driver_log.permit() {
            info!("driver accepted features: {features}{permit}");
        }
        if self
            .negotiated_features
            .is_some_and(|before| before != features)
        {
            self.reset_driver_state();
        }
        self.negotiated_features = Some(features);
        if let Some(connection) = &mut self.connection {
            connection.driver_starting = true;
        }
    }

    /// Handles a device reset by the front end.
    pub fn reset(&mut self) {
        self.reset_driver_state();
        self.negotiated_features = None;
    }
}
