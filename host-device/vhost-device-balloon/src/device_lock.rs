// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lock of the device. Its holders work in small steps, and it is given to waiting threads in their order, so that
//! a command of a QMP client waits for a few steps at most, whatever the guest does.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use guest_migration::dirty_tracking::Quiesce;
use shared_abi::command::HintId;
use tracing::debug;

use crate::device::hinting::{FreshBitmap, HintingError};
use crate::device::{Device, Retired};
use crate::fair_mutex::{FairGuard, FairMutex};
use crate::sync::Lock;
use crate::vring::Interrupt;

/// A device, and the lock that protects it.
#[derive(Debug)]
pub struct DeviceLock(FairMutex<Device>);

/// Holds the device's lock. Dropping it gives the lock to the next thread, then sends the interrupts of the driver, and
/// frees the memory that the device has retired.
#[derive(Debug)]
#[must_use = "dropping it unlocks the device"]
pub struct DeviceGuard<'a> {
    device: FairGuard<'a, Device>,
    // Sent after the guard above has unlocked the device: a malicious front end can make this wait.
    interrupts: Interrupts,
    // Freed after the guard above has unlocked the device: this takes time for each page of guest memory.
    retired: Vec<Retired>,
}

impl DeviceLock {
    /// Creates the lock of `device`.
    pub fn new(device: Device) -> Self {
        Self(FairMutex::new(device))
    }

    /// Waits for the threads that asked before, and locks the device.
    pub fn lock(&self) -> DeviceGuard<'_> {
        DeviceGuard {
            device: self.0.lock(),
            interrupts: Interrupts::default(),
            retired: Vec::new(),
        }
    }

    /// Starts a hint round with all pages dirty, and returns its id. Cancels a hint round in progress. Takes time for
    /// each page of guest memory, but does not hold the lock meanwhile.
    ///
    /// # Errors
    ///
    /// If the driver cannot answer, a migration has claimed hinting, guest memory cannot be tracked or changes
    /// meanwhile, or no id is free.
    pub fn start_hinting(&self) -> Result<HintId, HintingError> {
        let ram = self.lock().check_hinting_startable()?;
        let fresh = FreshBitmap::new(ram)?;
        self.lock().start_hinting_with(fresh)
    }
}

impl Lock for DeviceLock {
    type Guard<'a> = DeviceGuard<'a>;

    fn acquire(&self) -> DeviceGuard<'_> {
        self.lock()
    }
}

impl Deref for DeviceGuard<'_> {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

impl DerefMut for DeviceGuard<'_> {
    fn deref_mut(&mut self) -> &mut Device {
        &mut self.device
    }
}

impl Drop for DeviceGuard<'_> {
    fn drop(&mut self) {
        self.retired = self.device.take_retired();
        self.interrupts.0 = self.device.take_interrupts();
    }
}

/// Interrupts of the driver. Dropping them sends them.
#[derive(Debug, Default)]
struct Interrupts(Vec<Interrupt>);

impl Drop for Interrupts {
    fn drop(&mut self) {
        for interrupt in &self.0 {
            if let Err(error) = interrupt.send() {
                debug!("interrupt to the driver failed: {error}");
            }
        }
    }
}

/// Keeps the device from writing to guest memory: it does so only under its lock.
#[derive(Debug)]
pub struct QuiescedDevice(pub Arc<DeviceLock>);

impl Quiesce for QuiescedDevice {
    fn with_quiesced(&self, action: &mut dyn FnMut()) {
        let _held = self.0.lock();
        action();
    }
}
