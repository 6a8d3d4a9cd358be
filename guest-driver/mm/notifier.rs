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
use kernel::page::PAGE_SHIFT;
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
    #[doc(alias = "MEM_GOING_OFFLINE")]
    fn going_offline(self: &Arc<Self>, range: Range<u64>);
}

/// Callbacks for system sleep.
pub trait OnSystemSleep: Send + Sync {
    /// Called before suspend, before hibernation, and before a hibernation image is restored.
    ///
    /// All of the system still runs. May sleep, for a limited time.
    #[doc(alias = "PM_SUSPEND_PREPARE")]
    #[doc(alias = "PM_HIBERNATION_PREPARE")]
    #[doc(alias = "PM_RESTORE_PREPARE")]
    fn prepare_sleep(self: &Arc<Self>);

    /// Called after each [`prepare_sleep`](Self::prepare_sleep), whether the system slept or not.
    ///
    /// All of the system runs again. May sleep.
    #[doc(alias = "PM_POST_SUSPEND")]
    #[doc(alias = "PM_POST_HIBERNATION")]
    #[doc(alias = "PM_POST_RESTORE")]
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
#[doc(alias = "register_memory_notifier")]
#[doc(alias = "unregister_memory_notifier")]
#[doc(alias = "memory_notify")]
pub struct MemoryHotplug(());

/// The notifier chain for system sleep (`register_pm_notifier()`).
#[doc(alias = "register_pm_notifier")]
#[doc(alias = "unregister_pm_notifier")]
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
        if action != helpers::memory_block_state_MEM_GOING_OFFLINE as c_ulong {
            return;
        }
        // SAFETY: By the safety requirements of this function, `argument` belongs to
        // `MEM_GOING_OFFLINE`: it points to a `struct memory_notify`.
        let memory = unsafe { &*argument.cast::<helpers::memory_notify>() };
        let address = |pfn: c_ulong| (pfn as u64) << PAGE_SHIFT;
        let end = memory.start_pfn + memory.nr_pages;
        T::going_offline(data, address(memory.start_pfn)..address(end));
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
        match u32::try_from(action) {
            Ok(
                bindings::PM_SUSPEND_PREPARE
                | bindings::PM_HIBERNATION_PREPARE
                | bindings::PM_RESTORE_PREPARE,
            ) => T::prepare_sleep(data),
            Ok(
                bindings::PM_POST_SUSPEND
                | bindings::PM_POST_HIBERNATION
                | bindings::PM_POST_RESTORE,
            ) => T::post_sleep(data),
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
#[doc(alias = "notifier_block")]
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
    #[doc(alias = "register_memory_notifier")]
    #[doc(alias = "register_pm_notifier")]
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

#[kunit_tests(virtio_balloon_rs_mm_notifier)]
mod tests {
    use super::*;
    use kernel::sync::atomic::{Atomic, Relaxed};

    /// Counts the calls, and stores the last range.
    struct Recorder {
        offline: Atomic<u32>,
        start: Atomic<u64>,
        end: Atomic<u64>,
        prepared: Atomic<u32>,
        woken: Atomic<u32>,
    }

    impl Recorder {
        fn new() -> Result<Arc<Self>> {
            let recorder = Self {
                offline: Atomic::new(0),
                start: Atomic::new(0),
                end: Atomic::new(0),
                prepared: Atomic::new(0),
                woken: Atomic::new(0),
            };
            Ok(Arc::new(recorder, GFP_KERNEL)?)
        }
    }

    impl OnMemoryOffline for Recorder {
        fn going_offline(self: &Arc<Self>, range: Range<u64>) {
            self.offline.add(1, Relaxed);
            self.start.store(range.start, Relaxed);
            self.end.store(range.end, Relaxed);
        }
    }

    impl OnSystemSleep for Recorder {
        fn prepare_sleep(self: &Arc<Self>) {
            self.prepared.add(1, Relaxed);
        }

        fn post_sleep(self: &Arc<Self>) {
            self.woken.add(1, Relaxed);
        }
    }

    #[test]
    fn only_memory_that_goes_offline_is_reported() -> Result {
        let recorder = Recorder::new()?;
        let mut memory = helpers::memory_notify {
            start_pfn: 0x8000,
            nr_pages: 0x1000,
            ..Default::default()
        };
        for action in [
            helpers::memory_block_state_MEM_ONLINE,
            helpers::memory_block_state_MEM_GOING_OFFLINE,
            helpers::memory_block_state_MEM_OFFLINE,
            helpers::memory_block_state_MEM_GOING_ONLINE,
            helpers::memory_block_state_MEM_CANCEL_ONLINE,
            helpers::memory_block_state_MEM_CANCEL_OFFLINE,
        ] {
            let argument = (&raw mut memory).cast();
            // SAFETY: `argument` points to the structure that this chain passes with `action`.
            unsafe { MemoryHotplug::call(&recorder, action as c_ulong, argument) };
        }
        assert_eq!(recorder.offline.load(Relaxed), 1);
        assert_eq!(recorder.start.load(Relaxed), 0x8000 << PAGE_SHIFT);
        assert_eq!(recorder.end.load(Relaxed), 0x9000 << PAGE_SHIFT);
        Ok(())
    }

    #[test]
    fn each_kind_of_sleep_is_prepared_and_ended() -> Result {
        let recorder = Recorder::new()?;
        for (action, prepared, woken) in [
            (bindings::PM_SUSPEND_PREPARE, 1, 0),
            (bindings::PM_POST_SUSPEND, 1, 1),
            (bindings::PM_HIBERNATION_PREPARE, 2, 1),
            (bindings::PM_POST_HIBERNATION, 2, 2),
            (bindings::PM_RESTORE_PREPARE, 3, 2),
            (bindings::PM_POST_RESTORE, 3, 3),
            (u32::MAX, 3, 3),
        ] {
            // SAFETY: This chain passes no argument.
            unsafe { SystemSleep::call(&recorder, action as c_ulong, core::ptr::null_mut()) };
            assert_eq!(recorder.prepared.load(Relaxed), prepared);
            assert_eq!(recorder.woken.load(Relaxed), woken);
        }
        Ok(())
    }
}
