// SPDX-License-Identifier: GPL-2.0

//! Interfaces of the `kernel` crate that differ between series 7.2 and series 7.3.
//!
//! Kbuild sets `vbrs_before_7_3` for series 7.2. Only this file checks it.

use core::borrow::Borrow;

use kernel::bindings::EOPNOTSUPP;
use kernel::prelude::*;

pub(super) use self::series::{synchronize_rcu, BoundInternal, SpinLockIrq};

/// Returns the error `EOPNOTSUPP`, which series 7.2 does not define as a constant.
#[doc(alias = "EOPNOTSUPP")]
#[inline]
pub(crate) fn not_supported() -> Error {
    Error::from_errno(-(EOPNOTSUPP as c_int))
}

/// Returns the value of a module parameter, which series 7.2 passes by reference.
pub(crate) fn parameter<T: Copy>(value: impl Borrow<T>) -> T {
    *value.borrow()
}

/// Series 7.3 and later.
#[cfg(not(vbrs_before_7_3))]
mod series {
    pub(in crate::virtio) use kernel::device::BoundInternal;
    pub(in crate::virtio) use kernel::sync::{rcu::synchronize_rcu, SpinLockIrq};

    /// See [`virtio_device_table!`](crate::virtio_device_table).
    #[doc(hidden)]
    #[macro_export]
    macro_rules! __virtio_device_table {
        ($name:ident, [$($id:expr),*]) => {
            ::kernel::module_device_table!(
                "virtio", $crate::virtio::DeviceId, $name, @none, [$($id),*]
            );
        };
    }
}

/// Series 7.2.
#[cfg(vbrs_before_7_3)]
mod series {
    use kernel::bindings::{self, lock_class_key, spinlock_t};
    use kernel::device::CoreInternal;
    use kernel::prelude::*;
    use kernel::sync::lock::{Backend, Lock};

    use crate::bindings as helpers;

    /// The device context of a bound device whose driver data the bus may borrow. In series 7.2,
    /// only `CoreInternal` allows that. Code that uses this name must not rely on the device lock.
    pub(in crate::virtio) type BoundInternal = CoreInternal<'static>;

    /// Waits until all current RCU read-side critical sections have ended. Requires process
    /// context.
    pub(in crate::virtio) fn synchronize_rcu() {
        // SAFETY: The function requires process context, but memory safety does not depend on it.
        unsafe { bindings::synchronize_rcu() };
    }

    /// A spin lock that is held with interrupts disabled.
    ///
    /// Unlocking restores the interrupt state from before locking. Therefore nested locks must be
    /// released in reverse order.
    pub(in crate::virtio) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

    pub(in crate::virtio) struct SpinLockIrqBackend;

    // SAFETY: The kernel's `spinlock_t` provides mutual exclusion. `relock` is the default
    // implementation, which calls `lock`.
    unsafe impl Backend for SpinLockIrqBackend {
        type State = spinlock_t;
        /// The interrupt state before locking.
        type GuardState = c_ulong;

        unsafe fn init(ptr: *mut spinlock_t, name: *const c_char, key: *mut lock_class_key) {
            // SAFETY: By the safety requirements of this function, `ptr` is valid for writes, and
            // `name` and `key` are valid while the lock exists.
            unsafe { bindings::__spin_lock_init(ptr, name, key) }
        }

        unsafe fn lock(ptr: *mut spinlock_t) -> c_ulong {
            // SAFETY: By the safety requirements of this function, the lock is valid and
            // initialised.
            unsafe { helpers::vbrs_spin_lock_irqsave(ptr) }
        }

        unsafe fn try_lock(ptr: *mut spinlock_t) -> Option<c_ulong> {
            let mut flags = 0;
            // SAFETY: By the safety requirements of this function, the lock is valid and
            // initialised. `flags` is valid for writes.
            let locked = unsafe { helpers::vbrs_spin_trylock_irqsave(ptr, &raw mut flags) };
            locked.then_some(flags)
        }

        unsafe fn unlock(ptr: *mut spinlock_t, flags: &c_ulong) {
            // SAFETY: By the safety requirements of this function, the caller owns the lock, and
            // `flags` is the value that locking returned.
            unsafe { helpers::vbrs_spin_unlock_irqrestore(ptr, *flags) }
        }

        unsafe fn assert_is_held(ptr: *mut spinlock_t) {
            // SAFETY: By the safety requirements of this function, the lock is valid and
            // initialised.
            unsafe { bindings::spin_assert_is_held(ptr) }
        }
    }

    /// See [`virtio_device_table!`](crate::virtio_device_table).
    #[doc(hidden)]
    #[macro_export]
    macro_rules! __virtio_device_table {
        ($name:ident, [$($id:expr),*]) => {
            static $name: ::kernel::device_id::IdArray<
                $crate::virtio::DeviceId,
                (),
                { <[$crate::virtio::DeviceId]>::len(&[$($id),*]) },
            > = ::kernel::device_id::IdArray::new_without_index([$(($id, ())),*]);

            ::kernel::module_device_table!("virtio", MODULE_DEVICE_TABLE, $name);
        };
    }
}
