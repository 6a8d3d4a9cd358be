// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Configuration space. The caller holds the device's lock.

use shared_abi::config;
use tracing::debug;

use super::Device;

impl Device {
    /// Reads configuration space. Its size depends on the negotiated features (R10), or on the
    /// offered ones before negotiation.
    ///
    /// A front end may read more, as QEMU's generic device does with its fixed size. The absent fields read as zeros.
    /// A read beyond the longest layout returns nothing.
    pub fn read_config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        self.detect_driver_restart();
        let cmd_id_offset = config::FREE_PAGE_HINT_CMD_ID as u64;
        let end = u64::from(offset) + u64::from(size);
        if let Some(connection) = &mut self.connection {
            connection.config_reads += 1;
            if u64::from(offset) <= cmd_id_offset
                && cmd_id_offset < end
                && connection.cmd_id_unread.take()
            {
                self.hinting_events.notify_all();
            }
        }
        self.config.free_page_hint_cmd_id = self.hinting.cmd_id().number();
        let mut bytes = self.config.to_bytes();
        if let Some(absent) = bytes.get_mut(self.config_size()..) {
            absent.fill(0);
        }
        let range = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(size).ok())
            .and_then(|(offset, size)| Some(offset..offset.checked_add(size)?));
        range
            .and_then(|range| bytes.get(range))
            .map_or_else(Vec::new, <[u8]>::to_vec)
    }

    /// Writes configuration space. Only the driver's fields change, and only those that exist
    /// under the negotiated features.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.detect_driver_restart();
        if let Some(connection) = &mut self.connection {
            connection.config_writes += 1;
        }
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let before = self.config;
        let fits = self.config_size().saturating_sub(offset);
        let data = data.get(..fits).unwrap_or(data);
        self.config = self.config.with_driver_write(offset, data);
        if self.config.poison_val != before.poison_val {
            debug!("driver set poison_val to {:#x}", self.config.poison_val);
        }
        if self.config.actual != before.actual {
            self.emit_balloon_change();
        }
    }

    fn config_size(&self) -> usize {
        config::size_for(self.negotiated_features.unwrap_or(self.offered_features))
    }
}
