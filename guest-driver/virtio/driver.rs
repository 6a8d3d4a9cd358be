// SPDX-License-Identifier: GPL-2.0

//! Virtio drivers, and their adapter to the C bus.
//!
//! [`Adapter`] implements the callbacks of `struct virtio_driver` for a [`Driver`]. It owns the
//! `Binding` of each device, from before `probe` until after `remove`.
//!
//! C header: [`include/linux/virtio.h`](srctree/include/linux/virtio.h)

use super::{
    binding::Binding,
    compat::{not_supported, BoundInternal},
    device::{Device, Negotiation},
};
use crate::bindings;
use core::{mem::offset_of, pin::Pin, ptr::NonNull};
use kernel::{
    device::{self, Bound, Core, CoreInternal},
    device_id::RawDeviceId,
    driver,
    error::{from_result, to_result, VTABLE_DEFAULT_ERROR},
    prelude::*,
    types::Opaque,
    ThisModule,
};

/// A virtio driver.
///
/// # Examples
///
/// The sample driver, `guest-driver/samples/virtio_rng.rs`:
///
/// ```ignore
#[doc = include_str!("../samples/virtio_rng.rs")]
/// ```
#[doc(alias = "virtio_driver")]
#[vtable]
pub trait Driver {
    /// The private data of the driver for a device.
    type Data<'bound>: Send + Sync + 'bound;

    /// The devices that the driver supports.
    const ID_TABLE: IdTable;

    /// The feature bits that the driver supports, without those of the transport.
    #[doc(alias = "feature_table")]
    const FEATURES: &'static [u32] = &[];

    /// Declines features before they are final (`FEATURES_OK`).
    ///
    /// # Errors
    ///
    /// If this fails, the device is not bound.
    fn validate(features: &mut Negotiation<'_>) -> Result {
        let _ = features;
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Binds the driver to the device.
    ///
    /// If the initialiser fails, its initialised fields are dropped first. Then the bus resets the
    /// device.
    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// Called before the device is unbound.
    ///
    /// The driver stops its work items, and everything else that dropping the data does not stop.
    /// It may wait for used buffers, and may [reset](Device::reset) the device to get them back.
    /// Afterwards the bus resets the device, if the driver has not, and drops the data.
    fn remove<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
    }

    /// Called when the configuration of the device has changed.
    ///
    /// Called only between a successful `probe` and `remove`, one call at a time. The bus holds a
    /// lock with interrupts disabled: must not sleep, and therefore must not read configuration
    /// space. The bus reports an earlier change after the `probe`.
    fn config_changed<'bound>(dev: &'bound Device<Bound>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called before the system sleeps. Afterwards the bus resets the device, if the driver has
    /// not.
    ///
    /// If a driver does not implement both this method and [`restore`](Self::restore), the system
    /// cannot sleep.
    ///
    /// # Errors
    ///
    /// If this fails, the system does not sleep.
    fn freeze<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) -> Result {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called after the system has slept. Features are already negotiated, with the same result.
    /// The driver must find its virtqueues again.
    ///
    /// # Errors
    ///
    /// If this fails, the bus marks the device as failed. The device remains bound, and its queues
    /// have no rings.
    fn restore<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) -> Result {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called before the system stops, or before kexec starts another kernel.
    ///
    /// The data is not dropped, and tasks may still run. The driver unregisters its callbacks from
    /// the kernel. It must not wait for the device, which may not answer. Afterwards the bus resets
    /// the device, if the driver has not [reset](Device::reset) it: the queues then have no rings,
    /// and access to configuration space is revoked.
    fn shutdown<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }
}

/// The device id of a device type that a driver supports.
#[doc(alias = "virtio_device_id")]
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceId(bindings::virtio_device_id);

impl DeviceId {
    /// Creates an id that matches all devices of type `device` (a `VIRTIO_ID_` number), from any
    /// vendor.
    #[doc(alias = "VIRTIO_DEV_ANY_ID")]
    #[inline]
    pub const fn new(device: u32) -> Self {
        Self(bindings::virtio_device_id {
            device,
            vendor: bindings::VIRTIO_DEV_ANY_ID,
        })
    }
}

// SAFETY: `DeviceId` is a transparent wrapper of `struct virtio_device_id`.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::virtio_device_id;
}

/// A table of the device ids that a driver supports: see
/// [`virtio_device_table!`](crate::virtio_device_table).
#[doc(alias = "virtio_device_id")]
#[doc(alias = "id_table")]
pub type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// Creates an [`IdTable`], and the module aliases for it.
#[macro_export]
macro_rules! virtio_device_table {
    ($name:ident, [$($id:expr),* $(,)?]) => {
        $crate::__virtio_device_table!($name, [$($id),*]);
    };
}

/// Declares a kernel module that consists of one virtio driver. The driver has a [directory in
/// debugfs](crate::virtio::debugfs).
#[macro_export]
macro_rules! module_virtio_driver {
    (type: $type:ty, $($f:tt)*) => {
        #[::kernel::prelude::pin_data]
        struct DriverModule {
            // Dropped in this order: bound devices use the directory, and create work queues.
            #[pin]
            _driver: ::kernel::driver::Registration<$crate::virtio::Adapter<$type>>,
            _work: $crate::virtio::work::ModuleExit,
            _debugfs_dir: $crate::virtio::debugfs::DriverDir,
        }

        impl ::kernel::InPlaceModule for DriverModule {
            fn init(
                module: &'static ::kernel::ThisModule,
            ) -> impl ::pin_init::PinInit<Self, ::kernel::error::Error> {
                let name = <Self as ::kernel::ModuleMetadata>::NAME;
                ::kernel::try_pin_init!(Self {
                    _debugfs_dir: $crate::virtio::debugfs::DriverDir::new(name)?,
                    _work: $crate::virtio::work::ModuleExit::new(),
                    _driver <- ::kernel::driver::Registration::new(name, module),
                })
            }
        }

        ::kernel::prelude::module! {
            type: DriverModule,
            $($f)*
        }
    };
}

/// Registers a [`Driver`] with the C bus.
#[doc(alias = "register_virtio_driver")]
#[doc(alias = "__register_virtio_driver")]
#[doc(alias = "unregister_virtio_driver")]
pub struct Adapter<T: Driver>(T);

// SAFETY: `struct virtio_driver` contains a `struct device_driver` at this offset, and the adapter
// stores a `T::Data` as the driver data of the device.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings::virtio_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(Self::DriverType, driver);
}

// SAFETY: `unregister` ends a registration by `register`.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        vdrv: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        // SAFETY: No other code uses the structure before it is registered.
        let driver = unsafe { &mut *vdrv.get() };
        driver.driver.name = name.as_char_ptr();
        driver.id_table = T::ID_TABLE.as_ptr();
        driver.feature_table = T::FEATURES.as_ptr();
        driver.feature_table_size = T::FEATURES.len() as c_uint;
        driver.validate = Self::VALIDATE;
        driver.probe = Some(Self::probe_callback);
        driver.remove = Some(Self::remove_callback);
        driver.config_changed = Self::CONFIG_CHANGED;
        driver.freeze = Self::FREEZE;
        driver.restore = Self::RESTORE;
        driver.shutdown = Self::SHUTDOWN;

        // SAFETY: The structure is initialised, and pinned until it is unregistered.
        to_result(unsafe { bindings::__register_virtio_driver(vdrv.get(), module.as_ptr()) })
    }

    unsafe fn unregister(vdrv: &Opaque<Self::DriverType>) {
        // SAFETY: By the safety requirements of this function, the structure is registered.
        unsafe { bindings::unregister_virtio_driver(vdrv.get()) };
    }
}

type IntCallback = Option<unsafe extern "C" fn(*mut bindings::virtio_device) -> c_int>;
type VoidCallback = Option<unsafe extern "C" fn(*mut bindings::virtio_device)>;

/// The optional callbacks. They are constants, so that callbacks that the driver does not implement
/// are not compiled.
impl<T: Driver> Adapter<T> {
    const VALIDATE: IntCallback = if T::HAS_VALIDATE {
        Some(Self::validate_callback)
    } else {
        None
    };
    const CONFIG_CHANGED: VoidCallback = if T::HAS_CONFIG_CHANGED {
        Some(Self::config_changed_callback)
    } else {
        None
    };
    const SUPPORTS_SUSPEND: bool = T::HAS_FREEZE && T::HAS_RESTORE;
    const FREEZE: IntCallback = if Self::SUPPORTS_SUSPEND {
        Some(Self::freeze_callback)
    } else {
        Some(Self::refuse_callback)
    };
    const RESTORE: IntCallback = if Self::SUPPORTS_SUSPEND {
        Some(Self::restore_callback)
    } else {
        Some(Self::refuse_callback)
    };
    const SHUTDOWN: VoidCallback = if T::HAS_SHUTDOWN {
        Some(Self::shutdown_callback)
    } else {
        None
    };
}

impl<T: Driver> Adapter<T> {
    extern "C" fn refuse_callback(_vdev: *mut bindings::virtio_device) -> c_int {
        not_supported().to_errno()
    }

    extern "C" fn validate_callback(vdev: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            let vdev = NonNull::new(vdev).ok_or(EINVAL)?;
            // SAFETY: The bus passes a valid device that it is about to probe, and no other code
            // changes its features.
            T::validate(&mut unsafe { Negotiation::new(vdev) })?;
            Ok(0)
        })
    }

    extern "C" fn probe_callback(vdev: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            let raw = NonNull::new(vdev).ok_or(EINVAL)?;
            // SAFETY: The bus passes a valid device to this bus callback.
            let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'_>>>() };
            // SAFETY: The device is being bound. `unbind` is called below if `probe` fails, or in
            // `remove_callback`.
            let binding = unsafe { Binding::new(raw)? };
            // SAFETY: `priv` belongs to the driver. `Self::unbind` converts the pointer back and
            // frees the binding.
            unsafe { (*vdev).priv_ = KBox::into_raw(Pin::into_inner_unchecked(binding)).cast() };

            let result = dev.as_ref().set_drvdata(T::probe(dev));
            if result.is_err() {
                // SAFETY: The binding was stored in `priv` above. The driver is not called again.
                unsafe { Self::unbind(vdev) };
            }
            result.map(|()| 0)
        })
    }

    extern "C" fn remove_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus passes a probed device, and removes it only once.
        unsafe {
            let (dev, data) = Self::bound(vdev);
            T::remove(dev, data);
            Self::unbind(vdev);
        }
    }

    extern "C" fn config_changed_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus passes a valid device, between the end of `probe` and the start of
        // `remove`: it holds `config_lock` and has checked `config_core_enabled`. It sets this flag
        // after `probe`, and clears it under the lock before `remove`.
        let dev = unsafe { &*vdev.cast::<Device<BoundInternal>>() };
        // SAFETY: `probe` has succeeded and `remove` has not begun, as above, so the driver data
        // exists.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };
        T::config_changed(dev, data);
    }

    extern "C" fn freeze_callback(vdev: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            // SAFETY: The bus passes a probed device.
            let (dev, data) = unsafe { Self::bound(vdev) };
            T::freeze(dev, data)?;
            dev.reset();
            Ok(0)
        })
    }

    extern "C" fn restore_callback(vdev: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            // SAFETY: The bus passes a probed device.
            let (dev, data) = unsafe { Self::bound(vdev) };
            T::restore(dev, data).inspect_err(|_| dev.reset())?;
            Ok(0)
        })
    }

    extern "C" fn shutdown_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus passes a probed device and holds the device lock, so the driver remains
        // bound.
        let (dev, data) = unsafe { Self::bound(vdev) };
        T::shutdown(dev, data);
        dev.shut_down();
    }

    /// Returns the device and its driver data.
    ///
    /// # Safety
    ///
    /// Must be called in a bus callback with process context. The device must have been probed, and
    /// its driver data must not have been dropped.
    unsafe fn bound<'a>(
        vdev: *mut bindings::virtio_device,
    ) -> (&'a Device<CoreInternal<'a>>, Pin<&'a T::Data<'a>>) {
        // SAFETY: By the safety requirements of this function, `vdev` is a valid device in a bus
        // callback.
        let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'a>>>() };
        // SAFETY: A successful `probe` has stored driver data of this type. By the safety
        // requirements of this function, it has not been dropped.
        let data =
            unsafe { AsRef::<device::Device<CoreInternal<'a>>>::as_ref(dev).drvdata_borrow() };
        (dev, data)
    }

    /// Unbinds the device and frees its binding.
    ///
    /// # Safety
    ///
    /// `priv` of the device must be the binding that `probe_callback` stored, and the driver must
    /// not be called again.
    unsafe fn unbind(vdev: *mut bindings::virtio_device) {
        // SAFETY: By the safety requirements of this function, `vdev` is valid and `priv` is its
        // binding.
        let binding = unsafe { (*vdev).priv_.cast::<Binding>() };
        // SAFETY: By the safety requirements of this function, the binding is valid. Queue
        // callbacks may still use it, so this does not take ownership yet.
        unsafe { (*binding).unbind() };
        // SAFETY: No queue is left that could call back, and `Core` devices do not outlive bus
        // callbacks. The binding was created from a box.
        unsafe {
            (*vdev).priv_ = core::ptr::null_mut();
            drop(KBox::from_raw(binding));
        }
    }
}
