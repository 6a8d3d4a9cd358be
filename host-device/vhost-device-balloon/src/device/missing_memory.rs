// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why the device does not know guest memory.

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
