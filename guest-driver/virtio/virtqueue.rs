// SPDX-License-Identifier: GPL-2.0

//! Virtqueues.
//!
//! A [`Virtqueue`] is a handle to a `QueueState`, which has a ring only while the device is bound
//! and not reset. A spin lock of the queue serialises all access to the ring. A kick notifies the
//! device outside that lock, in an RCU read-side critical section.
//!
//! C header: [`include/linux/virtio.h`](srctree/include/linux/virtio.h)

use super::{
    buffer::{Buffer, Segments},
    queue_state::{QueueState, Ring, Token},
};
use crate::bindings;
use core::{ffi::c_void, fmt, marker::PhantomData, ptr::NonNull};
use kernel::{
    prelude::*,
    sync::{rcu, Arc},
};

/// Callback for used buffers.
#[doc(alias = "vq_callback_t")]
pub trait QueueHandler: Send + Sync + 'static {
    /// Called when the device has used buffers of the queue with this index. The call may be
    /// spurious: there may be no used buffer.
    ///
    /// Hard interrupt context: must not sleep. May call methods of the [`Virtqueue`], and usually
    /// enqueues a work item that does. May be called from the start of
    /// [`find_queues`](super::Device::find_queues) until the virtqueues are deleted, also before
    /// the device is ready.
    fn used(&self, queue: u16);
}

/// A virtqueue that exchanges buffers of type `B` with the device.
///
/// It has a ring from [`find_queues`](super::Device::find_queues) until the device is
/// [reset](super::Device::reset) or unbound. Without a ring, no buffer can be added, and no used
/// buffer is returned.
///
/// All methods may be called concurrently, and in any context but NMI. Each takes a spin lock with
/// interrupts disabled.
#[doc(alias = "virtqueue")]
pub struct Virtqueue<B: Buffer> {
    queue: Arc<QueueState>,
    buffers: PhantomData<fn(B) -> B>,
}

impl<B: Buffer> Virtqueue<B> {
    /// Creates a virtqueue that calls the [`QueueHandler`] for used buffers. `name` identifies the
    /// queue, for example in `/proc/interrupts`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub fn new(name: &'static CStr) -> Result<Self> {
        Self::create(name, true)
    }

    /// Creates a virtqueue that does not call the [`QueueHandler`].
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub fn without_callback(name: &'static CStr) -> Result<Self> {
        Self::create(name, false)
    }

    fn create(name: &'static CStr, has_callback: bool) -> Result<Self> {
        Ok(Self {
            queue: QueueState::new(name, has_callback, Self::drop_token)?,
            buffers: PhantomData,
        })
    }

    /// Drops the buffer of a token.
    ///
    /// # Safety
    ///
    /// As for [`Buffer::from_token`].
    unsafe fn drop_token(token: NonNull<c_void>) {
        // SAFETY: By the safety requirements of this function.
        drop(unsafe { B::from_token(token) });
    }

    /// Makes `buffer` available to the device. The next [`kick`](Self::kick) notifies the device.
    ///
    /// # Errors
    ///
    /// Returns the buffer and the reason. The method checks for free entries before it calls the
    /// ring, because `virtqueue_add_sgs()` notifies the device of a full ring.
    #[doc(alias = "virtqueue_add_sgs")]
    #[doc(alias = "virtqueue_add_outbuf")]
    #[doc(alias = "virtqueue_add_inbuf")]
    pub fn add(&self, buffer: B) -> Result<(), AddError<B>> {
        let mut segments = Segments::from_buffer(&buffer);
        let mut state = self.queue.state().lock();
        let failure = match state.live() {
            None => AddFailure::Gone,
            Some(ring) => match Self::check(ring, &segments) {
                Err(failure) => failure,
                Ok(()) => {
                    let token = buffer.into_token();
                    // SAFETY: `check` found the segments valid. The lock serialises access to the
                    // ring. The token was created just now from a buffer with these segments.
                    let result = unsafe { segments.add_to(ring.as_non_null(), token) };
                    if result == 0 {
                        state.pending_kick = true;
                        return Ok(());
                    }
                    drop(state);
                    return Err(AddError {
                        // SAFETY: The ring has refused the token, which was created above.
                        buffer: unsafe { B::from_token(token) },
                        failure: AddFailure::from_errno(result),
                    });
                }
            },
        };
        drop(state);
        Err(AddError { buffer, failure })
    }

    fn check(ring: Ring, segments: &Segments) -> Result<(), AddFailure> {
        if !segments.is_valid() {
            return Err(AddFailure::Malformed);
        }
        // SAFETY: The ring of a live queue is valid.
        let (size, free, broken) = unsafe {
            (
                bindings::virtqueue_get_vring_size(ring.as_ptr()) as usize,
                (*ring.as_ptr()).num_free as usize,
                bindings::virtqueue_is_broken(ring.as_ptr()),
            )
        };
        let needed = if ring.has_indirect_desc() {
            1
        } else {
            segments.count()
        };
        if broken {
            Err(AddFailure::Broken)
        } else if needed > size {
            Err(AddFailure::Malformed)
        } else if needed > free {
            Err(AddFailure::Full)
        } else {
            Ok(())
        }
    }

    /// Notifies the device of available buffers, unless the device has suppressed notifications or
    /// no kick is pending.
    ///
    /// A kick is pending if a buffer was added since the last `kick`. Without this check, a ring
    /// without `VIRTIO_RING_F_EVENT_IDX` would also notify the device if no buffer was added.
    ///
    /// The notification itself may exit to the hypervisor. It is sent outside the lock.
    #[doc(alias = "virtqueue_kick")]
    #[doc(alias = "virtqueue_kick_prepare")]
    #[doc(alias = "virtqueue_notify")]
    pub fn kick(&self) -> Kick {
        // The ring is not deleted before all read-side critical sections that saw the queue live
        // have ended.
        let _guard = rcu::read_lock();
        let mut state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return Kick::Failed;
        };
        if !core::mem::take(&mut state.pending_kick) {
            return Kick::NotNeeded;
        }
        // SAFETY: The ring of a live queue is valid, and the lock serialises access to it.
        let wanted = unsafe { bindings::virtqueue_kick_prepare(ring.as_ptr()) };
        drop(state);
        if !wanted {
            return Kick::NotNeeded;
        }
        // SAFETY: The ring is valid until the read-side critical section ends. A notification
        // requires no lock.
        if unsafe { bindings::virtqueue_notify(ring.as_ptr()) } {
            Kick::Sent
        } else {
            Kick::Failed
        }
    }

    /// Returns a used buffer, and the number of bytes that the device has written. The number is
    /// clamped to the bytes that the device may write.
    #[doc(alias = "virtqueue_get_buf")]
    pub fn get_buf(&self) -> Option<(B, u32)> {
        let mut written = 0;
        let state = self.queue.state().lock();
        let ring = state.live()?;
        // SAFETY: The ring of a live queue is valid, and the lock serialises access to it.
        let token = unsafe { bindings::virtqueue_get_buf(ring.as_ptr(), &mut written) };
        drop(state);
        // SAFETY: Only `add` adds tokens to the ring, all of them of a `B`. The ring returns each
        // token only once.
        let buffer = unsafe { B::from_token(NonNull::new(token)?) };
        let written = written.min(Segments::from_buffer(&buffer).writable_bytes());
        Some((buffer, written))
    }

    /// Returns a buffer that was in flight when the ring was deleted.
    ///
    /// Buffers that the driver does not take are dropped when the device is unbound, or when the
    /// queue gets a new ring.
    #[doc(alias = "virtqueue_detach_unused_buf")]
    pub fn detach_unused_buf(&self) -> Option<B> {
        let Token(token) = self.queue.take_detached()?;
        // SAFETY: Only `add` creates tokens, all of them of a `B`. This token was detached from the
        // ring, and `take_detached` returns it only once.
        Some(unsafe { B::from_token(token) })
    }

    /// Asks the device not to send interrupts for this queue. The device may send some
    /// nevertheless.
    #[doc(alias = "virtqueue_disable_cb")]
    pub fn disable_callback(&self) {
        if let Some(ring) = self.queue.state().lock().live() {
            // SAFETY: The ring of a live queue is valid, and the lock serialises access to it.
            unsafe { bindings::virtqueue_disable_cb(ring.as_ptr()) };
        }
    }

    /// Asks the device for an interrupt when it uses the next buffer.
    ///
    /// Returns `false` if a used buffer is pending already. The caller must then call
    /// [`get_buf`](Self::get_buf) again, because no interrupt may follow.
    #[doc(alias = "virtqueue_enable_cb")]
    pub fn enable_callback(&self) -> bool {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return true;
        };
        // SAFETY: The ring of a live queue is valid, and the lock serialises access to it.
        unsafe { bindings::virtqueue_enable_cb(ring.as_ptr()) }
    }

    /// Asks the device for an interrupt when it has used most of the buffers in flight.
    ///
    /// Returns `false` if it has used them already. The caller must then call
    /// [`get_buf`](Self::get_buf) again, because no interrupt may follow.
    #[doc(alias = "virtqueue_enable_cb_delayed")]
    pub fn enable_callback_delayed(&self) -> bool {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return true;
        };
        // SAFETY: The ring of a live queue is valid, and the lock serialises access to it.
        unsafe { bindings::virtqueue_enable_cb_delayed(ring.as_ptr()) }
    }

    /// Returns whether the queue is broken: the device violated the protocol or was removed, or the
    /// queue has no ring.
    ///
    /// No interrupt reports this. Code that waits for a used buffer should check it periodically.
    #[doc(alias = "virtqueue_is_broken")]
    pub fn is_broken(&self) -> bool {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return true;
        };
        // SAFETY: The ring of a live queue is valid.
        unsafe { bindings::virtqueue_is_broken(ring.as_ptr()) }
    }

    /// Returns the number of free entries in the ring, 0 without a ring. A buffer takes at most one
    /// entry per segment, or a single entry if it uses indirect descriptors.
    #[doc(alias = "num_free")]
    pub fn free_entries(&self) -> usize {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return 0;
        };
        // SAFETY: The ring of a live queue is valid, and the lock serialises access to it.
        unsafe { (*ring.as_ptr()).num_free as usize }
    }

    /// Returns the number of entries in the ring, 0 without a ring.
    #[doc(alias = "virtqueue_get_vring_size")]
    pub fn entries(&self) -> usize {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return 0;
        };
        // SAFETY: The ring of a live queue is valid.
        unsafe { bindings::virtqueue_get_vring_size(ring.as_ptr()) as usize }
    }
}

/// The result of a [`kick`](Virtqueue::kick).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// The device was notified.
    Sent,
    /// No notification was needed: no kick was pending, or the device has suppressed notifications.
    NotNeeded,
    /// The queue is broken or has no ring.
    Failed,
}

/// The error of [`Virtqueue::add`], with the buffer.
pub struct AddError<B> {
    /// The buffer that was not added.
    pub buffer: B,
    /// The reason.
    pub failure: AddFailure,
}

/// The reason why a buffer was not added, and when to retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddFailure {
    /// The ring has too few free entries. Retry after the device has used a buffer: see
    /// [`enable_callback`](Virtqueue::enable_callback).
    Full,
    /// The buffer could not be mapped for the device. Retry after a delay: no interrupt follows.
    NoMemory,
    /// The device violated the protocol or was removed. Do not retry before the device was reset.
    Broken,
    /// The queue has no ring. Do not retry before it has one.
    Gone,
    /// The buffer has no segment, an empty segment, segments in the wrong order, or too many
    /// segments. Do not retry.
    Malformed,
}

impl AddFailure {
    fn from_errno(errno: c_int) -> Self {
        match Error::from_errno(errno) {
            error if error == ENOSPC => Self::Full,
            error if error == ENOMEM => Self::NoMemory,
            _ => Self::Broken,
        }
    }
}

impl<B> fmt::Debug for AddError<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.failure.fmt(f)
    }
}

mod sealed {
    use super::*;

    pub trait Sealed {
        fn queue_state(&self) -> &Arc<QueueState>;
    }
}

/// A [`Virtqueue`] of any buffer type.
pub trait AnyQueue: sealed::Sealed {}

impl<B: Buffer> sealed::Sealed for Virtqueue<B> {
    fn queue_state(&self) -> &Arc<QueueState> {
        &self.queue
    }
}

impl<B: Buffer> AnyQueue for Virtqueue<B> {}
