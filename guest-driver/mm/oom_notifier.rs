// SPDX-License-Identifier: GPL-2.0

//! OOM notifiers: callbacks that free memory before the OOM killer runs.
//!
//! C header: `include/linux/oom.h`.

use core::pin::Pin;

use kernel::bindings;
use kernel::container_of;
use kernel::error::to_result;
use kernel::ffi::{c_int, c_ulong, c_void};
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

use crate::bindings as helpers;

/// Callback that frees memory when the guest is out of memory.
pub trait OnOutOfMemory: Send + Sync {
    /// Returns pages to the page allocator, and returns their number. The kernel kills a process if
    /// all notifiers together return 0.
    ///
    /// `already_freed` is the number of pages that notifiers of higher priority returned, on any
    /// node.
    ///
    /// Called from within the allocation that found no memory, in any task, one call at a time.
    /// Other tasks that run out of memory wait meanwhile. May sleep, for a short and limited time.
    /// Must not allocate with reclaim allowed, and must not take a lock under which memory is
    /// allocated with reclaim allowed.
    fn oom_notify(self: &Arc<Self>, already_freed: usize) -> usize;
}

/// A registered OOM notifier.
///
/// Dropping it unregisters the notifier and waits for a call in progress. May sleep. Must not be
/// dropped from its own callback.
#[doc(alias = "notifier_block")]
#[doc(alias = "unregister_oom_notifier")]
pub struct OomNotifier<T: OnOutOfMemory + 'static>(Pin<KBox<Inner<T>>>);

#[pin_data]
struct Inner<T: OnOutOfMemory> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    data: Arc<T>,
}

// SAFETY: Any thread may unregister a notifier block, and `T` is `Send` and `Sync`.
unsafe impl<T: OnOutOfMemory> Send for OomNotifier<T> {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: OnOutOfMemory> Sync for OomNotifier<T> {}

impl<T: OnOutOfMemory> OomNotifier<T> {
    /// Registers a notifier. The kernel calls notifiers in order of decreasing priority.
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], or the error of the notifier chain.
    #[doc(alias = "register_oom_notifier")]
    pub fn register(priority: i32, data: Arc<T>) -> Result<Self> {
        let inner = pin_init!(Inner {
            block <- Opaque::ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writes.
                unsafe {
                    slot.write(bindings::notifier_block {
                        notifier_call: Some(Self::callback),
                        next: core::ptr::null_mut(),
                        priority,
                    })
                }
            }),
            data,
        });
        let inner = KBox::pin_init(inner, GFP_KERNEL)?;
        // SAFETY: The notifier block is initialised and pinned, and lives until `drop` unregisters
        // it.
        to_result(unsafe { helpers::register_oom_notifier(inner.block.get()) })?;
        Ok(Self(inner))
    }

    extern "C" fn callback(
        block: *mut bindings::notifier_block,
        _action: c_ulong,
        freed: *mut c_void,
    ) -> c_int {
        /// `NOTIFY_OK`
        const OK: c_int = 1;

        // SAFETY: The kernel passes a registered notifier block, which is a field of an `Inner`.
        let inner = unsafe { &*container_of!(Opaque::cast_from(block), Inner<T>, block) };
        // SAFETY: The kernel passes a counter of freed pages that only this call uses.
        let freed = unsafe { &mut *freed.cast::<c_ulong>() };
        let more = T::oom_notify(&inner.data, *freed);
        *freed = freed.saturating_add(more);
        OK
    }
}

impl<T: OnOutOfMemory + 'static> Drop for OomNotifier<T> {
    fn drop(&mut self) {
        // SAFETY: `register` registered the notifier block, and only `drop` unregisters it.
        unsafe { helpers::unregister_oom_notifier(self.0.block.get()) };
    }
}

#[kunit_tests(virtio_balloon_rs_oom_notifier)]
mod tests {
    use super::*;
    use kernel::sync::atomic::{Atomic, Relaxed};

    /// A notifier that returns 4 and stores `already_freed`.
    struct Giver {
        told: Atomic<usize>,
    }

    impl OnOutOfMemory for Giver {
        fn oom_notify(self: &Arc<Self>, already_freed: usize) -> usize {
            self.told.store(already_freed, Relaxed);
            4
        }
    }

    #[test]
    fn each_notifier_gets_the_count_of_those_before_it() -> Result {
        let giver = Giver {
            told: Atomic::new(usize::MAX),
        };
        let giver = Arc::new(giver, GFP_KERNEL)?;
        let notifier = OomNotifier::register(0, giver.clone())?;
        let mut freed: c_ulong = 0;
        for (told, then) in [(0, 4), (4, 8)] {
            let block = notifier.0.block.get();
            OomNotifier::<Giver>::callback(block, 0, (&raw mut freed).cast());
            assert_eq!((giver.told.load(Relaxed), freed), (told, then));
        }
        freed = c_ulong::MAX;
        OomNotifier::<Giver>::callback(notifier.0.block.get(), 0, (&raw mut freed).cast());
        assert_eq!(freed, c_ulong::MAX);
        Ok(())
    }
}
