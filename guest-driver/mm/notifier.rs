// SPDX-License-Identifier: GPL-2.0

//! Being told by the kernel: of memory that goes offline, of the system's sleep.
//!
//! C headers: `include/linux/notifier.h`, `include/linux/memory.h`, `include/linux/suspend.h`.

use core::marker::PhantomData;
use core::ops::Range;
use core::pin::Pin;

use kernel::bindings;
use kernel::container_of;
use kernel::error::to_result;
use kernel::ffi::{c_int, c_ulong, c_void};
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

use crate::bindings as helpers;

/// Something that holds pages in memory that may be taken away.
pub trait OnMemoryOffline: Send + Sync {
    /// The memory at these physical addresses is about to go offline. No page of it is given out any
    /// more; those that are held in it, and can be, should be given back now. If any is left, the
    /// memory stays.
    ///
    /// May sleep, for a limited time.
    fn going_offline(self: &Arc<Self>, range: Range<u64>);
}

/// Something that holds pages which the system needs to go to sleep.
pub trait OnSystemSleep: Send + Sync {
    /// The system is about to be suspended or hibernated, or to make place for a hibernated one.
    /// Everything still runs. May sleep, for a limited time.
    fn prepare_sleep(self: &Arc<Self>);

    /// Everything runs again, slept or not. Comes after each [`prepare_sleep`](Self::prepare_sleep). May sleep.
    fn post_sleep(self: &Arc<Self>);
}

mod sealed {
    use super::*;

    /// A chain of notifiers.
    pub trait Chain<T> {
        /// Registers a block. Returns 0 or an error number.
        ///
        /// # Safety
        ///
        /// `block` must be initialised, and stay where it is until it is unregistered.
        unsafe fn register(block: *mut bindings::notifier_block) -> c_int;

        /// Takes the registration back, and waits for calls that are under way.
        ///
        /// # Safety
        ///
        /// `block` must be registered.
        unsafe fn unregister(block: *mut bindings::notifier_block);

        /// Passes a call on.
        ///
        /// # Safety
        ///
        /// `argument` must be what this chain calls with for `action`.
        unsafe fn call(data: &Arc<T>, action: c_ulong, argument: *mut c_void);
    }
}

use sealed::Chain;

/// The chain for memory that goes offline and comes online.
pub struct MemoryHotplug(());

/// The chain for the system's sleep.
pub struct SystemSleep(());

impl<T: OnMemoryOffline> Chain<T> for MemoryHotplug {
    unsafe fn register(block: *mut bindings::notifier_block) -> c_int {
        // SAFETY: As this function requires.
        unsafe { helpers::vbrs_register_memory_notifier(block) }
    }

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        // SAFETY: As this function requires.
        unsafe { helpers::vbrs_unregister_memory_notifier(block) };
    }

    unsafe fn call(data: &Arc<T>, action: c_ulong, argument: *mut c_void) {
        let (mut start, mut end) = (0, 0);
        // SAFETY: As this function requires; both are valid for writes.
        if unsafe { helpers::vbrs_mem_going_offline(action, argument, &mut start, &mut end) } {
            T::going_offline(data, start..end);
        }
    }
}

impl<T: OnSystemSleep> Chain<T> for SystemSleep {
    unsafe fn register(block: *mut bindings::notifier_block) -> c_int {
        // SAFETY: As this function requires.
        unsafe { helpers::vbrs_register_pm_notifier(block) }
    }

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        // SAFETY: As this function requires.
        unsafe { helpers::vbrs_unregister_pm_notifier(block) };
    }

    unsafe fn call(data: &Arc<T>, action: c_ulong, _argument: *mut c_void) {
        // SAFETY: Only compares numbers.
        match unsafe { helpers::vbrs_pm_event_phase(action) } {
            helpers::vbrs_pm_phase_VBRS_PM_PREPARE => T::prepare_sleep(data),
            helpers::vbrs_pm_phase_VBRS_PM_POST => T::post_sleep(data),
            _ => {}
        }
    }
}

/// A registered notifier: for [`MemoryHotplug`] or [`SystemSleep`]. On a kernel that knows neither it is
/// never called.
///
/// Dropping it takes the registration back and waits for a call that is under way; may sleep. Must
/// not be dropped by the call itself.
pub struct Notifier<C: Chain<T>, T: Send + Sync + 'static>(Pin<KBox<Inner<T>>>, PhantomData<C>);

#[pin_data]
struct Inner<T> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    data: Arc<T>,
}

// SAFETY: A registration may be taken back by any thread, and `T` is shared by all.
unsafe impl<C: Chain<T>, T: Send + Sync> Send for Notifier<C, T> {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl<C: Chain<T>, T: Send + Sync> Sync for Notifier<C, T> {}

impl<C: Chain<T>, T: Send + Sync> Notifier<C, T> {
    /// Registers a notifier.
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], or what the chain says.
    pub fn register(data: Arc<T>) -> Result<Self> {
        let inner = pin_init!(Inner {
            block <- Opaque::ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writes.
                unsafe {
                    slot.write(bindings::notifier_block {
                        notifier_call: Some(Self::callback),
                        next: core::ptr::null_mut(),
                        priority: 0,
                    })
                }
            }),
            data,
        });
        let inner = KBox::pin_init(inner, GFP_KERNEL)?;
        // SAFETY: The block is initialised, pinned, and lives until the drop unregisters it.
        to_result(unsafe { C::register(inner.block.get()) })?;
        Ok(Self(inner, PhantomData))
    }

    extern "C" fn callback(
        block: *mut bindings::notifier_block,
        action: c_ulong,
        argument: *mut c_void,
    ) -> c_int {
        /// `NOTIFY_OK`
        const OK: c_int = 1;

        // SAFETY: The kernel calls with a registered block, which is part of an `Inner`.
        let inner = unsafe { &*container_of!(Opaque::cast_from(block), Inner<T>, block) };
        // SAFETY: The chain calls those that are registered with it, with its own arguments.
        unsafe { C::call(&inner.data, action, argument) };
        OK
    }
}

impl<C: Chain<T>, T: Send + Sync + 'static> Drop for Notifier<C, T> {
    fn drop(&mut self) {
        // SAFETY: `register` has registered it, and this is the one place that ends it.
        unsafe { C::unregister(self.0.block.get()) };
    }
}
