// SPDX-License-Identifier: GPL-2.0

//! The debugfs directories of a driver and its devices.
//!
//! The driver has a directory in the root of debugfs, with one directory for each device. The
//! directory of the driver must exist before the first device and after the last. Therefore the
//! module owns it ([`DriverDir`]), and devices find it in a static. The files themselves are those
//! of [`kernel::debugfs`]. In kernels without debugfs, none of this has an effect.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

use kernel::{
    debugfs::Dir,
    device,
    prelude::*,
    sync::{
        atomic::{Acquire, AtomicFlag, Relaxed, Release},
        global_lock,
    },
};

global_lock! {
    // SAFETY: `DriverDir::new` initialises the lock and sets `READY` afterwards. `device_dir` does
    // not use the lock before `READY` is set.
    unsafe(uninit) static DRIVER_DIR: Mutex<Option<Dir>> = None;
}

/// Whether the initialisation of [`static@DRIVER_DIR`] has begun.
static CLAIMED: AtomicFlag = AtomicFlag::new(false);
/// Whether [`static@DRIVER_DIR`] is initialised.
static READY: AtomicFlag = AtomicFlag::new(false);

/// The debugfs directory of the driver, which dropping this removes.
///
/// [`module_virtio_driver!`](crate::module_virtio_driver) creates it.
#[doc(alias = "debugfs_create_dir")]
pub struct DriverDir(());

impl DriverDir {
    /// Creates the directory `name` in the root of debugfs. If that fails, devices have no
    /// directory either.
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if the module has created one before.
    pub fn new(name: &'static CStr) -> Result<Self> {
        if CLAIMED.xchg(true, Relaxed) {
            return Err(EBUSY);
        }
        // SAFETY: `CLAIMED` ensures that the lock is initialised only once.
        unsafe { DRIVER_DIR.init() };
        READY.store(true, Release);
        *DRIVER_DIR.lock() = Some(Dir::new(name));
        Ok(Self(()))
    }
}

impl Drop for DriverDir {
    fn drop(&mut self) {
        // The directory is removed outside the lock.
        let dir = DRIVER_DIR.lock().take();
        drop(dir);
    }
}

/// Creates the debugfs directory of a device, with the name of the device. Returns `None` if the
/// driver has no directory.
///
/// The directory is removed when the `Dir` and all files in it have been dropped. May sleep.
#[doc(alias = "debugfs_create_dir")]
pub fn device_dir(device: &device::Device) -> Option<Dir> {
    if !READY.load(Acquire) {
        return None;
    }
    let dir = DRIVER_DIR.lock().clone()?;
    Some(dir.subdir(device.name()))
}
