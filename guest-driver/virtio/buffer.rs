// SPDX-License-Identifier: GPL-2.0

//! What travels on a virtqueue.

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

/// Something that can be given to a device and comes back.
///
/// While it is with the device it is nothing but a pointer, its *token*; no memory is allocated for
/// it.
///
/// # Safety
///
/// - From [`into_token`](Self::into_token) to [`from_token`](Self::from_token) the memory that
///   [`describe`](Self::describe) names must stay allocated, in the kernel's linear mapping; nobody
///   may write it, and nobody may read what the device may write, save in ways that allow for
///   concurrent change by the device.
/// - `from_token` must undo `into_token`, on any thread.
/// - The lowest [`TOKEN_TAG_BITS`](Self::TOKEN_TAG_BITS) bits of a token must be 0.
pub unsafe trait Buffer: Sized + Send + 'static {
    /// How many low bits of each token are always 0: 3 for what `kmalloc` returns, or for a
    /// `struct page *`.
    const TOKEN_TAG_BITS: u32;

    /// Names the buffer's memory, what the device reads before what it writes. Must not sleep.
    fn describe(&self, segments: &mut Segments);

    /// Gives up ownership.
    fn into_token(self) -> NonNull<c_void>;

    /// Takes ownership back.
    ///
    /// # Safety
    ///
    /// `token` must come from [`into_token`](Self::into_token) of this very type, and each token
    /// may come back once.
    unsafe fn from_token(token: NonNull<c_void>) -> Self;
}

/// The memory of one buffer, as a scatter list on the stack.
pub struct Segments {
    /// Lists of one entry each. The first `count` are initialised.
    table: [MaybeUninit<kernel::bindings::scatterlist>; Self::MAX],
    count: usize,
    readable: usize,
    writable_bytes: u32,
    valid: bool,
}

impl Segments {
    /// How many segments a buffer can have at most: the 32 of a page report
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

    /// Returns the memory of `buffer`.
    pub(super) fn from_buffer<B: Buffer>(buffer: &B) -> Self {
        let mut segments = Self::new();
        buffer.describe(&mut segments);
        segments
    }

    /// Adds `length` bytes at `address` for the device to read.
    pub fn readable(&mut self, address: NonNull<u8>, length: u32) {
        self.push(length, false, |entry| {
            // SAFETY: `entry` is an initialised list of one; `Buffer` demands that `address` is in
            // the linear mapping.
            unsafe { bindings::vbrs_sg_set_buf(entry, address.as_ptr().cast(), length) }
        });
    }

    /// Adds `length` bytes at `address` for the device to write.
    pub fn writable(&mut self, address: NonNull<u8>, length: u32) {
        self.push(length, true, |entry| {
            // SAFETY: `entry` is an initialised list of one; `Buffer` demands that `address` is in
            // the linear mapping.
            unsafe { bindings::vbrs_sg_set_buf(entry, address.as_ptr().cast(), length) }
        });
    }

    /// Adds `length` bytes from the start of `page`, and of the pages behind it, for the device to
    /// write.
    pub fn writable_pages(&mut self, page: NonNull<kernel::bindings::page>, length: u32) {
        self.push(length, true, |entry| {
            // SAFETY: `entry` is an initialised list of one; `Buffer` demands that the pages are
            // allocated.
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
        // SAFETY: `entry` is room for one entry.
        unsafe { kernel::bindings::sg_init_table(entry.as_mut_ptr(), 1) };
        fill(entry.as_mut_ptr());
        self.count += 1;
        if writable {
            self.writable_bytes = self.writable_bytes.saturating_add(length);
        } else {
            self.readable += 1;
        }
    }

    /// Says whether a device can be given this: at least one segment, none of them empty, not more
    /// than [`MAX`](Self::MAX), and what is read before what is written.
    pub(super) fn is_valid(&self) -> bool {
        self.valid && self.count > 0
    }

    /// Returns the number of segments.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Returns how many bytes the device may write.
    pub(super) fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Adds the segments to a ring, with `token` to name them. Returns what `virtqueue_add_sgs()`
    /// returns.
    ///
    /// # Safety
    ///
    /// [`is_valid`](Self::is_valid), `vq` must be a valid queue which the caller has for itself,
    /// and `token` that of a buffer with these segments, which stays with the queue if the addition
    /// succeeds.
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
        // SAFETY: The first `count` lists are initialised, those that the device reads first; the
        // rest is the caller's promise. `GFP_ATOMIC` allows for any context.
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

/// Returns the size of `T`, which must be that of one segment: neither nothing nor more than 4 GiB.
const fn size_of_segment<T>() -> u32 {
    const {
        assert!(size_of::<T>() > 0 && size_of::<T>() <= u32::MAX as usize);
        size_of::<T>() as u32
    }
}

/// A value that the device reads. Owns its memory.
///
/// [`OutgoingWithContext`](super::OutgoingWithContext) is one of which the device reads only a part.
pub struct Outgoing<T: AsBytes + Send + 'static>(KBox<T>);

impl<T: AsBytes + Send + 'static> Outgoing<T> {
    /// Creates a buffer of `value`.
    ///
    /// # Errors
    ///
    /// [`AllocError`](kernel::alloc::AllocError) if there is no memory.
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

// SAFETY: The memory is that of a box from `kmalloc`, which is the token; the device only reads it.
// Such a box is aligned to 8 bytes or more.
unsafe impl<T: AsBytes + Send + 'static> Buffer for Outgoing<T> {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.readable(NonNull::from(&*self.0).cast(), size_of_segment::<T>());
    }

    fn into_token(self) -> NonNull<c_void> {
        NonNull::from(KBox::leak(self.0)).cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token is the box that `into_token` leaked.
        Self(unsafe { KBox::from_raw(token.cast().as_ptr()) })
    }
}

/// A value that the device writes. Owns its memory.
///
/// Starts as zeroes, so that whatever the device did not write is zero.
pub struct Incoming<T: AsBytes + FromBytes + Send + 'static>(KBox<T>);

impl<T: AsBytes + FromBytes + Send + 'static> Incoming<T> {
    /// Creates a buffer of zeroes.
    ///
    /// # Errors
    ///
    /// [`AllocError`](kernel::alloc::AllocError) if there is no memory.
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

// SAFETY: The memory is that of a box from `kmalloc`, which is the token and which nobody can reach
// meanwhile; any bytes that the device writes are a `T`. Such a box is aligned to 8 bytes or more.
unsafe impl<T: AsBytes + FromBytes + Send + 'static> Buffer for Incoming<T> {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        segments.writable(NonNull::from(&*self.0).cast(), size_of_segment::<T>());
    }

    fn into_token(self) -> NonNull<c_void> {
        NonNull::from(KBox::leak(self.0)).cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token is the box that `into_token` leaked.
        Self(unsafe { KBox::from_raw(token.cast().as_ptr()) })
    }
}

/// One of two kinds of buffer, for a queue that carries both. The lowest bit of its token says
/// which.
pub enum Either<A: Buffer, B: Buffer> {
    /// The first kind.
    Left(A),
    /// The second kind.
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

// SAFETY: Each kind keeps its own promise, and its token has the lowest bit free, which says the
// kind.
unsafe impl<A: Buffer, B: Buffer> Buffer for Either<A, B> {
    // The lowest bit is taken. So an `Either` within an `Either` does not compile.
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
        // SAFETY: The token of either kind is not null, and its lowest bit is 0.
        let inner = unsafe { NonNull::new_unchecked(address) };
        if token.addr().get() & Self::TAG == 0 {
            // SAFETY: A token without the tag comes from an `A`.
            Self::Left(unsafe { A::from_token(inner) })
        } else {
            // SAFETY: A token with the tag comes from a `B`.
            Self::Right(unsafe { B::from_token(inner) })
        }
    }
}
