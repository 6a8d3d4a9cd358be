// SPDX-License-Identifier: GPL-2.0

//! Outgoing buffers with context that the device does not read.

use core::ffi::c_void;
use core::ptr::NonNull;

use kernel::alloc::Flags;
use kernel::prelude::*;
use kernel::transmute::AsBytes;

use super::buffer::{Buffer, Segments};

/// A value of which the device reads the first part, together with a context that the device does
/// not read.
///
/// The context belongs to the value. For example, a request contains page numbers, and its context
/// the pages themselves. The queue owns both while the buffer is in flight, so the context cannot
/// be used or dropped then.
#[doc(alias = "virtqueue_add_outbuf")]
pub struct OutgoingWithContext<T: AsBytes + Send + 'static, C: Send + 'static>(KBox<Inner<T, C>>);

#[repr(C)]
struct Inner<T, C> {
    value: T,
    length: usize,
    context: C,
}

impl<T: AsBytes + Send + 'static, C: Send + 'static> OutgoingWithContext<T, C> {
    /// Creates a buffer of length 0, which the device cannot read yet: see
    /// [`set_length`](Self::set_length).
    ///
    /// # Errors
    ///
    /// [`AllocError`](kernel::alloc::AllocError) if memory is short.
    pub fn new(value: T, context: C, flags: Flags) -> Result<Self> {
        let inner = Inner {
            value,
            length: 0,
            context,
        };
        Ok(Self(KBox::new(inner, flags)?))
    }

    /// Sets the number of bytes of the value that the device reads. At most the size of the value.
    ///
    /// A queue refuses a buffer of length 0.
    pub fn set_length(&mut self, length: usize) {
        self.0.length = length.min(size_of::<T>());
    }

    /// Returns the value and the context.
    pub fn parts_mut(&mut self) -> (&mut T, &mut C) {
        let inner = &mut *self.0;
        (&mut inner.value, &mut inner.context)
    }

    /// Returns the context.
    pub fn context(&self) -> &C {
        &self.0.context
    }
}

// SAFETY: The segment is within the memory of a box from `kmalloc`, whose pointer is the token. The
// device only reads the segment, which is at most as long as the value. Such a box is aligned to at
// least 8 bytes.
unsafe impl<T: AsBytes + Send + 'static, C: Send + 'static> Buffer for OutgoingWithContext<T, C> {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.readable(NonNull::from(&self.0.value).cast(), self.0.length as u32);
    }

    fn into_token(self) -> NonNull<c_void> {
        NonNull::from(KBox::leak(self.0)).cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token comes from the box that `into_token` leaked.
        Self(unsafe { KBox::from_raw(token.cast().as_ptr()) })
    }
}
