// SPDX-License-Identifier: GPL-2.0

//! Wakeup events: keep the system awake while the driver handles an event of the device.
//!
//! C header: `include/linux/pm_wakeup.h`.

use kernel::prelude::*;
use kernel::static_lock_class;
use kernel::sync::{aref::ARef, Arc};

use super::compat::SpinLockIrq;
use super::Device;
use crate::bindings as helpers;

/// Keeps the system awake while the driver handles events of a device.
///
/// The interrupt handler reports an event with [`stay_awake`](Self::stay_awake). The work item for
/// the event calls [`clear_event`](Self::clear_event) when it starts, and [`relax`](Self::relax)
/// when it has no more work. The system may then sleep if no event is pending. All of this only has
/// an effect if user space has enabled the device's `power/wakeup`, and if the kernel supports
/// system sleep.
///
/// While a `Wakeup` exists, the device is marked as capable of wakeup. A spin lock that is held
/// with interrupts disabled protects the state. All methods may be called in any context but NMI.
/// Creating and dropping a `Wakeup` may sleep.
#[doc(alias = "wakeup_source")]
#[pin_data(PinnedDrop)]
pub struct Wakeup {
    dev: ARef<Device>,
    #[pin]
    state: SpinLockIrq<State>,
}

#[derive(Default)]
struct State {
    /// One bit for each pending event.
    pending: u32,
    /// Whether the system is kept awake.
    awake: bool,
}

impl Wakeup {
    /// Creates a `Wakeup`, and marks `dev` as capable of wakeup.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    #[doc(alias = "device_set_wakeup_capable")]
    pub fn new(dev: ARef<Device>) -> Result<Arc<Self>> {
        let wakeup = pin_init!(Self {
            dev,
            state <- SpinLockIrq::new(State::default(), c"virtio::Wakeup", static_lock_class!()),
        });
        let wakeup = Arc::pin_init(wakeup, GFP_KERNEL)?;
        // SAFETY: `wakeup` has a reference to the device, so the device is valid.
        unsafe { helpers::vbrs_set_wakeup_capable(wakeup.device(), true) };
        Ok(wakeup)
    }

    fn device(&self) -> *mut kernel::bindings::device {
        // SAFETY: `self` has a reference to the device, so the device is valid.
        unsafe { &raw mut (*self.dev.as_raw()).dev }
    }

    /// Marks event `event` (0 to 31) as pending, and keeps the system awake.
    #[doc(alias = "pm_stay_awake")]
    pub fn stay_awake(&self, event: u32) {
        let mut state = self.state.lock();
        state.pending |= 1 << event;
        if !state.awake {
            state.awake = true;
            // SAFETY: `self` has a reference to the device, so the device is valid.
            // `pm_stay_awake()` may be called with a spin lock held.
            unsafe { helpers::vbrs_stay_awake(self.device()) };
        }
    }

    /// Clears the pending event `event`. If it occurs again, it is a new event.
    pub fn clear_event(&self, event: u32) {
        self.state.lock().pending &= !(1 << event);
    }

    /// Lets the system sleep, unless an event is pending.
    #[doc(alias = "pm_relax")]
    pub fn relax(&self) {
        let mut state = self.state.lock();
        if state.awake && state.pending == 0 {
            state.awake = false;
            // SAFETY: `self` has a reference to the device, so the device is valid. `pm_relax()`
            // may be called with a spin lock held.
            unsafe { helpers::vbrs_relax(self.device()) };
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Wakeup {
    fn drop(self: Pin<&mut Self>) {
        self.state.lock().pending = 0;
        self.relax();
        // SAFETY: `self` has a reference to the device, so the device is valid.
        unsafe { helpers::vbrs_set_wakeup_capable(self.device(), false) };
    }
}
