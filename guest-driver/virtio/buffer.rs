// SPDX-License-Identifier: GPL-2.0

//! Buffers that a virtqueue exchanges with the device.
//!
//! A [`Buffer`] describes its memory as [`Segments`]. While it is in the queue, it is represented
//! by a *token*: [`Outgoing`] and [`Incoming`] use the pointer to their heap allocation.
//!
//! C header: [`include/linux/scatterlist.h`](srctree/include/linux/scatterlist.h)

use crate::bindings;
use core::{
    ffi::c_void,
    mem::MaybeUninit,
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
};
use kernel::{
    alloc::Flags,
    prelude::*,
    transmute::{AsBytes, FromBytes},
};
use pin_init::Zeroable;

/// A buffer that can be given to a device and taken back.
///
/// While a queue owns the buffer, the buffer is represented by a pointer, its *token*. No memory is
/// allocated for it.
///
/// # Safety
///
/// - From [`into_token`](Self::into_token) to [`from_token`](Self::from_token), the memory that
///   [`describe`](Self::describe) adds must stay allocated in the linear mapping of the kernel. No
///   code may write it. No code may read the part that the device may write, except in ways that
///   allow concurrent writes by the device.
/// - `from_token` must be the inverse of `into_token`, on any thread.
/// - The lowest [`TOKEN_TAG_BITS`](Self::TOKEN_TAG_BITS) bits of a token must be 0.
pub unsafe trait Buffer: Sized + Send + 'static {
    /// The number of low bits that are 0 in each token: 3 for pointers from `kmalloc` and for
    /// `struct page *`.
    const TOKEN_TAG_BITS: u32;

    /// Adds the memory of the buffer to `segments`: the segments that the device reads first, then
    /// those that it writes. Must not sleep.
    fn describe(&self, segments: &mut Segments);

    /// Converts the buffer into its token.
    fn into_token(self) -> NonNull<c_void>;

    /// Converts a token back into the buffer.
    ///
    /// # Safety
    ///
    /// `token` must come from [`into_token`](Self::into_token) of the same type, and must not have
    /// been converted back before.
    unsafe fn from_token(token: NonNull<c_void>) -> Self;
}

/// The segments of one buffer, as scatterlists on the stack.
#[doc(alias = "scatterlist")]
pub struct Segments {
    /// Scatterlists of one entry each. The first `count` are initialised.
    table: [MaybeUninit<kernel::bindings::scatterlist>; Self::MAX],
    count: usize,
    readable: usize,
    writable_bytes: u32,
    valid: bool,
}

impl Segments {
    /// The maximum number of segments of a buffer: 32, as for a report of free pages
    /// (`PAGE_REPORTING_CAPACITY`).
    pub const MAX: usize = 32;

    fn new() -> Self {
        Self {
            table: [const { MaybeUninit::uninit() }; Self::MAX],
            count: 0,
            readable: 0,
            writable_bytes: 0,
            valid: true,
        }
    }

    /// Returns the segments of `buffer`.
    pub(super) fn from_buffer<B: Buffer>(buffer: &B) -> Self {
        let mut segments = Self::new();
        buffer.describe(&mut segments);
        segments
    }

    /// Adds a segment of `length` bytes at `address` that the device reads.
    #[doc(alias = "sg_set_buf")]
    pub fn readable(&mut self, address: NonNull<u8>, length: u32) {
        self.push(length, false, |entry| {
            // SAFETY: `entry` is an initialised scatterlist of one entry. The requirements of
            // `Buffer` include that `address` is in the linear mapping.
            unsafe { bindings::vbrs_sg_set_buf(entry, address.as_ptr().cast(), length) }
        });
    }

    /// Adds a segment of `length` bytes at `address` that the device writes.
    #[doc(alias = "sg_set_buf")]
    pub fn writable(&mut self, address: NonNull<u8>, length: u32) {
        self.push(length, true, |entry| {
            // SAFETY: `entry` is an initialised scatterlist of one entry. The requirements of
            // `Buffer` include that `address` is in the linear mapping.
            unsafe { bindings::vbrs_sg_set_buf(entry, address.as_ptr().cast(), length) }
        });
    }

    /// Adds a segment of `length` bytes from the start of `page` that the device writes. The
    /// segment may extend over the following pages.
    #[doc(alias = "sg_set_page")]
    pub fn writable_pages(&mut self, page: NonNull<kernel::bindings::page>, length: u32) {
        self.push(length, true, |entry| {
            // SAFETY: `entry` is an initialised scatterlist of one entry. The requirements of
            // `Buffer` include that the pages are allocated.
            unsafe { bindings::vbrs_sg_set_page(entry, page.as_ptr(), length, 0) }
        });
    }

    fn push(
        &mut self,
        length: u32,
        writable: bool,
        fill: impl FnOnce(*mut kernel::bindings::scatterlist),
    ) {
        let in_order = writable || self.readable == self.count;
        let Some(entry) = self
            .table
            .get_mut(self.count)
            .filter(|_| length > 0 && in_order)
        else {
            self.valid = false;
            return;
        };
        // SAFETY: `entry` is valid for writes of one entry.
        unsafe { kernel::bindings::sg_init_table(entry.as_mut_ptr(), 1) };
        fill(entry.as_mut_ptr());
        self.count += 1;
        if writable {
            self.writable_bytes = self.writable_bytes.saturating_add(length);
        } else {
            self.readable += 1;
        }
    }

    /// Returns whether a queue can take these segments: at least one and at most [`MAX`](Self::MAX)
    /// segments, none of them empty, and those that the device reads before those that it writes.
    pub(super) fn is_valid(&self) -> bool {
        self.valid && self.count > 0
    }

    /// Returns the number of segments.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Returns the total number of bytes that the device may write.
    pub(super) fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Adds the segments to a ring as one buffer with the given token. Returns the result of
    /// `virtqueue_add_sgs()`.
    ///
    /// # Safety
    ///
    /// - [`is_valid`](Self::is_valid) must return `true`.
    /// - `vq` must be a valid virtqueue that no other code uses during the call.
    /// - `token` must be the token of a buffer with these segments. The ring owns it if the call
    ///   succeeds.
    pub(super) unsafe fn add_to(
        &mut self,
        vq: NonNull<bindings::virtqueue>,
        token: NonNull<c_void>,
    ) -> c_int {
        let mut lists = [ptr::null_mut(); Self::MAX];
        for (list, entry) in lists.iter_mut().zip(&mut self.table).take(self.count) {
            *list = entry.as_mut_ptr();
        }
        let readable = self.readable as c_uint;
        let writable = (self.count - self.readable) as c_uint;
        // SAFETY: The first `count` scatterlists are initialised, and those that the device reads
        // come first. By the safety requirements of this function, `vq` is valid and not used
        // concurrently, and `token` belongs to the segments. `GFP_ATOMIC` is allowed in any context
        // but NMI.
        unsafe {
            bindings::virtqueue_add_sgs(
                vq.as_ptr(),
                lists.as_mut_ptr(),
                readable,
                writable,
                token.as_ptr(),
                kernel::bindings::GFP_ATOMIC,
            )
        }
    }
}

/// Returns the size of `T`. Does not compile if the size is not valid for a segment: 0, or more
/// than `u32::MAX`.
const fn size_of_segment<T>() -> u32 {
    const {
        assert!(size_of::<T>() > 0 && size_of::<T>() <= u32::MAX as usize);
        size_of::<T>() as u32
    }
}

/// A value that the device reads, on the heap.
///
/// [`OutgoingWithContext`](super::OutgoingWithContext) is similar, but the device reads only the
/// first part.
#[doc(alias = "virtqueue_add_outbuf")]
pub struct Outgoing<T: AsBytes + Send + 'static>(KBox<T>);

impl<T: AsBytes + Send + 'static> Outgoing<T> {
    /// Creates a buffer with `value`.
    ///
    /// # Errors
    ///
    /// [`AllocError`](kernel::alloc::AllocError) if memory is short.
    pub fn new(value: T, flags: Flags) -> Result<Self> {
        Ok(Self(KBox::new(value, flags)?))
    }
}

impl<T: AsBytes + Send + 'static> Deref for Outgoing<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: AsBytes + Send + 'static> DerefMut for Outgoing<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

// SAFETY: The segment is the memory of a box from `kmalloc`, whose pointer is the token. The device
// only reads it. Such a box is aligned to at least 8 bytes.
unsafe impl<T: AsBytes + Send + 'static> Buffer for Outgoing<T> {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.readable(NonNull::from(&*self.0).cast(), size_of_segment::<T>());
    }

    fn into_token(self) -> NonNull<c_void> {
        NonNull::from(KBox::leak(self.0)).cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token comes from the box that `into_token` leaked.
        Self(unsafe { KBox::from_raw(token.cast().as_ptr()) })
    }
}

/// A value that the device writes, on the heap.
///
/// It is zero-initialised, so bytes that the device does not write are zero.
#[doc(alias = "virtqueue_add_inbuf")]
pub struct Incoming<T: AsBytes + FromBytes + Send + 'static>(KBox<T>);

impl<T: AsBytes + FromBytes + Send + 'static> Incoming<T> {
    /// Creates a buffer of zeroes.
    ///
    /// # Errors
    ///
    /// [`AllocError`](kernel::alloc::AllocError) if memory is short.
    pub fn zeroed(flags: Flags) -> Result<Self>
    where
        T: Zeroable,
    {
        Ok(Self(KBox::init(pin_init::init_zeroed::<T>(), flags)?))
    }
}

impl<T: AsBytes + FromBytes + Send + 'static> Deref for Incoming<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

// SAFETY: The segment is the memory of a box from `kmalloc`, whose pointer is the token. No other
// code can access it while the token exists. Any bytes that the device writes are a valid `T`. Such
// a box is aligned to at least 8 bytes.
unsafe impl<T: AsBytes + FromBytes + Send + 'static> Buffer for Incoming<T> {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.writable(NonNull::from(&*self.0).cast(), size_of_segment::<T>());
    }

    fn into_token(self) -> NonNull<c_void> {
        NonNull::from(KBox::leak(self.0)).cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token comes from the box that `into_token` leaked.
        Self(unsafe { KBox::from_raw(token.cast().as_ptr()) })
    }
}

/// A buffer of one of two types, for a queue that exchanges both. The lowest bit of the token
/// encodes the type.
pub enum Either<A: Buffer, B: Buffer> {
    /// A buffer of the first type.
    Left(A),
    /// A buffer of the second type.
    Right(B),
}

impl<A: Buffer, B: Buffer> Either<A, B> {
    const TAG: usize = 1;
    const TAG_BITS: u32 = {
        let (a, b) = (A::TOKEN_TAG_BITS, B::TOKEN_TAG_BITS);
        let bits = if a < b { a } else { b };
        assert!(bits > 0, "no bit of the tokens is free");
        bits
    };
}

// SAFETY: `A` and `B` fulfil the requirements, and the lowest bit of their tokens is 0. That bit
// encodes the type.
unsafe impl<A: Buffer, B: Buffer> Buffer for Either<A, B> {
    // The lowest bit is in use. Therefore an `Either` within an `Either` does not compile.
    const TOKEN_TAG_BITS: u32 = 0;

    fn describe(&self, segments: &mut Segments) {
        match self {
            Self::Left(buffer) => buffer.describe(segments),
            Self::Right(buffer) => buffer.describe(segments),
        }
    }

    fn into_token(self) -> NonNull<c_void> {
        const { assert!(Self::TAG_BITS > 0) };
        match self {
            Self::Left(buffer) => buffer.into_token(),
            Self::Right(buffer) => buffer.into_token().map_addr(|address| address | Self::TAG),
        }
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        let address = token.as_ptr().map_addr(|address| address & !Self::TAG);
        // SAFETY: The tokens of `A` and `B` are not null, and their lowest bit is 0. So a tagged
        // token has other bits set.
        let inner = unsafe { NonNull::new_unchecked(address) };
        if token.addr().get() & Self::TAG == 0 {
            // SAFETY: The tag is 0, so the token comes from an `A`.
            Self::Left(unsafe { A::from_token(inner) })
        } else {
            // SAFETY: The tag is 1, so the token comes from a `B`.
            Self::Right(unsafe { B::from_token(inner) })
        }
    }
}
