// SPDX-License-Identifier: GPL-2.0

//! Notifiers for memory hotplug and system sleep.
//!
//! A [`Notifier`] registers a [`OnMemoryOffline`] with the chain [`MemoryHotplug`], or a
//! [`OnSystemSleep`] with the chain [`SystemSleep`].
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

/// Callback for memory that goes offline.
pub trait OnMemoryOffline: Send + Sync {
    /// Called when the memory at these physical addresses is about to go offline
    /// (`MEM_GOING_OFFLINE`).
    ///
    /// The kernel no longer allocates pages in `range`. The implementation should return the pages
    /// that it owns there. If pages remain in use, the memory stays online.
    ///
    /// May sleep, for a limited time.
    fn going_offline(self: &Arc<Self>, range: Range<u64>);
}

/// Callbacks for system sleep.
pub trait OnSystemSleep: Send + Sync {
    /// Called before suspend, before hibernation, and before a hibernation image is restored.
    ///
    /// All of the system still runs. May sleep, for a limited time.
    fn prepare_sleep(self: &Arc<Self>);

    /// Called after each [`prepare_sleep`](Self::prepare_sleep), whether the system slept or not.
    ///
    /// All of the system runs again. May sleep.
    fn post_sleep(self: &Arc<Self>);
}

mod sealed {
    use super::*;

    /// A notifier chain of the kernel.
    pub trait Chain<T> {
        /// Registers a notifier block. Returns 0 or a negative error number.
        ///
        /// # Safety
        ///
        /// `block` must be initialised and pinned, and must stay valid until it is unregistered.
        unsafe fn register(block: *mut bindings::notifier_block) -> c_int;

        /// Unregisters a notifier block, and waits for calls in progress.
        ///
        /// # Safety
        ///
        /// `block` must be registered with this chain.
        unsafe fn unregister(block: *mut bindings::notifier_block);

        /// Calls the method of `T` for `action`.
        ///
        /// # Safety
        ///
        /// `argument` must be the argument that this chain passes with `action`.
        unsafe fn call(data: &Arc<T>, action: c_ulong, argument: *mut c_void);
    }
}

use sealed::Chain;

/// The notifier chain for memory hotplug (`register_memory_notifier()`).
pub struct MemoryHotplug(());

/// The notifier chain for system sleep (`register_pm_notifier()`).
pub struct SystemSleep(());

impl<T: OnMemoryOffline> Chain<T> for MemoryHotplug {
    unsafe fn register(block: *mut bindings::notifier_block) -> c_int {
        // SAFETY: By the safety requirements of this function, `block` is initialised and stays
        // valid while it is registered.
        unsafe { helpers::vbrs_register_memory_notifier(block) }
    }

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        // SAFETY: By the safety requirements of this function, `block` is registered.
        unsafe { helpers::vbrs_unregister_memory_notifier(block) };
    }

    unsafe fn call(data: &Arc<T>, action: c_ulong, argument: *mut c_void) {
        let (mut start, mut end) = (0, 0);
        // SAFETY: By the safety requirements of this function, `argument` belongs to `action`.
        // `start` and `end` are valid for writes.
        if unsafe { helpers::vbrs_mem_going_offline(action, argument, &mut start, &mut end) } {
            T::going_offline(data, start..end);
        }
    }
}

impl<T: OnSystemSleep> Chain<T> for SystemSleep {
    unsafe fn register(block: *mut bindings::notifier_block) -> c_int {
        // SAFETY: By the safety requirements of this function, `block` is initialised and stays
        // valid while it is registered.
        unsafe { helpers::vbrs_register_pm_notifier(block) }
    }

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        // SAFETY: By the safety requirements of this function, `block` is registered.
        unsafe { helpers::vbrs_unregister_pm_notifier(block) };
    }

    unsafe fn call(data: &Arc<T>, action: c_ulong, _argument: *mut c_void) {
        // SAFETY: The helper only compares numbers.
        match unsafe { helpers::vbrs_pm_event_phase(action) } {
            helpers::vbrs_pm_phase_VBRS_PM_PREPARE => T::prepare_sleep(data),
            helpers::vbrs_pm_phase_VBRS_PM_POST => T::post_sleep(data),
            _ => {}
        }
    }
}

/// A registered notifier of the chain `C`: [`MemoryHotplug`] or [`SystemSleep`].
///
/// A kernel that is built without memory hotplug or without system sleep never calls it.
///
/// Dropping a `Notifier` unregisters it and waits for a call in progress. May sleep. Must not be
/// dropped from its own callback.
pub struct Notifier<C: Chain<T>, T: Send + Sync + 'static>(Pin<KBox<Inner<T>>>, PhantomData<C>);

#[pin_data]
struct Inner<T> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    data: Arc<T>,
}

// SAFETY: Any thread may unregister a notifier block, and `T` is `Send` and `Sync`.
unsafe impl<C: Chain<T>, T: Send + Sync> Send for Notifier<C, T> {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl<C: Chain<T>, T: Send + Sync> Sync for Notifier<C, T> {}

impl<C: Chain<T>, T: Send + Sync> Notifier<C, T> {
    /// Registers a notifier that calls the methods of `data`.
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], or the error of the chain.
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
        // SAFETY: The notifier block is initialised and pinned, and lives until `drop` unregisters
        // it.
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

        // SAFETY: The kernel passes a registered notifier block, which is a field of an `Inner`.
        let inner = unsafe { &*container_of!(Opaque::cast_from(block), Inner<T>, block) };
        // SAFETY: The chain `C` passes its own `action` and `argument` to the blocks registered
        // with it.
        unsafe { C::call(&inner.data, action, argument) };
        OK
    }
}

impl<C: Chain<T>, T: Send + Sync + 'static> Drop for Notifier<C, T> {
    fn drop(&mut self) {
        // SAFETY: `register` registered the notifier block, and only `drop` unregisters it.
        unsafe { C::unregister(self.0.block.get()) };
    }
}
