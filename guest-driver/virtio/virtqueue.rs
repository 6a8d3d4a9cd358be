// SPDX-License-Identifier: GPL-2.0

//! Virtqueues.

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

/// Is told that the device has used buffers.
pub trait QueueHandler: Send + Sync + 'static {
    /// The device has used buffers of the queue with this number, or seems to: there may be none.
    ///
    /// Hard interrupt context: must not sleep. May use the [`Virtqueue`]; what is usual is to wake
    /// something that does. May come at any time from [`find_queues`](super::Device::find_queues)
    /// until the queues are gone, also before the device is ready.
    fn used(&self, queue: u16);
}

/// A queue that carries buffers of type `B` to the device and back.
///
/// Has a ring from [`find_queues`](super::Device::find_queues) until the device is
/// [reset](super::Device::reset) or unbound. Before and after that nothing can be added and nothing
/// is popped.
///
/// All methods may be called from any context but NMI, by many at once; each takes a spin lock with
/// interrupts off.
pub struct Virtqueue<B: Buffer> {
    queue: Arc<QueueState>,
    buffers: PhantomData<fn(B) -> B>,
}

impl<B: Buffer> Virtqueue<B> {
    /// Creates a queue whose buffers' use the [`QueueHandler`] is told of. `name` is for humans.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub fn new(name: &'static CStr) -> Result<Self> {
        Self::create(name, true)
    }

    /// Creates a queue that the [`QueueHandler`] is not told of.
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

    /// # Safety
    ///
    /// As for [`Buffer::from_token`].
    unsafe fn drop_token(token: NonNull<c_void>) {
        // SAFETY: By the requirement of this function.
        drop(unsafe { B::from_token(token) });
    }

    /// Gives `buffer` to the device, which learns of it by the next [`kick`](Self::kick).
    ///
    /// # Errors
    ///
    /// Returns the buffer, and why it was not taken. A full ring is tested for without a
    /// notification of the device.
    pub fn add(&self, buffer: B) -> Result<(), AddError<B>> {
        let mut segments = Segments::from_buffer(&buffer);
        let mut state = self.queue.state().lock();
        let failure = match state.live() {
            None => AddFailure::Gone,
            Some(ring) => match Self::check(ring, &segments) {
                Err(failure) => failure,
                Ok(()) => {
                    let token = buffer.into_token();
                    // SAFETY: `check` looked at the segments; the lock makes the ring ours; the
                    // token is new.
                    let result = unsafe { segments.add_to(ring.as_non_null(), token) };
                    if result == 0 {
                        state.pending_kick = true;
                        return Ok(());
                    }
                    drop(state);
                    return Err(AddError {
                        // SAFETY: The ring has not taken the token.
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

    /// Tells the device that there are buffers, unless it has said that it does not want to know, or
    /// none was added since it was last told.
    ///
    /// The latter the ring itself minds only with event index: without, it would notify each time.
    ///
    /// The notification itself, which may leave the guest, happens outside the lock.
    pub fn kick(&self) -> Kick {
        // The ring is not deleted before all read-side sections that saw it live have ended.
        let _guard = rcu::read_lock();
        let mut state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return Kick::Failed;
        };
        if !core::mem::take(&mut state.pending_kick) {
            return Kick::NotNeeded;
        }
        // SAFETY: The ring of a live queue is valid, and the lock makes it ours.
        let wanted = unsafe { bindings::virtqueue_kick_prepare(ring.as_ptr()) };
        drop(state);
        if !wanted {
            return Kick::NotNeeded;
        }
        // SAFETY: The ring is valid until the read-side section ends; to notify needs no lock.
        if unsafe { bindings::virtqueue_notify(ring.as_ptr()) } {
            Kick::Sent
        } else {
            Kick::Failed
        }
    }

    /// Takes back a buffer that the device has used, and how many bytes it says to have written:
    /// never more than it was allowed to write.
    pub fn get_buf(&self) -> Option<(B, u32)> {
        let mut written = 0;
        let state = self.queue.state().lock();
        let ring = state.live()?;
        // SAFETY: The ring of a live queue is valid, and the lock makes it ours.
        let token = unsafe { bindings::virtqueue_get_buf(ring.as_ptr(), &mut written) };
        drop(state);
        // SAFETY: Only `add` puts tokens into the ring, those of a `B`, and the ring gives each out
        // once.
        let buffer = unsafe { B::from_token(NonNull::new(token)?) };
        let written = written.min(Segments::from_buffer(&buffer).writable_bytes());
        Some((buffer, written))
    }

    /// Takes back a buffer that was in flight when the ring ceased to exist.
    ///
    /// The buffers that nobody takes are dropped when the device is unbound or gets a new ring.
    pub fn detach_unused_buf(&self) -> Option<B> {
        let Token(token) = self.queue.take_detached()?;
        // SAFETY: Only `add` makes tokens, those of a `B`; this one is out of the ring and was
        // taken once.
        Some(unsafe { B::from_token(token) })
    }

    /// Asks the device for no more interrupts of this queue. It may send some all the same.
    pub fn disable_callback(&self) {
        if let Some(ring) = self.queue.state().lock().live() {
            // SAFETY: The ring of a live queue is valid, and the lock makes it ours.
            unsafe { bindings::virtqueue_disable_cb(ring.as_ptr()) };
        }
    }

    /// Asks the device for an interrupt at the next used buffer.
    ///
    /// Returns `false` if there is a used buffer already: then pop again, an interrupt may not come.
    pub fn enable_callback(&self) -> bool {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return true;
        };
        // SAFETY: The ring of a live queue is valid, and the lock makes it ours.
        unsafe { bindings::virtqueue_enable_cb(ring.as_ptr()) }
    }

    /// Asks the device for an interrupt when most of the buffers in flight are used.
    ///
    /// Returns `false` if they are already: then pop again, an interrupt may not come.
    pub fn enable_callback_delayed(&self) -> bool {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return true;
        };
        // SAFETY: The ring of a live queue is valid, and the lock makes it ours.
        unsafe { bindings::virtqueue_enable_cb_delayed(ring.as_ptr()) }
    }

    /// Says whether the queue can move nothing any more: the device broke the rules or is gone, or
    /// there is no ring.
    ///
    /// Whoever waits for a buffer should look at this now and then.
    pub fn is_broken(&self) -> bool {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return true;
        };
        // SAFETY: The ring of a live queue is valid.
        unsafe { bindings::virtqueue_is_broken(ring.as_ptr()) }
    }

    /// Returns how many entries of the ring are free; a buffer takes one for each of its segments.
    /// 0 without a ring.
    pub fn free_entries(&self) -> usize {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return 0;
        };
        // SAFETY: The ring of a live queue is valid, and the lock makes it ours.
        unsafe { (*ring.as_ptr()).num_free as usize }
    }

    /// Returns how many entries the ring has. 0 without a ring.
    pub fn entries(&self) -> usize {
        let state = self.queue.state().lock();
        let Some(ring) = state.live() else {
            return 0;
        };
        // SAFETY: The ring of a live queue is valid.
        unsafe { bindings::virtqueue_get_vring_size(ring.as_ptr()) as usize }
    }
}

/// What became of a [`kick`](Virtqueue::kick).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// The device was notified.
    Sent,
    /// The device did not want to be notified: it looks at the ring by itself.
    NotNeeded,
    /// The queue is broken, or has no ring.
    Failed,
}

/// A buffer that could not be added.
pub struct AddError<B> {
    /// The buffer.
    pub buffer: B,
    /// The reason.
    pub failure: AddFailure,
}

/// Why a buffer could not be added, and when to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddFailure {
    /// There is no room in the ring: try when the device has used a buffer, of which an interrupt
    /// tells if it is [asked for](Virtqueue::enable_callback).
    Full,
    /// There is no memory to map the buffer for the device or to list its segments: try after a
    /// while, of which nothing tells.
    NoMemory,
    /// The device broke the rules or is gone: do not try before the device was reset.
    Broken,
    /// The queue has no ring (yet, or any more): do not try before it has one.
    Gone,
    /// The buffer is empty, has an empty segment, or more segments than the ring has entries: do not
    /// try.
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

/// A [`Virtqueue`], whatever it carries.
pub trait AnyQueue: sealed::Sealed {}

impl<B: Buffer> sealed::Sealed for Virtqueue<B> {
    fn queue_state(&self) -> &Arc<QueueState> {
        &self.queue
    }
}

impl<B: Buffer> AnyQueue for Virtqueue<B> {}
