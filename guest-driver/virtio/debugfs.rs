// SPDX-License-Identifier: GPL-2.0

//! A driver's place in debugfs: a folder of its own, and in it one for each of its devices.
//!
//! The kernel crate's [`debugfs`](kernel::debugfs) does the work. What is missing there is who owns
//! the driver's folder: it must be there before the first device, and go after the last, so the
//! module owns it ([`DriverDir`]), and devices find it in a static. Without debugfs in the kernel all
//! of this is nothing.
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
    // SAFETY: `DriverDir::new` initialises it, and sets `READY` after that, without which nobody
    // touches it.
    unsafe(uninit) static DRIVER_DIR: Mutex<Option<Dir>> = None;
}

/// Somebody has begun to initialise [`DRIVER_DIR`].
static CLAIMED: AtomicFlag = AtomicFlag::new(false);
/// [`DRIVER_DIR`] is initialised.
static READY: AtomicFlag = AtomicFlag::new(false);

/// The folder of the module's driver, which goes when this is dropped.
///
/// [`module_virtio_driver!`](crate::module_virtio_driver) makes it.
pub struct DriverDir(());

impl DriverDir {
    /// Makes the folder `name` at the root of debugfs. If it cannot be made, devices have no folder
    /// either.
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if the module has made one before.
    pub fn new(name: &'static CStr) -> Result<Self> {
        if CLAIMED.xchg(true, Relaxed) {
            return Err(EBUSY);
        }
        // SAFETY: Only the first to come gets here.
        unsafe { DRIVER_DIR.init() };
        READY.store(true, Release);
        *DRIVER_DIR.lock() = Some(Dir::new(name));
        Ok(Self(()))
    }
}

impl Drop for DriverDir {
    fn drop(&mut self) {
        // Out of the lock, in which nothing but a pointer is moved.
        let dir = DRIVER_DIR.lock().take();
        drop(dir);
    }
}

/// Makes the folder of a device, named like the device, in that of the driver; `None` if the driver
/// has none.
///
/// The folder goes when the value is dropped and the files in it are gone. May sleep.
pub fn device_dir(device: &device::Device) -> Option<Dir> {
    if !READY.load(Acquire) {
        return None;
    }
    let dir = DRIVER_DIR.lock().clone()?;
    Some(dir.subdir(device.name()))
}
