// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Operations of QMP clients on the balloon: target size, hinting, statistics, status. The caller
//! holds the device's lock.

use std::sync::Arc;

use guest_migration::DirtyBitmap;
use shared_abi::command::HintId;
use shared_abi::features::Features;
use shared_abi::page::PFN_SHIFT;
use shared_abi::queue::{negotiated_queues, Queue};
use tracing::info;
use vhost_user_backend::VringT;

use super::connection::Connection;
use super::hinting::{FreshBitmap, HintingChanges, HintingError, HintingStatus};
use super::missing_memory::MissingMemory;
use super::status::{QueueStatus, StatsReport, VirtioStatus};
use super::Device;
use crate::memory::Ram;
use crate::vring::Vring;

/// Why a balloon command fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BalloonError {
    /// Guest memory is not known.
    #[error(transparent)]
    NoMemory(#[from] MissingMemory),
    /// The target is 0.
    #[error("target must be a size in bytes greater than 0")]
    ZeroTarget,
    /// The balloon would need more pages than 32 bits can count.
    #[error("balloon cannot hold {0} pages of 4 KiB: the limit is 2^32 - 1; set a larger target")]
    TooLarge(u64),
}

impl Device {
    /// Sets the target: the size in bytes of guest memory outside the balloon. Notifies the driver if the number
    /// of balloon pages changes. A size above that of guest memory means all of it, as in QEMU.
    ///
    /// # Errors
    ///
    /// If the size is 0, if guest memory is not known yet, or if the balloon would need more than 2^32 - 1 pages.
    pub fn set_target(&mut self, bytes: u64) -> Result<(), BalloonError> {
        if bytes == 0 {
            return Err(BalloonError::ZeroTarget);
        }
        let ram = self.ram_bytes()?;
        let pages = ram.saturating_sub(bytes) >> PFN_SHIFT;
        let pages = u32::try_from(pages).map_err(|_| BalloonError::TooLarge(pages))?;
        if pages != self.config.num_pages {
            match bytes > ram {
                true => info!(
                    "balloon target: {bytes} bytes are more than guest memory has ({ram}); the balloon is emptied"
                ),
                false => info!("balloon target: {pages} pages"),
            }
            self.config.num_pages = pages;
            self.notify_config_change();
        }
        Ok(())
    }

    /// Returns the size in bytes of guest memory outside the balloon, as reported by the driver.
    ///
    /// # Errors
    ///
    /// If guest memory is not known yet.
    pub fn actual_size(&self) -> Result<u64, BalloonError> {
        self.ram_bytes()?;
        Ok(self.actual_bytes())
    }

    pub(super) fn actual_bytes(&self) -> u64 {
        self.ram
            .size()
            .saturating_sub(u64::from(self.config.actual) << PFN_SHIFT)
    }

    /// Returns the size of guest memory in bytes.
    ///
    /// # Errors
    ///
    /// If guest memory is not known.
    pub(super) fn ram_bytes(&self) -> Result<u64, MissingMemory> {
        match (self.ram.size(), &self.connection, self.negotiated_features) {
            (0, None, _) => Err(MissingMemory::NoFrontEnd),
            (0, Some(_), None) => Err(MissingMemory::NoDriver),
            (0, Some(_), Some(_)) => Err(MissingMemory::NotShared),
            (bytes, ..) => Ok(bytes),
        }
    }

    /// Starts a hint round as [`DeviceLock::start_hinting`](crate::device_lock::DeviceLock::start_hinting), in one step.
    /// Takes time for each page of guest memory.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn start_hinting(&mut self) -> Result<HintId, HintingError> {
        let ram = self.check_hinting_startable()?;
        self.start_hinting_with(FreshBitmap::new(ram)?)
    }

    /// Checks whether a hint round can start, and returns the guest memory to make a bitmap for.
    ///
    /// # Errors
    ///
    /// If the driver cannot answer, or a migration has claimed hinting.
    pub fn check_hinting_startable(&mut self) -> Result<Ram, HintingError> {
        self.detect_driver_restart();
        self.check_hinting_available()?;
        self.check_unclaimed()?;
        Ok(self.ram())
    }

    /// Starts a hint round with a bitmap that was made after [`Device::check_hinting_startable`].
    ///
    /// # Errors
    ///
    /// As there, if guest memory has changed since, or if no id is free.
    pub fn start_hinting_with(&mut self, fresh: FreshBitmap) -> Result<HintId, HintingError> {
        self.check_hinting_startable()?;
        if !fresh.covers(&self.ram) {
            return Err(HintingError::MemoryChanged);
        }
        let cmd_id = self.hinting.cmd_id();
        let result = self.hinting.start(fresh);
        self.publish_hint_round(cmd_id, result)
    }

    /// Performs the hinting part of a dirty sync: ends the hint round and starts another one. Returns the new id.
    ///
    /// # Errors
    ///
    /// If no hint round is in progress, the driver cannot answer, a migration has claimed hinting, or no id is free.
    pub fn sync_hinting(&mut self) -> Result<HintId, HintingError> {
        self.detect_driver_restart();
        self.check_hinting_available()?;
        self.check_unclaimed()?;
        let cmd_id = self.hinting.cmd_id();
        let result = self.hinting.sync();
        self.publish_hint_round(cmd_id, result)
    }

    /// Stops the hint round: config space shows STOP, and the driver keeps its hinted blocks. Does nothing after DONE.
    pub fn stop_hinting(&mut self) {
        let changes = self.hinting.stop();
        self.publish_changes(changes);
    }

    /// Ends hinting: config space shows DONE, and the driver frees its hinted blocks.
    pub fn finish_hinting(&mut self) {
        let changes = self.hinting.done();
        self.publish_changes(changes);
    }

    /// Returns the state of hinting.
    pub fn hinting_status(&self) -> HintingStatus {
        self.hinting.status()
    }

    /// Returns the dirty bitmap of the hint round, if there is one, to read it without the device's lock.
    pub fn hinting_bitmap(&self) -> Option<Arc<DirtyBitmap>> {
        self.hinting.bitmap()
    }

    /// Returns a copy of the map of guest memory, for use without the device's lock.
    pub fn ram(&self) -> Ram {
        self.ram.clone()
    }

    /// Returns the state of the connection.
    pub fn virtio_status(&self) -> VirtioStatus {
        let none = Connection::default();
        let connection = self.connection.as_ref().unwrap_or(&none);
        let queues = self.negotiated_features.map_or_else(Vec::new, |features| {
            negotiated_queues(features)
                .filter_map(|queue| Some((queue, self.index_of(queue)?)))
                .map(|(queue, index)| {
                    let counters = connection.counters.get(index).copied().unwrap_or_default();
                    let vring = connection.vrings.get(index);
                    let notification_counts =
                        vring.map(Vring::notification_counts).unwrap_or_default();
                    QueueStatus {
                        queue,
                        index,
                        notifications: notification_counts.notifications,
                        wakeups: counters.wakeups,
                        interrupts: notification_counts.interrupts,
                        requests: counters.requests,
                    }
                })
                .collect()
        });
        VirtioStatus {
            is_connected: self.connection.is_some(),
            is_running: self.is_running(),
            is_memory_shared: self.ram.size() > 0,
            offered_features: self.offered_features,
            negotiated_features: self.negotiated_features,
            poison_val: self.poison_val(),
            queues,
            config_reads: connection.config_reads,
            config_writes: connection.config_writes,
            config_changes: connection.config_changes.get(),
            discards_hinted: self.discards_hinted(),
            pages_inflated: self.pages_inflated,
            pages_deflated: self.pages_deflated,
            bytes_released: self.bytes_released,
            bytes_reported: self.bytes_reported,
            punches: self.ram.punches(),
            errors: self.guest_errors.total(),
            last_error: self.guest_errors.last().map(str::to_owned),
        }
    }

    /// Returns the latest statistics.
    pub fn stats(&self) -> StatsReport {
        StatsReport {
            values: self.stats.values().to_vec(),
            updated: self.stats.updated(),
            generation: self.stats.generation(),
        }
    }

    /// Returns the statistics buffer to the driver, which requests new statistics. Returns whether that was possible.
    pub fn request_stats(&mut self) -> bool {
        self.detect_driver_restart();
        if !self.is_running() {
            return false;
        }
        let requested = self.with_stable_memory(|device, _| {
            let vring = device
                .index_of(Queue::Stats)
                .and_then(|index| device.connection.as_ref()?.vrings.get(index));
            let (Some(vring), Some(head)) = (vring, device.stats.take_buffer()) else {
                return false;
            };
            let requested = vring.add_used(head, 0).is_ok();
            if requested && vring.needs_notification().unwrap_or(true) {
                let interrupt = vring.interrupt();
                device.interrupts.push(interrupt);
            }
            requested
        });
        requested.unwrap_or(false)
    }

    /// Checks that no migration has claimed hinting.
    ///
    /// # Errors
    ///
    /// [`HintingError::Migrating`] if a migration has.
    pub fn check_unclaimed(&self) -> Result<(), HintingError> {
        match self.claim {
            Some(_) => Err(HintingError::Migrating),
            None => Ok(()),
        }
    }

    pub(super) fn check_hinting_available(&self) -> Result<(), HintingError> {
        if self.connection.is_none() {
            return Err(HintingError::NoFrontEnd);
        }
        if !self.offered_features.contains(Features::FREE_PAGE_HINT) {
            return Err(HintingError::NotOffered);
        }
        match self.negotiated_features {
            None => return Err(HintingError::NoDriver),
            Some(features) if !features.contains(Features::FREE_PAGE_HINT) => {
                return Err(HintingError::NotNegotiated);
            }
            Some(_) => {}
        }
        if !self.is_running() {
            return Err(HintingError::NoDriver);
        }
        Ok(())
    }

    /// Publishes the changes of a request for a new id. A failed request may still have ended a hint round.
    fn publish_hint_round(
        &mut self,
        before: shared_abi::command::CommandId,
        result: Result<HintingChanges, HintingError>,
    ) -> Result<HintId, HintingError> {
        let (changes, result) = match result {
            Ok(changes) => (changes, Ok(())),
            Err(error) => {
                let changed = before != self.hinting.cmd_id();
                (
                    HintingChanges {
                        config: changed,
                        phase: changed,
                    },
                    Err(error),
                )
            }
        };
        self.publish_changes(changes);
        result?;
        self.hinting.phase().id().ok_or(HintingError::IdsExhausted)
    }
}
