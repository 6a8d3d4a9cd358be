// SPDX-License-Identifier: GPL-2.0

//! Outgoing buffers that carry more than the device sees.

use core::ffi::c_void;
use core::ptr::NonNull;

use kernel::alloc::Flags;
use kernel::prelude::*;
use kernel::transmute::AsBytes;

use super::buffer::{Buffer, Segments};

/// A value of which the device reads the first part, with a companion that stays in the guest.
///
/// The companion is what the value is about (the pages behind their numbers, say): it goes where
/// the buffer goes, so that it cannot be used or dropped while the buffer is with the device.
pub struct OutgoingWithContext<T: AsBytes + Send + 'static, C: Send + 'static>(KBox<Inner<T, C>>);

#[repr(C)]
struct Inner<T, C> {
    value: T,
    length: usize,
    context: C,
}

impl<T: AsBytes + Send + 'static, C: Send + 'static> OutgoingWithContext<T, C> {
    /// Allocates a buffer of which the device reads nothing yet: see
    /// [`set_length`](Self::set_length).
    ///
    /// # Errors
    ///
    /// [`AllocError`](kernel::alloc::AllocError) if there is no memory.
    pub fn new(value: T, context: C, flags: Flags) -> Result<Self> {
        let inner = Inner {
            value,
            length: 0,
            context,
        };
        Ok(Self(KBox::new(inner, flags)?))
    }

    /// Lets the device read the first `length` bytes of the value, or all if there are fewer.
    ///
    /// A buffer of length 0 is not taken by a queue.
    pub fn set_length(&mut self, length: usize) {
        self.0.length = length.min(size_of::<T>());
    }

    /// The value and its companion.
    pub fn parts_mut(&mut self) -> (&mut T, &mut C) {
        let inner = &mut *self.0;
        (&mut inner.value, &mut inner.context)
    }

    /// The companion.
    pub fn context(&self) -> &C {
        &self.0.context
    }
}

// SAFETY: The memory is that of a box from `kmalloc`, which is the token; the device only reads it,
// and not more than the value has. Such a box is aligned to 8 bytes or more.
unsafe impl<T: AsBytes + Send + 'static, C: Send + 'static> Buffer for OutgoingWithContext<T, C> {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.readable(NonNull::from(&self.0.value).cast(), self.0.length as u32);
    }

    fn into_token(self) -> NonNull<c_void> {
        NonNull::from(KBox::leak(self.0)).cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token is the box that `into_token` leaked.
        Self(unsafe { KBox::from_raw(token.cast().as_ptr()) })
    }
}
