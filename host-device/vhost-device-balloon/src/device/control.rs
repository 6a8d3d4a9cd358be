// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The operator's side of the balloon.

use shared_abi::command::HintId;
use shared_abi::features::Features;
use shared_abi::page::PFN_SHIFT;
use shared_abi::queue::{negotiated_queues, Queue};
use tracing::info;
use vhost_user_backend::VringT;

use super::hinting::{HintingError, HintingStatus};
use super::{BalloonError, Connection, Device, QueueStatus, StatsReport, VirtioStatus};
use crate::memory::Ram;
use crate::vring::Vring;

impl Device {
    /// Sets the size that guest memory should have outside the balloon, in bytes.
    ///
    /// # Errors
    ///
    /// If the size is 0, or guest memory is not known yet.
    pub fn set_target(&mut self, bytes: u64) -> Result<(), BalloonError> {
        if bytes == 0 {
            return Err(BalloonError::ZeroTarget);
        }
        let ram = self.ram_bytes()?;
        let pages = ram.saturating_sub(bytes) >> PFN_SHIFT;
        let pages = u32::try_from(pages).map_err(|_| BalloonError::TooLarge(pages))?;
        if pages != self.config.num_pages {
            info!("the balloon shall hold {pages} pages");
            self.config.num_pages = pages;
            self.notify_config_change();
        }
        Ok(())
    }

    /// The size of guest memory outside the balloon, in bytes, as the driver says.
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

    fn ram_bytes(&self) -> Result<u64, BalloonError> {
        match self.ram.size() {
            0 => Err(BalloonError::NoMemory),
            bytes => Ok(bytes),
        }
    }

    /// Begins a round of hinting with all pages dirty, and returns its id. A round that is under way is
    /// cancelled.
    ///
    /// # Errors
    ///
    /// If no driver is there that could answer.
    pub fn start_hinting(&mut self) -> Result<HintId, HintingError> {
        self.detect_driver_restart();
        self.check_hinting_available()?;
        self.check_unclaimed()?;
        let cmd_id = self.hinting.cmd_id();
        let result = self.hinting.start(&self.ram);
        self.publish_hint_round(cmd_id, result)
    }

    /// Does what a dirty sync does to hinting: the id dies, and hints are wanted under a new one, which is
    /// returned.
    ///
    /// # Errors
    ///
    /// If no round is under way, or no driver is there any more.
    pub fn sync_hinting(&mut self) -> Result<HintId, HintingError> {
        self.detect_driver_restart();
        self.check_hinting_available()?;
        self.check_unclaimed()?;
        let cmd_id = self.hinting.cmd_id();
        let result = self.hinting.sync();
        self.publish_hint_round(cmd_id, result)
    }

    /// Hints are of no use now: config space shows STOP, and the driver keeps its blocks.
    pub fn stop_hinting(&mut self) {
        let changes = self.hinting.stop();
        self.publish_changes(changes);
    }

    /// Hinted blocks are of no more use: config space shows DONE, and the driver takes them back.
    pub fn finish_hinting(&mut self) {
        let changes = self.hinting.done();
        self.publish_changes(changes);
    }

    /// The state of hinting.
    pub fn hinting_status(&self) -> HintingStatus {
        self.hinting.status()
    }

    /// The runs of pages that hints have spared, as (guest physical address, bytes): at most `limit` of those
    /// that end after the address `from`. How many there are is the guest's to say; hence the limit.
    pub fn hinted_ranges(&self, from: u64, limit: usize) -> Vec<(u64, u64)> {
        self.hinting.hinted_ranges(from, limit)
    }

    /// Guest memory, to be looked at without holding the device.
    pub fn ram(&self) -> Ram {
        self.ram.clone()
    }

    /// The state of the connection.
    pub fn virtio_status(&self) -> VirtioStatus {
        let none = Connection::default();
        let connection = self.connection.as_ref().unwrap_or(&none);
        let queues = self.negotiated_features.map_or_else(Vec::new, |features| {
            negotiated_queues(features)
                .zip(connection.counters)
                .enumerate()
                .map(|(index, (queue, counters))| {
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
            errors: self.guest_errors.total(),
            last_error: self.guest_errors.last().map(str::to_owned),
        }
    }

    /// The last statistics.
    pub fn stats(&self) -> StatsReport {
        StatsReport {
            values: self.stats.values().to_vec(),
            updated: self.stats.updated(),
            generation: self.stats.generation(),
        }
    }

    /// Asks the driver for new statistics, and says whether that was possible.
    pub fn request_stats(&mut self) -> bool {
        self.detect_driver_restart();
        if !self.is_running() {
            return false;
        }
        let features = self.negotiated_features.unwrap_or_default();
        let vring = Queue::Stats
            .index(features)
            .and_then(|index| self.connection.as_ref()?.vrings.get(index));
        let (Some(vring), Some(head)) = (vring, self.stats.take_buffer()) else {
            return false;
        };
        let requested = vring.add_used(head, 0).is_ok();
        if requested && vring.needs_notification().unwrap_or(true) {
            if let Err(error) = vring.signal_used_queue() {
                tracing::debug!("the driver was not asked for statistics: {error}");
            }
        }
        requested
    }

    /// Checks that no migration has hinting.
    ///
    /// # Errors
    ///
    /// If one has.
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

    /// Passes on what issuing an id has changed, also if it failed after it had ended a round.
    fn publish_hint_round(
        &mut self,
        before: shared_abi::command::CommandId,
        result: Result<super::HintingChanges, HintingError>,
    ) -> Result<HintId, HintingError> {
        let (changes, result) = match result {
            Ok(changes) => (changes, Ok(())),
            Err(error) => {
                let changed = before != self.hinting.cmd_id();
                (
                    super::HintingChanges {
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
