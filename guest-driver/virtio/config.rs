// SPDX-License-Identifier: GPL-2.0

//! Configuration space.

use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// A handle to the configuration space of a device.
///
/// Its clones are the same handle. It works from [`Device::config`](super::Device::config) until
/// the device is unbound.
///
/// Every method needs process context and may sleep: transports read configuration space by
/// messages, and some wait for the answer.
#[derive(Clone)]
pub struct Config(Arc<Space>);

#[pin_data]
struct Space {
    #[pin]
    device: Mutex<Option<BoundDevice>>,
}

/// # Invariants
///
/// The device is bound and its transport gives access to configuration space.
struct BoundDevice(NonNull<bindings::virtio_device>);

// SAFETY: The operations of a transport on configuration space may be called from any thread.
unsafe impl Send for BoundDevice {}

impl Config {
    /// Creates a handle for `vdev`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the transport gives no access to configuration space, [`ENOMEM`].
    ///
    /// # Safety
    ///
    /// `vdev` must be a valid device, and remain so until [`revoke`](Self::revoke) returns.
    pub(super) unsafe fn new(vdev: NonNull<bindings::virtio_device>) -> Result<Self> {
        // SAFETY: `vdev` is valid by the requirement of this function.
        if !unsafe { bindings::vbrs_virtio_has_config(vdev.as_ptr()) } {
            return Err(EINVAL);
        }
        // INVARIANT: Asked just above; whoever unbinds the device calls `revoke` first.
        let device = Some(BoundDevice(vdev));
        let space = pin_init!(Space {
            device <- new_mutex!(device, "virtio::Config"),
        });
        Ok(Self(Arc::pin_init(space, GFP_KERNEL)?))
    }

    /// Ends the access. Waits for one in progress.
    pub(super) fn revoke(&self) {
        *self.0.device.lock() = None;
    }

    /// Reads the little-endian field at `offset`, so that all of its bytes are of one generation.
    ///
    /// The caller answers for the field's existence: which fields there are follows from the
    /// negotiated features, and some transports stop the kernel (`BUG_ON`) at an access beyond the
    /// end.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the device was unbound.
    pub fn read_le<T: ConfigValue>(&self, offset: u32) -> Result<T> {
        let device = self.0.device.lock();
        let vdev = device.as_ref().ok_or(ENODEV)?.0.as_ptr();
        let mut bytes = T::Bytes::default();
        // SAFETY: By the invariant of `BoundDevice`; the buffer is as long as said.
        unsafe {
            bindings::vbrs_virtio_config_read(
                vdev,
                offset,
                (&raw mut bytes).cast(),
                size_of::<T::Bytes>() as u32,
            )
        };
        Ok(T::from_le(bytes))
    }

    /// Writes the little-endian field at `offset`. As with [`read_le`](Self::read_le), the field
    /// must exist.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the device was unbound.
    pub fn write_le<T: ConfigValue>(&self, offset: u32, value: T) -> Result {
        let device = self.0.device.lock();
        let vdev = device.as_ref().ok_or(ENODEV)?.0.as_ptr();
        let bytes = value.to_le();
        // SAFETY: By the invariant of `BoundDevice`; the buffer is as long as said.
        unsafe {
            bindings::vbrs_virtio_config_write(
                vdev,
                offset,
                (&raw const bytes).cast(),
                size_of::<T::Bytes>() as u32,
            )
        };
        Ok(())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An integer that configuration space may hold.
pub trait ConfigValue: sealed::Sealed + Sized {
    /// Its bytes, least significant first.
    type Bytes: Default;

    #[doc(hidden)]
    fn from_le(bytes: Self::Bytes) -> Self;

    #[doc(hidden)]
    fn to_le(self) -> Self::Bytes;
}

macro_rules! config_value {
    ($($int:ty),*) => {$(
        impl sealed::Sealed for $int {}

        impl ConfigValue for $int {
            type Bytes = [u8; size_of::<$int>()];

            fn from_le(bytes: Self::Bytes) -> Self {
                Self::from_le_bytes(bytes)
            }

            fn to_le(self) -> Self::Bytes {
                self.to_le_bytes()
            }
        }
    )*};
}

config_value!(u8, u16, u32, u64);
