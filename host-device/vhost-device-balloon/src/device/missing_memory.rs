// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why the device does not know guest memory.

use super::Device;

/// Why the device does not know guest memory. A VMM shares it when the driver starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum MissingMemory {
    /// No front end is connected.
    #[error("no front end has shared guest memory: none is connected; start the VMM with this device's socket")]
    NoFrontEnd,
    /// A front end is connected, and no driver has accepted features.
    #[error("front end is connected and no driver has started: load the balloon driver in the guest, or resume the guest if it is paused")]
    NoDriver,
    /// A driver has accepted features, and the front end shares no memory.
    #[error("front end is connected and shares no guest memory: start the VMM with shared memory, such as QEMU's memory-backend-memfd with share=on")]
    NotShared,
}

impl Device {
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
}
