// SPDX-License-Identifier: GPL-2.0

//! Drivers, and their adapter to the C bus.

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
/// ```ignore
/// struct Rng;
///
/// virtio_device_table!(ID_TABLE, [virtio::DeviceId::new(4)]);
///
/// #[vtable]
/// impl virtio::Driver for Rng {
///     type Data<'bound> = Data;
///     const ID_TABLE: virtio::IdTable = &ID_TABLE;
///
///     fn probe<'bound>(
///         dev: &'bound virtio::Device<Core<'_>>,
///     ) -> impl PinInit<Data, Error> + 'bound {
///         Data::bind(dev)
///     }
/// }
///
/// impl Data {
///     fn bind(dev: &virtio::Device<Core<'_>>) -> Result<Self> {
///         let input = virtio::Virtqueue::new(c"input")?;
///         let shared = Arc::new(Shared { input }, GFP_KERNEL)?;
///         dev.find_queues(&[&shared.input], shared.clone())?;
///         dev.ready();
///         Ok(Self(shared))
///     }
/// }
///
/// module_virtio_driver! {
///     type: Rng,
///     name: "rng",
///     authors: ["A. U. Thor"],
///     description: "...",
///     license: "GPL",
/// }
/// ```
#[vtable]
pub trait Driver {
    /// The driver's data for a device.
    type Data<'bound>: Send + Sync + 'bound;

    /// The devices that the driver is for.
    const ID_TABLE: IdTable;

    /// The feature bits that the driver knows, those of the transport excepted.
    const FEATURES: &'static [u32] = &[];

    /// Declines features, before they are final (`FEATURES_OK`).
    ///
    /// # Errors
    ///
    /// The device is then not bound.
    fn validate(features: &mut Negotiation<'_>) -> Result {
        let _ = features;
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Binds the device.
    ///
    /// If the initialiser fails, what it has initialised is dropped and then the device taken down.
    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// The device is about to be unbound.
    ///
    /// Here the driver stops what is not its data's alone to stop: work items, for example. It may
    /// wait for buffers to come back, and may [reset](Device::reset) the device to get them.
    /// Afterwards the bus takes the device down, if the driver has not, and drops the data.
    fn remove<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
    }

    /// The device's configuration has changed.
    ///
    /// Called between a successful probe and the removal, one call at a time, with interrupts off
    /// and a lock of the bus held: must not sleep, so must not read configuration space. A change
    /// that comes earlier is reported after the probe.
    fn config_changed<'bound>(dev: &'bound Device<Bound>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// The system is about to sleep. Afterwards the bus takes the device down, if the driver has
    /// not.
    ///
    /// Without this and [`restore`](Self::restore) the system refuses to sleep.
    ///
    /// # Errors
    ///
    /// The system then does not sleep.
    fn freeze<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) -> Result {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// The system has woken; features are negotiated as before, queues have to be found again.
    ///
    /// # Errors
    ///
    /// The device is marked as failed; it stays bound, its queues without rings.
    fn restore<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) -> Result {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// The system is about to stop, or to start another kernel.
    ///
    /// The data stays, and tasks may still run: here the driver ends what the kernel would call, and
    /// must not wait for the device, which may be silent. Afterwards the bus takes the device down,
    /// if the driver has not [reset](Device::reset) it: queues are without rings, and configuration
    /// space is out of reach.
    fn shutdown<'bound>(dev: &'bound Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        let _ = (dev, this);
        build_error!(VTABLE_DEFAULT_ERROR)
    }
}

/// The kind of device a driver is for.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceId(bindings::virtio_device_id);

impl DeviceId {
    /// All devices of type `device` (a `VIRTIO_ID_` number), whoever made them.
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

/// The table of the devices a driver is for; see
/// [`virtio_device_table!`](crate::virtio_device_table).
pub type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// Creates an [`IdTable`] and the module's aliases.
#[macro_export]
macro_rules! virtio_device_table {
    ($name:ident, [$($id:expr),* $(,)?]) => {
        $crate::__virtio_device_table!($name, [$($id),*]);
    };
}

/// Declares a kernel module that is a single virtio driver, with a
/// [folder in debugfs](crate::virtio::debugfs).
#[macro_export]
macro_rules! module_virtio_driver {
    (type: $type:ty, $($f:tt)*) => {
        #[::kernel::prelude::pin_data]
        struct DriverModule {
            // Dropped in this order: devices use the folder for as long as they have the driver.
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

/// Makes a [`Driver`] known to the C bus.
pub struct Adapter<T: Driver>(T);

// SAFETY: `struct virtio_driver` is a C type with a `struct device_driver` at the said offset, and
// the adapter stores a `T::Data` as the data of the device.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings::virtio_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(Self::DriverType, driver);
}

// SAFETY: A driver that was registered can be unregistered.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        vdrv: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        // SAFETY: Nobody else uses the structure before it is registered.
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

        // SAFETY: The structure is valid, and pinned until it is unregistered.
        to_result(unsafe { bindings::__register_virtio_driver(vdrv.get(), module.as_ptr()) })
    }

    unsafe fn unregister(vdrv: &Opaque<Self::DriverType>) {
        // SAFETY: The caller has registered it.
        unsafe { bindings::unregister_virtio_driver(vdrv.get()) };
    }
}

type IntCallback = Option<unsafe extern "C" fn(*mut bindings::virtio_device) -> c_int>;
type VoidCallback = Option<unsafe extern "C" fn(*mut bindings::virtio_device)>;

/// Constants, so that a callback that the driver has not is not compiled.
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
            // SAFETY: The bus calls with a valid device, which it is about to probe, and nobody
            // else changes features.
            T::validate(&mut unsafe { Negotiation::new(vdev) })?;
            Ok(0)
        })
    }

    extern "C" fn probe_callback(vdev: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            let raw = NonNull::new(vdev).ok_or(EINVAL)?;
            // SAFETY: The bus calls with a valid device, with which this is a bus callback.
            let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'_>>>() };
            // SAFETY: The device is being bound; `unbind` is called below or in `remove_callback`.
            let binding = unsafe { Binding::new(raw)? };
            // SAFETY: `priv` is the driver's. `Self::unbind` takes the binding back.
            unsafe { (*vdev).priv_ = KBox::into_raw(Pin::into_inner_unchecked(binding)).cast() };

            let result = dev.as_ref().set_drvdata(T::probe(dev));
            if result.is_err() {
                // SAFETY: The binding was stored above, and the driver is not called again.
                unsafe { Self::unbind(vdev) };
            }
            result.map(|()| 0)
        })
    }

    extern "C" fn remove_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus calls with a device that was probed, and removes it once.
        unsafe {
            let (dev, data) = Self::bound(vdev);
            T::remove(dev, data);
            Self::unbind(vdev);
        }
    }

    extern "C" fn config_changed_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus calls with a valid device, and only between the end of its probe and the
        // start of its removal: it holds `config_lock` and has found `config_core_enabled` set,
        // which it sets after the one and clears under the lock before the other.
        let dev = unsafe { &*vdev.cast::<Device<BoundInternal>>() };
        // SAFETY: As above, hence the data is there.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };
        T::config_changed(dev, data);
    }

    extern "C" fn freeze_callback(vdev: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            // SAFETY: The bus calls with a device that was probed.
            let (dev, data) = unsafe { Self::bound(vdev) };
            T::freeze(dev, data)?;
            dev.reset();
            Ok(0)
        })
    }

    extern "C" fn restore_callback(vdev: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            // SAFETY: The bus calls with a device that was probed.
            let (dev, data) = unsafe { Self::bound(vdev) };
            T::restore(dev, data).inspect_err(|_| dev.reset())?;
            Ok(0)
        })
    }

    extern "C" fn shutdown_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus calls with a device that was probed, under the device lock, and the
        // driver is still bound.
        let (dev, data) = unsafe { Self::bound(vdev) };
        T::shutdown(dev, data);
        dev.shut_down();
    }

    /// Returns the device and its data.
    ///
    /// # Safety
    ///
    /// Must be called in a callback of the bus that has process context, for a device that was
    /// probed and whose data was not dropped yet.
    unsafe fn bound<'a>(
        vdev: *mut bindings::virtio_device,
    ) -> (&'a Device<CoreInternal<'a>>, Pin<&'a T::Data<'a>>) {
        // SAFETY: By the requirement of this function.
        let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'a>>>() };
        // SAFETY: A successful probe has stored data of this type.
        let data =
            unsafe { AsRef::<device::Device<CoreInternal<'a>>>::as_ref(dev).drvdata_borrow() };
        (dev, data)
    }

    /// Takes the device down.
    ///
    /// # Safety
    ///
    /// `priv` of the device must be the binding that the probe stored, and the driver must not be
    /// called again.
    unsafe fn unbind(vdev: *mut bindings::virtio_device) {
        // SAFETY: By the requirement of this function.
        let binding = unsafe { (*vdev).priv_.cast::<Binding>() };
        // SAFETY: As above. Queue callbacks may still use it, hence by reference.
        unsafe { (*binding).unbind() };
        // SAFETY: No queue is left to call back, and `Core` devices do not outlive callbacks of the
        // bus.
        unsafe {
            (*vdev).priv_ = core::ptr::null_mut();
            drop(KBox::from_raw(binding));
        }
    }
}
