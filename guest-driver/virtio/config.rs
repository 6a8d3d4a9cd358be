// SPDX-License-Identifier: GPL-2.0

//! Configuration space.
//!
//! [`Device::config`](super::Device::config) returns a [`Config`] handle, which reads and writes
//! [`Field`]s. A mutex serialises all access to one configuration space, and revokes it when the
//! device is unbound.
//!
//! C header: [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::bindings;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    dev_err, device, new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// A field of a configuration space layout.
#[derive(Clone, Copy)]
pub struct Field<T> {
    offset: u32,
    feature: Option<u32>,
    value: PhantomData<T>,
}

impl<T: ConfigValue> Field<T> {
    /// The maximum size of configuration space. The PCI transport maps this much.
    const MAX_SIZE: usize = 4096;

    /// Creates the field at `OFFSET` of a layout of `SIZE` bytes.
    ///
    /// Does not compile if the field is not within the layout, or is not aligned as the
    /// specification requires.
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

    /// Makes the field exist only if feature `bit` is negotiated.
    #[doc(alias = "virtio_cread_feature")]
    #[inline]
    pub const fn with_feature(mut self, bit: u32) -> Self {
        self.feature = Some(bit);
        self
    }

    /// Returns the offset of the first byte after the field.
    const fn end(&self) -> u32 {
        // Cannot overflow: the offset is at most `MAX_SIZE`, and a field has at most 8 bytes.
        self.offset + size_of::<T>() as u32
    }
}

/// A handle to the configuration space of a device.
///
/// Clones are the same handle. It works from [`Device::config`](super::Device::config) until the
/// device is unbound or shut down.
///
/// Some transports call `BUG_ON()` for an access beyond the end of configuration space. Therefore a
/// handle only gives access to [`Field`]s, which must exist with the negotiated features and be
/// within the size of the handle.
///
/// All methods require process context and may sleep: some transports send a message for each
/// access and wait for the reply.
#[doc(alias = "virtio_config_ops")]
#[derive(Clone)]
pub struct Config {
    space: Arc<ConfigSpace>,
    size: u32,
}

#[pin_data]
pub(super) struct ConfigSpace {
    #[pin]
    device: Mutex<Option<BoundDevice>>,
    /// The number of bytes that the transport gives access to, if it reports that.
    length: Option<u32>,
}

/// A device whose configuration space can be accessed.
///
/// # Invariants
///
/// The device is bound, and its transport gives access to configuration space.
struct BoundDevice(NonNull<bindings::virtio_device>);

// SAFETY: Any thread may call the configuration space operations of a transport.
unsafe impl Send for BoundDevice {}

impl ConfigSpace {
    /// Creates the access to the configuration space of `vdev`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the transport gives no access to configuration space. [`ENOMEM`].
    ///
    /// # Safety
    ///
    /// `vdev` must be a valid device, and remain valid until [`revoke`](Self::revoke) returns.
    pub(super) unsafe fn new(vdev: NonNull<bindings::virtio_device>) -> Result<Arc<Self>> {
        // SAFETY: By the safety requirements of this function, `vdev` is valid.
        if !unsafe { bindings::vbrs_virtio_has_config(vdev.as_ptr()) } {
            return Err(EINVAL);
        }
        // SAFETY: By the safety requirements of this function, `vdev` is valid.
        let length = unsafe { bindings::vbrs_virtio_config_length(vdev.as_ptr()) };
        // INVARIANT: The transport gives access, as checked above. By the safety requirements,
        // `revoke` is called before the device is unbound.
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
    /// [`EINVAL`] if the transport reports fewer bytes. This is logged.
    pub(super) fn handle(self: &Arc<Self>, size: usize) -> Result<Config> {
        let size = u32::try_from(size).map_err(|_| EINVAL)?;
        if let Some(length) = self.length.filter(|length| *length < size) {
            if let Some(device) = &*self.device.lock() {
                // SAFETY: By the type invariant of `BoundDevice`, the device is valid.
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

    /// Revokes the access. Waits for an access in progress.
    pub(super) fn revoke(&self) {
        *self.device.lock() = None;
    }
}

impl Config {
    /// Reads `field`. All bytes come from the same configuration generation.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the device was unbound. [`EINVAL`] if the field does not exist.
    #[doc(alias = "virtio_cread")]
    #[doc(alias = "virtio_cread_le")]
    #[doc(alias = "__virtio_cread_many")]
    pub fn read<T: ConfigValue>(&self, field: Field<T>) -> Result<T> {
        let device = self.space.device.lock();
        let vdev = self.try_access(device.as_ref(), &field)?;
        let mut bytes = T::Bytes::default();
        // SAFETY: By the type invariant of `BoundDevice`, the device is valid, and `try_access`
        // checked that the field exists. The buffer has the given size.
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
    #[doc(alias = "virtio_cwrite")]
    #[doc(alias = "virtio_cwrite_le")]
    pub fn write<T: ConfigValue>(&self, field: Field<T>, value: T) -> Result {
        let device = self.space.device.lock();
        let vdev = self.try_access(device.as_ref(), &field)?;
        let bytes = value.to_le();
        // SAFETY: By the type invariant of `BoundDevice`, the device is valid, and `try_access`
        // checked that the field exists. The buffer has the given size.
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

    /// Returns the device if it is still bound and the field exists.
    fn try_access<T: ConfigValue>(
        &self,
        device: Option<&BoundDevice>,
        field: &Field<T>,
    ) -> Result<*mut bindings::virtio_device> {
        let vdev = device.ok_or(ENODEV)?.0.as_ptr();
        let negotiated = field.feature.is_none_or(|bit| {
            // SAFETY: By the type invariant of `BoundDevice`, the device is valid. Its features do
            // not change while it is bound.
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

/// An integer type that a field of configuration space may have.
pub trait ConfigValue: sealed::Sealed + Copy {
    /// The bytes of the integer, least significant first.
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
