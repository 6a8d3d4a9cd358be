// SPDX-License-Identifier: GPL-2.0

//! What the bus keeps for a device while a driver is bound to it.

use super::{
    compat::synchronize_rcu,
    config::{Config, ConfigSpace},
    queue_state::{QueueState, Ring},
    virtqueue::{AnyQueue, QueueHandler},
};
use crate::bindings;
use core::{
    cell::UnsafeCell,
    ptr::{self, NonNull},
};
use kernel::{
    error::to_result,
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// The queues, their handler, and the access to configuration space.
///
/// `priv` of the device points to it while a driver is bound. `priv` of a queue is the transport's.
#[pin_data]
pub(super) struct Binding {
    vdev: NonNull<bindings::virtio_device>,
    /// Written only while the transport has no queue of the device, hence nobody reads it.
    handler: UnsafeCell<Option<Arc<dyn QueueHandler>>>,
    #[pin]
    inner: Mutex<Inner>,
}

struct Inner {
    /// The queues, in the device's order. Ours only while they are live: afterwards they may have
    /// found another device.
    queues: KVec<Arc<QueueState>>,
    /// Whether the transport has made them.
    live: bool,
    config: Option<Arc<ConfigSpace>>,
}

impl Binding {
    /// Creates the binding of `vdev`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    ///
    /// # Safety
    ///
    /// `vdev` must be a valid device that is being bound. Before it is unbound, and before the
    /// binding is dropped, [`unbind`](Self::unbind) must be called. All calls need process context.
    pub(super) unsafe fn new(vdev: NonNull<bindings::virtio_device>) -> Result<Pin<KBox<Self>>> {
        let inner = Inner {
            queues: KVec::new(),
            live: false,
            config: None,
        };
        let binding = pin_init!(Self {
            vdev,
            handler: UnsafeCell::new(None),
            inner <- new_mutex!(inner, "virtio::Binding"),
        });
        KBox::pin_init(binding, GFP_KERNEL)
    }

    /// See [`Device::config`](super::Device::config).
    pub(super) fn config(&self, size: usize) -> Result<Config> {
        let mut inner = self.inner.lock();
        if let Some(space) = &inner.config {
            return space.handle(size);
        }
        // SAFETY: The device is valid until it is unbound, and `unbind` revokes the access before.
        let space = unsafe { ConfigSpace::new(self.vdev)? };
        let config = space.handle(size);
        inner.config = Some(space);
        config
    }

    /// See [`Device::find_queues`](super::Device::find_queues).
    pub(super) fn find_queues(
        &self,
        queues: &[&dyn AnyQueue],
        handler: Arc<dyn QueueHandler>,
    ) -> Result {
        let mut inner = self.inner.lock();
        if inner.live {
            return Err(EBUSY);
        }
        if queues.is_empty() || queues.len() > usize::from(u16::MAX) {
            return Err(EINVAL);
        }

        let mut states = KVec::with_capacity(queues.len(), GFP_KERNEL)?;
        let mut infos = KVec::with_capacity(queues.len(), GFP_KERNEL)?;
        for queue in queues {
            let queue = queue.queue_state();
            let info = bindings::virtqueue_info {
                name: queue.name().as_char_ptr(),
                callback: queue.has_callback().then_some(Self::used_callback),
                ctx: false,
            };
            states.push(queue.clone(), GFP_KERNEL)?;
            infos.push(info, GFP_KERNEL)?;
        }
        let mut rings = KVec::from_elem(ptr::null_mut(), queues.len(), GFP_KERNEL)?;

        let claims = Claims::new(&states)?;
        // SAFETY: The transport has no queue, so nobody reads the handler.
        let old = unsafe { self.handler.get().replace(Some(handler)) };
        // SAFETY: The device is valid; both arrays are as long as said, and names and callback live
        // as long as the module, which does not go before the driver is unregistered.
        let found = to_result(unsafe {
            bindings::vbrs_virtio_find_vqs(
                self.vdev.as_ptr(),
                queues.len() as c_uint,
                rings.as_mut_ptr(),
                infos.as_mut_ptr(),
            )
        });
        if found.is_err() {
            // SAFETY: A transport that fails leaves no queue.
            let handler = unsafe { self.handler.get().replace(None) };
            drop(inner);
            drop((old, handler));
            return found;
        }

        claims.keep();
        let old_queues = core::mem::replace(&mut inner.queues, states);
        inner.live = true;
        let mut result = Ok(());
        for (queue, ring) in inner.queues.iter().zip(rings) {
            result = NonNull::new(ring).ok_or(EINVAL).and_then(|ring| {
                // SAFETY: Claimed above; the transport has made the ring, and `reset` deletes
                // it after it has stopped the queue.
                unsafe { queue.attach_ring(Ring::new(ring)) }
            });
            if result.is_err() {
                break;
            }
        }
        drop(inner);
        drop((old, old_queues));
        if result.is_err() {
            self.reset();
        }
        result
    }

    /// Resets the device, deletes its queues, and makes the buffers in flight available.
    /// Idempotent.
    pub(super) fn reset(&self) {
        let mut inner = self.inner.lock();
        if inner.live {
            for queue in &inner.queues {
                queue.quiesce();
            }
            // Notifications that saw a queue live end here.
            synchronize_rcu();
        }
        // SAFETY: The device is valid, this is process context, and nobody notifies it any more.
        unsafe { bindings::virtio_reset_device(self.vdev.as_ptr()) };
        if !inner.live {
            return;
        }
        for queue in &inner.queues {
            // SAFETY: Stopped above, and the device is reset.
            unsafe { queue.detach_all_unused() };
        }
        // SAFETY: The transport has queues, of which nobody makes use.
        unsafe { bindings::vbrs_virtio_del_vqs(self.vdev.as_ptr()) };
        for queue in &inner.queues {
            // SAFETY: The ring does not exist any more, for us or for the device.
            unsafe { queue.release() };
        }
        inner.live = false;
        // SAFETY: The transport has no queue any more, so nobody reads the handler.
        let handler = unsafe { self.handler.get().replace(None) };
        drop(inner);
        drop(handler);
    }

    /// Drops what was in flight when the queues were deleted and nobody took.
    pub(super) fn drop_detached(&self) {
        let inner = self.inner.lock();
        for queue in &inner.queues {
            queue.drop_detached();
        }
    }

    /// Ends all that the driver can do with the device. What was in flight can still be taken.
    pub(super) fn shut_down(&self) {
        self.reset();
        let config = self.inner.lock().config.take();
        if let Some(config) = config {
            config.revoke();
        }
    }

    /// As [`shut_down`](Self::shut_down), and drops what was in flight and nobody took.
    pub(super) fn unbind(&self) {
        self.shut_down();
        self.drop_detached();
    }

    /// What the transport calls from its interrupt.
    extern "C" fn used_callback(vq: *mut bindings::virtqueue) {
        // SAFETY: The transport calls with a valid queue of ours, whose device has a binding as
        // long as it has queues. The handler was set before the queue came to be and stays until it
        // has gone.
        let (handler, index) = unsafe {
            let binding = (*(*vq).vdev).priv_.cast::<Self>();
            (&*(*binding).handler.get(), (*vq).index)
        };
        if let (Some(handler), Ok(index)) = (handler, u16::try_from(index)) {
            handler.used(index);
        }
    }
}

/// Queues that are claimed until they are kept, or released when this is dropped.
struct Claims<'a>(&'a [Arc<QueueState>]);

impl<'a> Claims<'a> {
    fn new(queues: &'a [Arc<QueueState>]) -> Result<Self> {
        let mut claims = Self(&[]);
        for (index, queue) in queues.iter().enumerate() {
            queue.claim()?;
            claims.0 = &queues[..=index];
        }
        Ok(claims)
    }

    fn keep(mut self) {
        self.0 = &[];
    }
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        for queue in self.0 {
            // SAFETY: Claimed by us, and without a ring.
            unsafe { queue.release() };
        }
    }
}
