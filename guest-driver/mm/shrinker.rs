// SPDX-License-Identifier: GPL-2.0

//! Shrinkers: callbacks that free memory under memory pressure.
//!
//! C header: `include/linux/shrinker.h`.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::ffi::c_ulong;
use kernel::prelude::*;
use kernel::sync::Arc;

use crate::bindings as helpers;

/// Callbacks of a shrinker: an owner of pages that the kernel can reclaim.
///
/// Both methods are called by reclaim, from within the allocation of any task or from kswapd, and
/// on several CPUs at once. They may sleep. They must not allocate memory, and must not take a lock
/// under which memory is allocated with reclaim allowed.
pub trait Shrink: Send + Sync {
    /// Returns the number of pages that could be freed now. Must be fast.
    #[doc(alias = "count_objects")]
    fn count(&self) -> usize;

    /// Frees about `pages` pages and returns the number of freed pages; `None` if that is not
    /// possible now.
    #[doc(alias = "scan_objects")]
    #[doc(alias = "shrink_control")]
    fn scan(self: &Arc<Self>, pages: usize) -> Option<usize>;
}

/// A registered shrinker.
///
/// Dropping it unregisters the shrinker and waits for calls in progress. May sleep.
///
/// # Invariants
///
/// `shrinker` is registered, and its `private_data` points to the `T` in `_data`.
#[doc(alias = "shrinker")]
#[doc(alias = "shrinker_free")]
pub struct Shrinker<T: Shrink + 'static> {
    shrinker: NonNull<bindings::shrinker>,
    _data: Arc<T>,
}

// SAFETY: Any thread may unregister a shrinker, and `T` is `Send` and `Sync`.
unsafe impl<T: Shrink> Send for Shrinker<T> {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: Shrink> Sync for Shrinker<T> {}

impl<T: Shrink> Shrinker<T> {
    /// Registers a shrinker under `name`, which debugfs shows.
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    #[doc(alias = "shrinker_alloc")]
    #[doc(alias = "shrinker_register")]
    pub fn register(name: &CStr, data: Arc<T>) -> Result<Self> {
        // SAFETY: `name` is a valid string, and the kernel copies it.
        let raw = unsafe { helpers::vbrs_shrinker_alloc(name.as_char_ptr()) };
        let shrinker = NonNull::new(raw).ok_or(ENOMEM)?;
        // SAFETY: No other code uses the shrinker before it is registered, and all required fields
        // are set by then. By the type invariants, `data` outlives the registration.
        unsafe {
            (*raw).count_objects = Some(Self::count_callback);
            (*raw).scan_objects = Some(Self::scan_callback);
            (*raw).private_data = Arc::as_ptr(&data).cast_mut().cast();
            bindings::shrinker_register(raw);
        }
        // INVARIANT: The shrinker was registered above, and `_data` keeps the `T` alive.
        Ok(Self {
            shrinker,
            _data: data,
        })
    }

    extern "C" fn count_callback(
        shrinker: *mut bindings::shrinker,
        _control: *mut bindings::shrink_control,
    ) -> c_ulong {
        // SAFETY: The kernel passes a registered shrinker. By the type invariants, its
        // `private_data` points to a valid `T`.
        let data = unsafe { &*(*shrinker).private_data.cast::<T>() };
        data.count()
    }

    extern "C" fn scan_callback(
        shrinker: *mut bindings::shrinker,
        control: *mut bindings::shrink_control,
    ) -> c_ulong {
        /// `SHRINK_STOP`
        const STOP: c_ulong = c_ulong::MAX;

        // SAFETY: The kernel passes a registered shrinker. By the type invariants, its
        // `private_data` comes from an `Arc<T>`.
        let data = unsafe { Arc::from_raw((*shrinker).private_data.cast::<T>()) };
        // `_data` keeps the reference.
        let data = ManuallyDrop::new(data);
        // SAFETY: The kernel passes a control structure that only this call uses.
        let control = unsafe { &mut *control };
        match data.scan(control.nr_to_scan) {
            Some(freed) => {
                // A freed block may be larger than the request. Reclaim subtracts `nr_scanned` from
                // its goal, so it does not ask for these pages again.
                control.nr_scanned = control.nr_scanned.max(freed);
                freed
            }
            None => STOP,
        }
    }
}

impl<T: Shrink + 'static> Drop for Shrinker<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, the shrinker is registered, and only `drop` frees it.
        unsafe { bindings::shrinker_free(self.shrinker.as_ptr()) };
    }
}
