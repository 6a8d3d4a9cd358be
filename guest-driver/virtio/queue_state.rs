// SPDX-License-Identifier: GPL-2.0

//! What is behind a [`Virtqueue`](super::Virtqueue), whatever it carries.

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

// SAFETY: A `struct virtqueue` may be used from any thread, by one at a time.
unsafe impl Send for Ring {}

impl Ring {
    /// Wraps `vq`.
    ///
    /// # Safety
    ///
    /// `vq` must be a valid queue of a valid device.
    pub(super) unsafe fn new(vq: NonNull<bindings::virtqueue>) -> Self {
        // SAFETY: By the requirement of this function.
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

    /// Says whether buffers of several segments may take a single entry.
    pub(super) fn has_indirect_desc(self) -> bool {
        self.has_indirect_desc
    }
}

/// A buffer that the queue owns, by its token.
pub(super) struct Token(pub(super) NonNull<c_void>);

// SAFETY: `Buffer` is `Send`, and only such become tokens.
unsafe impl Send for Token {}

/// Where a queue is in its life.
pub(super) enum Phase {
    /// There is no ring.
    Idle,
    /// A binding is making the ring.
    Claimed,
    /// The ring works.
    Live(Ring),
    /// The ring exists, but is not used any more: the device is being reset.
    Quiesced(Ring),
}

/// What the lock of a queue guards: the ring, too.
pub(super) struct State {
    pub(super) phase: Phase,
    /// Buffers were added since the device was last told.
    pub(super) pending_kick: bool,
    /// What came back without the device's doing. Has room for all that a ring can hold.
    detached: KVec<Token>,
}

impl State {
    /// Returns the ring if it works.
    pub(super) fn live(&self) -> Option<Ring> {
        match self.phase {
            Phase::Live(ring) => Some(ring),
            _ => None,
        }
    }
}

/// A queue, whatever it carries.
///
/// Outlives the ring behind it, which a [`Binding`](super::binding::Binding) makes and deletes.
#[pin_data(PinnedDrop)]
pub struct QueueState {
    name: &'static CStr,
    has_callback: bool,
    drop_token: unsafe fn(NonNull<c_void>),
    #[pin]
    state: SpinLockIrq<State>,
}

impl QueueState {
    /// Creates a queue without a ring, for buffers that `drop_token` turns back from tokens and
    /// drops.
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

    /// Reserves the queue for a ring to come.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if it has a ring or is reserved.
    pub(super) fn claim(&self) -> Result {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Idle => state.phase = Phase::Claimed,
            _ => return Err(EBUSY),
        }
        Ok(())
    }

    /// Gives the queue its ring.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`]; the queue is as before then.
    ///
    /// # Safety
    ///
    /// The caller must have [claimed](Self::claim) the queue. The ring must be valid and used by
    /// nobody else until the caller calls [`release`](Self::release).
    pub(super) unsafe fn attach_ring(&self, ring: Ring) -> Result {
        // SAFETY: The ring is valid.
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

    /// Makes every operation refuse the ring. Notifications that have begun go on until the next
    /// RCU grace period.
    pub(super) fn quiesce(&self) {
        let mut state = self.state.lock();
        if let Phase::Live(ring) = state.phase {
            state.phase = Phase::Quiesced(ring);
        }
    }

    /// Takes all buffers out of the ring. They come back to the driver once the queue is
    /// [released](Self::release).
    ///
    /// # Safety
    ///
    /// The queue must be [stopped](Self::quiesce) and its device reset.
    pub(super) unsafe fn detach_all_unused(&self) {
        let mut state = self.state.lock();
        let Phase::Quiesced(ring) = state.phase else {
            return;
        };
        loop {
            // SAFETY: The ring is valid until the release, and the lock makes it ours.
            let token = unsafe { bindings::virtqueue_detach_unused_buf(ring.as_ptr()) };
            let Some(token) = NonNull::new(token) else {
                break;
            };
            // A buffer takes at least one entry of the ring, and `attach_ring` made room for all
            // entries. Were it not so, to leak the buffer would be the lesser evil.
            let _ = state.detached.push_within_capacity(Token(token));
        }
    }

    /// Ends the claim. What was in flight can be [taken](Self::take_detached).
    ///
    /// # Safety
    ///
    /// Nobody may use the ring any more, device included.
    pub(super) unsafe fn release(&self) {
        self.state.lock().phase = Phase::Idle;
    }

    /// Takes one of the buffers that came back when the ring went.
    pub(super) fn take_detached(&self) -> Option<Token> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Idle => state.detached.pop(),
            _ => None,
        }
    }

    /// Drops the buffers that came back when the ring went.
    pub(super) fn drop_detached(&self) {
        while let Some(Token(token)) = self.take_detached() {
            // SAFETY: The queue owned the buffer of this token, and no more.
            unsafe { (self.drop_token)(token) };
        }
    }

    fn drop_tokens(&self, tokens: KVec<Token>) {
        for Token(token) in tokens {
            // SAFETY: The queue owned the buffer of this token, and no more.
            unsafe { (self.drop_token)(token) };
        }
    }
}

#[pinned_drop]
impl PinnedDrop for QueueState {
    fn drop(self: Pin<&mut Self>) {
        // A binding holds a reference while there is a ring, so there is none now.
        self.drop_detached();
    }
}
