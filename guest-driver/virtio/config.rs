// SPDX-License-Identifier: GPL-2.0

//! Configuration space.

use crate::bindings;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    dev_err, device, new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// A field of the configuration space of a kind of device.
#[derive(Clone, Copy)]
pub struct Field<T> {
    offset: u32,
    feature: Option<u32>,
    value: PhantomData<T>,
}

impl<T: ConfigValue> Field<T> {
    /// The largest configuration space: what the PCI transport maps of one.
    const MAX_SIZE: usize = 4096;

    /// The field at `OFFSET` of a layout of `SIZE` bytes.
    ///
    /// Does not compile if the field is not within the layout, or not aligned as the specification
    /// demands of accesses to it.
    pub const fn new<const OFFSET: usize, const SIZE: usize>() -> Self {
        const {
            let width = size_of::<T>();
            assert!(SIZE <= Self::MAX_SIZE);
            assert!(OFFSET <= SIZE && width <= SIZE - OFFSET);
            assert!(OFFSET % if width < 4 { width } else { 4 } == 0);
        }
        Self {
            offset: OFFSET as u32,
            feature: None,
            value: PhantomData,
        }
    }

    /// The same field, there only if feature `bit` is negotiated.
    pub const fn with_feature(mut self, bit: u32) -> Self {
        self.feature = Some(bit);
        self
    }

    /// The offset of what follows.
    const fn end(&self) -> u32 {
        // Both are at most `MAX_SIZE`.
        self.offset + size_of::<T>() as u32
    }
}

/// A handle to the configuration space of a device.
///
/// Its clones are the same handle. It works from [`Device::config`](super::Device::config) until
/// the device is unbound or shut down.
///
/// Some transports stop the kernel (`BUG_ON`) at an access beyond the end of what the device has.
/// So a handle reaches [`Field`]s only, those that the negotiated features bring, and within the
/// size for which it was made.
///
/// Every method needs process context and may sleep: transports read configuration space by
/// messages, and some wait for the answer.
#[derive(Clone)]
pub struct Config {
    space: Arc<ConfigSpace>,
    size: u32,
}

#[pin_data]
pub(super) struct ConfigSpace {
    #[pin]
    device: Mutex<Option<BoundDevice>>,
    /// How many bytes the transport gives access to, if it says so.
    length: Option<u32>,
}

/// # Invariants
///
/// The device is bound and its transport gives access to configuration space.
struct BoundDevice(NonNull<bindings::virtio_device>);

// SAFETY: The operations of a transport on configuration space may be called from any thread.
unsafe impl Send for BoundDevice {}

impl ConfigSpace {
    /// Creates the access to configuration space of `vdev`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the transport gives no access to configuration space, [`ENOMEM`].
    ///
    /// # Safety
    ///
    /// `vdev` must be a valid device, and remain so until [`revoke`](Self::revoke) returns.
    pub(super) unsafe fn new(vdev: NonNull<bindings::virtio_device>) -> Result<Arc<Self>> {
        // SAFETY: `vdev` is valid by the requirement of this function.
        if !unsafe { bindings::vbrs_virtio_has_config(vdev.as_ptr()) } {
            return Err(EINVAL);
        }
        // SAFETY: As above.
        let length = unsafe { bindings::vbrs_virtio_config_length(vdev.as_ptr()) };
        // INVARIANT: Asked just above; whoever unbinds the device calls `revoke` first.
        let device = Some(BoundDevice(vdev));
        let space = pin_init!(Self {
            device <- new_mutex!(device, "virtio::ConfigSpace"),
            length: (length > 0).then_some(length),
        });
        Arc::pin_init(space, GFP_KERNEL)
    }

    /// Creates a handle to the first `size` bytes.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if there are not so many, which is worth a line in the log.
    pub(super) fn handle(self: &Arc<Self>, size: usize) -> Result<Config> {
        let size = u32::try_from(size).map_err(|_| EINVAL)?;
        if let Some(length) = self.length.filter(|length| *length < size) {
            if let Some(device) = &*self.device.lock() {
                // SAFETY: By the invariant of `BoundDevice` it is valid.
                let device: &device::Device =
                    unsafe { device::Device::from_raw(&raw mut (*device.0.as_ptr()).dev) };
                dev_err!(
                    device,
                    "config space: {length} bytes, the negotiated features need {size}; \
                     correct the device or withhold the features\n"
                );
            }
            return Err(EINVAL);
        }
        Ok(Config {
            space: self.clone(),
            size,
        })
    }

    /// Ends the access. Waits for one in progress.
    pub(super) fn revoke(&self) {
        *self.device.lock() = None;
    }
}

impl Config {
    /// Reads `field`, so that all of its bytes are of one generation.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the device was unbound, [`EINVAL`] if it has no such field.
    pub fn read<T: ConfigValue>(&self, field: Field<T>) -> Result<T> {
        let device = self.space.device.lock();
        let vdev = self.try_access(device.as_ref(), &field)?;
        let mut bytes = T::Bytes::default();
        // SAFETY: By the invariant of `BoundDevice`, and the field is there; the buffer is as long
        // as said.
        unsafe {
            bindings::vbrs_virtio_config_read(
                vdev,
                field.offset,
                (&raw mut bytes).cast(),
                size_of::<T::Bytes>() as u32,
            )
        };
        Ok(T::from_le(bytes))
    }

    /// Writes `field`.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn write<T: ConfigValue>(&self, field: Field<T>, value: T) -> Result {
        let device = self.space.device.lock();
        let vdev = self.try_access(device.as_ref(), &field)?;
        let bytes = value.to_le();
        // SAFETY: As in `read`.
        unsafe {
            bindings::vbrs_virtio_config_write(
                vdev,
                field.offset,
                (&raw const bytes).cast(),
                size_of::<T::Bytes>() as u32,
            )
        };
        Ok(())
    }

    /// Returns the device if it is there and has the field.
    fn try_access<T: ConfigValue>(
        &self,
        device: Option<&BoundDevice>,
        field: &Field<T>,
    ) -> Result<*mut bindings::virtio_device> {
        let vdev = device.ok_or(ENODEV)?.0.as_ptr();
        let negotiated = field.feature.is_none_or(|bit| {
            // SAFETY: By the invariant of `BoundDevice`; features do not change while it is bound.
            unsafe { bindings::vbrs_virtio_has_feature(vdev, bit) }
        });
        if negotiated && field.end() <= self.size {
            Ok(vdev)
        } else {
            Err(EINVAL)
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An integer that configuration space may hold.
pub trait ConfigValue: sealed::Sealed + Copy {
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
