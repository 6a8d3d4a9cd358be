// SPDX-License-Identifier: GPL-2.0

//! What the `kernel` crate has in one form in series 7.2 and in another from 7.3 on.
//!
//! Kbuild sets `vbrs_before_7_3`, which nothing but this file asks for.

use core::borrow::Borrow;

use kernel::bindings::EOPNOTSUPP;
use kernel::prelude::*;

pub(super) use self::series::{synchronize_rcu, BoundInternal, SpinLockIrq};

/// `EOPNOTSUPP`, which has no name in series 7.2.
pub(crate) fn not_supported() -> Error {
    Error::from_errno(-(EOPNOTSUPP as c_int))
}

/// The value of a parameter of the module, which comes by reference in series 7.2.
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

    /// A bound device whose data the bus may borrow. Only a `CoreInternal` one gives it here; who
    /// has it by this name does not rely on the device lock.
    pub(in crate::virtio) type BoundInternal = CoreInternal<'static>;

    /// Waits for all RCU readers that have begun. Needs process context.
    pub(in crate::virtio) fn synchronize_rcu() {
        // SAFETY: Has no requirement but the context, and that is no matter of memory safety.
        unsafe { bindings::synchronize_rcu() };
    }

    /// A spin lock that is held with interrupts off.
    ///
    /// A guard puts the interrupts back as it found them: of two locks, the
    /// caller releases the one first that it took last.
    pub(in crate::virtio) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

    pub(in crate::virtio) struct SpinLockIrqBackend;

    // SAFETY: The kernel's `spinlock_t` excludes all others. `relock` is the default one, which
    // locks as `lock` does.
    unsafe impl Backend for SpinLockIrqBackend {
        type State = spinlock_t;
        /// The interrupts' state before.
        type GuardState = c_ulong;

        unsafe fn init(ptr: *mut spinlock_t, name: *const c_char, key: *mut lock_class_key) {
            // SAFETY: By the requirements of this function, the lock may be written, and name and
            // key stay readable.
            unsafe { bindings::__spin_lock_init(ptr, name, key) }
        }

        unsafe fn lock(ptr: *mut spinlock_t) -> c_ulong {
            // SAFETY: By the requirement of this function, the lock is valid and initialised.
            unsafe { helpers::vbrs_spin_lock_irqsave(ptr) }
        }

        unsafe fn try_lock(ptr: *mut spinlock_t) -> Option<c_ulong> {
            let mut flags = 0;
            // SAFETY: As in `lock`; the flags are ours.
            let locked = unsafe { helpers::vbrs_spin_trylock_irqsave(ptr, &raw mut flags) };
            locked.then_some(flags)
        }

        unsafe fn unlock(ptr: *mut spinlock_t, flags: &c_ulong) {
            // SAFETY: By the requirement of this function, the caller owns the lock, and the flags
            // are those that locking it has returned.
            unsafe { helpers::vbrs_spin_unlock_irqrestore(ptr, *flags) }
        }

        unsafe fn assert_is_held(ptr: *mut spinlock_t) {
            // SAFETY: By the requirement of this function, the lock is valid and initialised.
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
