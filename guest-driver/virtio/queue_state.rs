// SPDX-License-Identifier: GPL-2.0

//! The state of a [`Virtqueue`](super::Virtqueue), independent of its buffer type.
//!
//! A [`Binding`](super::binding::Binding) claims a queue, attaches a ring to it, quiesces it,
//! detaches its buffers and releases it: see [`Phase`]. A spin lock that is held with interrupts
//! disabled protects the state and serialises access to the ring.

use super::compat::SpinLockIrq;
use crate::bindings;
use core::{ffi::c_void, ptr::NonNull};
use kernel::{prelude::*, static_lock_class, sync::Arc};

/// A ring of the transport.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    vq: NonNull<bindings::virtqueue>,
    has_indirect_desc: bool,
}

// SAFETY: Any thread may use a `struct virtqueue`, if the use is serialised.
unsafe impl Send for Ring {}

impl Ring {
    /// Creates a handle to `vq`.
    ///
    /// # Safety
    ///
    /// `vq` must be a valid virtqueue of a valid device.
    pub(super) unsafe fn new(vq: NonNull<bindings::virtqueue>) -> Self {
        // SAFETY: By the safety requirements of this function, `vq` and its device are valid.
        let has_indirect_desc = unsafe {
            bindings::vbrs_virtio_has_feature(
                (*vq.as_ptr()).vdev,
                bindings::VIRTIO_RING_F_INDIRECT_DESC,
            )
        };
        Self {
            vq,
            has_indirect_desc,
        }
    }

    pub(super) fn as_non_null(self) -> NonNull<bindings::virtqueue> {
        self.vq
    }

    pub(super) fn as_ptr(self) -> *mut bindings::virtqueue {
        self.vq.as_ptr()
    }

    /// Returns whether a buffer of several segments may take a single entry
    /// (`VIRTIO_RING_F_INDIRECT_DESC`).
    pub(super) fn has_indirect_desc(self) -> bool {
        self.has_indirect_desc
    }
}

/// The token of a buffer that the queue owns.
pub(super) struct Token(pub(super) NonNull<c_void>);

// SAFETY: Tokens only come from `Buffer`s, which are `Send`.
unsafe impl Send for Token {}

/// The lifecycle of a queue.
pub(super) enum Phase {
    /// The queue has no ring.
    Idle,
    /// A binding is creating the ring.
    Claimed,
    /// The ring is in use.
    Live(Ring),
    /// The ring exists but is not used: the device is being reset.
    Quiesced(Ring),
}

/// The state that the lock of a queue protects, including the ring.
pub(super) struct State {
    pub(super) phase: Phase,
    /// A buffer was added since the last kick.
    pub(super) pending_kick: bool,
    /// The buffers that were in flight when the ring was deleted. The capacity is that of the ring.
    detached: KVec<Token>,
}

impl State {
    /// Returns the ring if it is in use.
    pub(super) fn live(&self) -> Option<Ring> {
        match self.phase {
            Phase::Live(ring) => Some(ring),
            _ => None,
        }
    }
}

/// A queue, independent of its buffer type.
///
/// It outlives its ring, which a [`Binding`](super::binding::Binding) creates and deletes.
#[pin_data(PinnedDrop)]
pub struct QueueState {
    name: &'static CStr,
    has_callback: bool,
    drop_token: unsafe fn(NonNull<c_void>),
    #[pin]
    state: SpinLockIrq<State>,
}

impl QueueState {
    /// Creates a queue without a ring. `drop_token` drops the buffer of a token.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(super) fn new(
        name: &'static CStr,
        has_callback: bool,
        drop_token: unsafe fn(NonNull<c_void>),
    ) -> Result<Arc<Self>> {
        let state = State {
            phase: Phase::Idle,
            pending_kick: false,
            detached: KVec::new(),
        };
        let queue = pin_init!(Self {
            name,
            has_callback,
            drop_token,
            state <- SpinLockIrq::new(state, c"virtio::Virtqueue", static_lock_class!()),
        });
        Arc::pin_init(queue, GFP_KERNEL)
    }

    pub(super) fn name(&self) -> &'static CStr {
        self.name
    }

    pub(super) fn has_callback(&self) -> bool {
        self.has_callback
    }

    pub(super) fn state(&self) -> &SpinLockIrq<State> {
        &self.state
    }

    /// Claims the queue, to attach a ring to it.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if it has a ring or is claimed.
    pub(super) fn claim(&self) -> Result {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Idle => state.phase = Phase::Claimed,
            _ => return Err(EBUSY),
        }
        Ok(())
    }

    /// Attaches a ring to the queue, and drops detached buffers of an earlier ring.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`]. The queue is unchanged then.
    ///
    /// # Safety
    ///
    /// The caller must have [claimed](Self::claim) the queue. The ring must be valid, and no other
    /// code may use it, until the caller calls [`release`](Self::release).
    pub(super) unsafe fn attach_ring(&self, ring: Ring) -> Result {
        // SAFETY: By the safety requirements of this function, the ring is valid.
        let size = unsafe { bindings::virtqueue_get_vring_size(ring.as_ptr()) } as usize;
        let mut room = KVec::with_capacity(size, GFP_KERNEL)?;
        let mut state = self.state.lock();
        state.phase = Phase::Live(ring);
        state.pending_kick = false;
        core::mem::swap(&mut state.detached, &mut room);
        drop(state);
        self.drop_tokens(room);
        Ok(())
    }

    /// Makes all operations refuse the ring. A notification in progress ends within an RCU grace
    /// period.
    pub(super) fn quiesce(&self) {
        let mut state = self.state.lock();
        if let Phase::Live(ring) = state.phase {
            state.phase = Phase::Quiesced(ring);
        }
    }

    /// Detaches all buffers from the ring. The driver can take them once the queue is
    /// [released](Self::release).
    ///
    /// # Safety
    ///
    /// The queue must be [quiesced](Self::quiesce) and its device reset.
    pub(super) unsafe fn detach_all_unused(&self) {
        let mut state = self.state.lock();
        let Phase::Quiesced(ring) = state.phase else {
            return;
        };
        loop {
            // SAFETY: The ring is valid until `release`, and the lock serialises access to it.
            let token = unsafe { bindings::virtqueue_detach_unused_buf(ring.as_ptr()) };
            let Some(token) = NonNull::new(token) else {
                break;
            };
            // This cannot fail: each buffer takes at least one entry of the ring, and `attach_ring`
            // reserved capacity for all entries. If it failed, the buffer would be leaked, which is
            // safe.
            let _ = state.detached.push_within_capacity(Token(token));
        }
    }

    /// Ends the claim. Detached buffers can be [taken](Self::take_detached) from now on.
    ///
    /// # Safety
    ///
    /// Neither the device nor other code may use the ring from now on.
    pub(super) unsafe fn release(&self) {
        self.state.lock().phase = Phase::Idle;
    }

    /// Returns a detached buffer, if there is one and the queue is released.
    pub(super) fn take_detached(&self) -> Option<Token> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Idle => state.detached.pop(),
            _ => None,
        }
    }

    /// Drops all detached buffers.
    pub(super) fn drop_detached(&self) {
        while let Some(Token(token)) = self.take_detached() {
            // SAFETY: The queue owned the buffer of this token, and the token is not used again.
            unsafe { (self.drop_token)(token) };
        }
    }

    fn drop_tokens(&self, tokens: KVec<Token>) {
        for Token(token) in tokens {
            // SAFETY: The queue owned the buffer of this token, and the token is not used again.
            unsafe { (self.drop_token)(token) };
        }
    }
}

#[pinned_drop]
impl PinnedDrop for QueueState {
    fn drop(self: Pin<&mut Self>) {
        // A binding has a reference to the queue while the ring exists, so the queue has no ring
        // here.
        self.drop_detached();
    }
}
