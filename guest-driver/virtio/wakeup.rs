// SPDX-License-Identifier: GPL-2.0

//! Keeping the system awake while an event of the device is being dealt with.
//!
//! C header: `include/linux/pm_wakeup.h`.

use kernel::prelude::*;
use kernel::static_lock_class;
use kernel::sync::{aref::ARef, Arc};

use super::compat::SpinLockIrq;
use super::Device;
use crate::bindings as helpers;

/// Keeps the system from falling asleep while events of a device are being dealt with.
///
/// An event that comes by an interrupt is [begun](Self::stay_awake) there and [taken up](Self::clear_event)
/// by the work that it starts; when no begun event is left and the work has nothing more to do, it
/// lets the system [rest](Self::relax). Has an effect only where user space has enabled the device's
/// `power/wakeup`, and does nothing in kernels that cannot sleep.
///
/// While this lives, the device is marked as capable of wakeup. All methods may be called in any
/// context but NMI; making and dropping it may sleep.
#[pin_data(PinnedDrop)]
pub struct Wakeup {
    dev: ARef<Device>,
    #[pin]
    state: SpinLockIrq<State>,
}

#[derive(Default)]
struct State {
    /// One bit for each event that was begun and not taken up.
    pending: u32,
    /// The system is kept awake.
    awake: bool,
}

impl Wakeup {
    /// Marks `dev` as capable of wakeup. Fails with `ENOMEM`.
    pub fn new(dev: ARef<Device>) -> Result<Arc<Self>> {
        let wakeup = pin_init!(Self {
            dev,
            state <- SpinLockIrq::new(State::default(), c"virtio::Wakeup", static_lock_class!()),
        });
        let wakeup = Arc::pin_init(wakeup, GFP_KERNEL)?;
        // SAFETY: The device is valid as long as there are references to it.
        unsafe { helpers::vbrs_set_wakeup_capable(wakeup.device(), true) };
        Ok(wakeup)
    }

    fn device(&self) -> *mut kernel::bindings::device {
        // SAFETY: The device is valid as long as there are references to it.
        unsafe { &raw mut (*self.dev.as_raw()).dev }
    }

    /// Event number `event` (0 to 31) has come: stay awake.
    pub fn stay_awake(&self, event: u32) {
        let mut state = self.state.lock();
        state.pending |= 1 << event;
        if !state.awake {
            state.awake = true;
            // SAFETY: As in `new`; may be called with a spin lock held.
            unsafe { helpers::vbrs_stay_awake(self.device()) };
        }
    }

    /// Event number `event` is being dealt with: if it comes again, it is another one.
    pub fn clear_event(&self, event: u32) {
        self.state.lock().pending &= !(1 << event);
    }

    /// The caller has nothing more to do: sleep is allowed, unless an event was begun meanwhile.
    pub fn relax(&self) {
        let mut state = self.state.lock();
        if state.awake && state.pending == 0 {
            state.awake = false;
            // SAFETY: As in `stay_awake`.
            unsafe { helpers::vbrs_relax(self.device()) };
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Wakeup {
    fn drop(self: Pin<&mut Self>) {
        self.state.lock().pending = 0;
        self.relax();
        // SAFETY: As in `new`.
        unsafe { helpers::vbrs_set_wakeup_capable(self.device(), false) };
    }
}
