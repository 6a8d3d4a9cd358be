// SPDX-License-Identifier: GPL-2.0

//! Giving memory back under pressure.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::ffi::c_ulong;
use kernel::prelude::*;
use kernel::sync::Arc;

use crate::bindings as helpers;

/// Something that holds pages which it can give back when the kernel is short of memory.
///
/// Both methods are called from within the allocation that found too little memory, by any task
/// and on several CPUs at once. They may sleep, but must not take a lock under which memory is
/// allocated with reclaim allowed, nor allocate.
pub trait Shrink: Send + Sync {
    /// How many pages could be given back now. Cheap.
    fn count(&self) -> usize;

    /// Gives about `pages` pages back, and returns how many; `None` if that is not possible now.
    fn scan(self: &Arc<Self>, pages: usize) -> Option<usize>;
}

/// A registered shrinker.
///
/// Dropping it takes the registration back and waits for calls that are under way; may sleep.
///
/// # Invariants
///
/// `shrinker` is registered, and its `private_data` points to what `_data` keeps alive.
pub struct Shrinker<T: Shrink + 'static> {
    shrinker: NonNull<bindings::shrinker>,
    _data: Arc<T>,
}

// SAFETY: A registration may be taken back by any thread, and `T` is shared by all.
unsafe impl<T: Shrink> Send for Shrinker<T> {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: Shrink> Sync for Shrinker<T> {}

impl<T: Shrink> Shrinker<T> {
    /// Registers a shrinker under `name` (seen in debugfs). `ENOMEM` if memory is short.
    pub fn register(name: &CStr, data: Arc<T>) -> Result<Self> {
        // SAFETY: `name` is a valid string, and is copied.
        let raw = unsafe { helpers::vbrs_shrinker_alloc(name.as_char_ptr()) };
        let shrinker = NonNull::new(raw).ok_or(ENOMEM)?;
        // SAFETY: The shrinker is ours alone until it is registered, with all fields that it needs.
        // `data` outlives the registration, by the invariants.
        unsafe {
            (*raw).count_objects = Some(Self::count_callback);
            (*raw).scan_objects = Some(Self::scan_callback);
            (*raw).private_data = Arc::as_ptr(&data).cast_mut().cast();
            bindings::shrinker_register(raw);
        }
        // INVARIANT: As just done.
        Ok(Self {
            shrinker,
            _data: data,
        })
    }

    extern "C" fn count_callback(
        shrinker: *mut bindings::shrinker,
        _control: *mut bindings::shrink_control,
    ) -> c_ulong {
        // SAFETY: The kernel calls with a registered shrinker; see the invariants.
        let data = unsafe { &*(*shrinker).private_data.cast::<T>() };
        data.count()
    }

    extern "C" fn scan_callback(
        shrinker: *mut bindings::shrinker,
        control: *mut bindings::shrink_control,
    ) -> c_ulong {
        /// `SHRINK_STOP`
        const STOP: c_ulong = c_ulong::MAX;

        // SAFETY: The kernel calls with a registered shrinker; see the invariants.
        let data = unsafe { Arc::from_raw((*shrinker).private_data.cast::<T>()) };
        // The reference stays with `_data`.
        let data = ManuallyDrop::new(data);
        // SAFETY: The kernel calls with a control block that is ours for the call.
        let control = unsafe { &mut *control };
        match data.scan(control.nr_to_scan) {
            Some(freed) => {
                // Lest it asks for as much again: a block may be larger than what was asked for.
                control.nr_scanned = control.nr_scanned.max(freed);
                freed
            }
            None => STOP,
        }
    }
}

impl<T: Shrink + 'static> Drop for Shrinker<T> {
    fn drop(&mut self) {
        // SAFETY: By the invariants it is registered, and this is the one place that ends it.
        unsafe { bindings::shrinker_free(self.shrinker.as_ptr()) };
    }
}
