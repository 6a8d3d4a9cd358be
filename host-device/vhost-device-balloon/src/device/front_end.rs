// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests of the front end: connection, guest memory, features, reset. The caller holds the device's lock.

use std::sync::{Arc, PoisonError};

use serde_json::json;
use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;
use shared_abi::page::BALLOON_PAGE_SIZE;
use tracing::{info, warn};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::event::EventNotifier;

use super::connection::{Connection, NotifyConfigChange};
use super::migration_claim::Invalidated;
use super::Device;
use crate::memory::sys::GuestMappings;
use crate::memory::{BackingError, Ram};

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
        let mut ram = Ram::default();
        ram.continue_from(&self.ram);
        self.ram = ram;
        self.partial_pages.clear();
        self.stats.reset();
        self.config = ConfigSpace {
            num_pages: self.config.num_pages,
            ..ConfigSpace::default()
        };
        self.invalidate_claim(Invalidated::FrontEndDisconnected(reason.into()));
        self.events
            .emit("FRONTEND_DISCONNECTED", json!({ "reason": reason }));
    }

    /// Handles the guest memory that the front end shares. `ram` is [`Ram::of_front_end`] of it. A changed layout ends
    /// the hint round and invalidates a migration's claim. `wake` is notified when an access to the memory fails: see
    /// [`Device::memory_fault`].
    ///
    /// Returns the queues that waited for this call and need a turn, one bit for each.
    ///
    /// # Errors
    ///
    /// The error in `ram`, or if accesses cannot be guarded. The device then uses no guest memory.
    pub fn set_memory(
        &mut self,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        ram: Result<Ram, BackingError>,
        wake: Option<EventNotifier>,
    ) -> Result<u64, BackingError> {
        let current = memory.memory().into_inner();
        let accepted = ram.and_then(|ram| {
            let mappings = GuestMappings::new(current, |address| ram.page_size_at(address), wake);
            Ok((mappings.map_err(BackingError::Guard)?, ram))
        });
        let (mappings, mut ram) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(connection) = &mut self.connection {
                    connection.memory = None;
                }
                return Err(error);
            }
        };
        if !self.ram.has_same_layout(&ram) {
            self.log_memory(&ram);
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
            self.partial_pages.clear();
        } else {
            ram.set_hole_recorder(self.ram.hole_recorder());
        }
        ram.continue_from(&self.ram);
        self.ram = ram;
        let Some(connection) = &mut self.connection else {
            return Ok(0);
        };
        connection.memory = Some((memory, mappings));
        Ok(std::mem::take(&mut connection.postponed_queues))
    }

    fn log_memory(&self, ram: &Ram) {
        let protection = match ram.is_truncatable() {
            true => "memory files can be truncated",
            false => "memory files are sealed",
        };
        info!(
            "guest memory: {} MiB in {} regions; {protection}",
            ram.size() >> 20,
            ram.num_regions()
        );
        let granule = ram.largest_granule();
        if granule > BALLOON_PAGE_SIZE {
            info!(
                "guest memory: pages of {} KiB, each of which is freed as a whole; with --must-tell-host, pages in the \
                 balloon add up over requests",
                granule >> 10
            );
        }
    }

    /// Calls `access` while guest memory cannot change. `access` may use the queues. Returns `None` without a call if
    /// there is no guest memory, if an access to it has failed, or if the front end is just replacing it;
    /// [`Device::set_memory`] follows in the last case.
    pub(super) fn with_stable_memory<R>(
        &mut self,
        access: impl FnOnce(&mut Self, &GuestMemoryAtomic<GuestMemoryMmap>) -> R,
    ) -> Option<R> {
        let (memory, _) = self.connection.as_ref()?.memory.as_ref()?;
        let memory = memory.clone();
        // The crate replaces guest memory under this lock, before it calls `set_memory`.
        let guard = memory.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, mappings) = self.connection.as_ref()?.memory.as_ref()?;
        let is_usable = mappings.are_of(&memory.memory()) && mappings.fault().is_none();
        let result = is_usable.then(|| access(self, &memory));
        drop(guard);
        result
    }

    /// Returns why guest memory cannot be used: its file was truncated after the front end had shared it. The session
    /// must end then.
    pub fn memory_fault(&self) -> Option<String> {
        let (_, mappings) = self.connection.as_ref()?.memory.as_ref()?;
        let address = mappings.fault()?;
        Some(format!(
            "guest memory at {address:#x} cannot be accessed: front end truncated the memory file"
        ))
    }

    /// Handles the features that the driver accepted. Features that differ from the last ones are those
    /// of a new driver.
    pub fn set_features(&mut self, bits: u64) {
        let features = Features::from_bits(bits) & self.offered_features;
        info!("driver accepted features: {features}");
        if self
            .negotiated_features
            .is_some_and(|before| before != features)
        {
            self.reset_driver_state();
        }
        self.negotiated_features = Some(features);
        // Another driver may have accepted the same features, with an empty balloon.
        self.partial_pages.clear();
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
