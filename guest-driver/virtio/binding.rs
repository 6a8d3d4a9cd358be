// SPDX-License-Identifier: GPL-2.0

//! The state of a device while a driver is bound to it.
//!
//! A mutex protects the virtqueues and the access to configuration space. Queue callbacks run in
//! interrupt context and take no lock: they only read the handler, which does not change while
//! virtqueues exist.

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

/// The virtqueues, their handler, and the access to configuration space.
///
/// `priv` of the device points to the binding while a driver is bound. `priv` of a
/// `struct virtqueue` belongs to the transport.
#[pin_data]
pub(super) struct Binding {
    vdev: NonNull<bindings::virtio_device>,
    /// Only written while the transport has no virtqueue of the device, so no callback reads it.
    handler: UnsafeCell<Option<Arc<dyn QueueHandler>>>,
    #[pin]
    inner: Mutex<Inner>,
}

struct Inner {
    /// The queues, in the order of their indices. They belong to this binding only while `live` is
    /// set. Afterwards they may have a ring of another device.
    queues: KVec<Arc<QueueState>>,
    /// Whether the virtqueues exist.
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
    /// `vdev` must be a valid device that is being bound. [`unbind`](Self::unbind) must be called
    /// before the device is unbound, and before the binding is dropped. All methods require process
    /// context.
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
        // SAFETY: The device is valid until it is unbound, and `unbind` revokes the access before
        // that.
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
        // SAFETY: The transport has no virtqueue, so no callback reads the handler.
        let old = unsafe { self.handler.get().replace(Some(handler)) };
        // SAFETY: The device is valid, and both arrays have the given length. The names and the
        // callback live as long as the module, which is not unloaded before the driver is
        // unregistered.
        let found = to_result(unsafe {
            bindings::vbrs_virtio_find_vqs(
                self.vdev.as_ptr(),
                queues.len() as c_uint,
                rings.as_mut_ptr(),
                infos.as_mut_ptr(),
            )
        });
        if found.is_err() {
            // SAFETY: A transport that fails leaves no virtqueue, so no callback reads the handler.
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
                // SAFETY: The queue was claimed above. The transport has created the ring, and
                // `reset` deletes it only after it has quiesced the queue.
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

    /// Resets the device, deletes its virtqueues, and detaches the buffers in flight. Idempotent.
    pub(super) fn reset(&self) {
        let mut inner = self.inner.lock();
        if inner.live {
            for queue in &inner.queues {
                queue.quiesce();
            }
            // Notifications that saw the queue live have ended after this.
            synchronize_rcu();
        }
        // SAFETY: The device is valid, this is process context, and no queue notifies the device.
        unsafe { bindings::virtio_reset_device(self.vdev.as_ptr()) };
        if !inner.live {
            return;
        }
        for queue in &inner.queues {
            // SAFETY: The queue was quiesced and the device was reset above.
            unsafe { queue.detach_all_unused() };
        }
        // SAFETY: The virtqueues exist, and all queues are quiesced, so no operation uses them.
        unsafe { bindings::vbrs_virtio_del_vqs(self.vdev.as_ptr()) };
        for queue in &inner.queues {
            // SAFETY: The ring was deleted above, so neither the driver nor the device uses it.
            unsafe { queue.release() };
        }
        inner.live = false;
        // SAFETY: The transport has no virtqueue, so no callback reads the handler.
        let handler = unsafe { self.handler.get().replace(None) };
        drop(inner);
        drop(handler);
    }

    /// Drops the detached buffers that the driver has not taken.
    pub(super) fn drop_detached(&self) {
        let inner = self.inner.lock();
        for queue in &inner.queues {
            queue.drop_detached();
        }
    }

    /// Ends all access to the device. The driver can still take detached buffers.
    pub(super) fn shut_down(&self) {
        self.reset();
        let config = self.inner.lock().config.take();
        if let Some(config) = config {
            config.revoke();
        }
    }

    /// Ends all access to the device, as [`shut_down`](Self::shut_down), and drops detached
    /// buffers.
    pub(super) fn unbind(&self) {
        self.shut_down();
        self.drop_detached();
    }

    /// The callback of the transport for used buffers, in interrupt context.
    extern "C" fn used_callback(vq: *mut bindings::virtqueue) {
        // SAFETY: The transport passes a valid virtqueue of this driver. Its device has a binding
        // while it has virtqueues. The handler was set before the virtqueue was created, and
        // remains until the virtqueue is deleted.
        let (handler, index) = unsafe {
            let binding = (*(*vq).vdev).priv_.cast::<Self>();
            (&*(*binding).handler.get(), (*vq).index)
        };
        if let (Some(handler), Ok(index)) = (handler, u16::try_from(index)) {
            handler.used(index);
        }
    }
}

/// Claimed queues. Dropping this releases them, unless [`keep`](Self::keep) was called.
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
            // SAFETY: `new` claimed the queue, and it has no ring.
            unsafe { queue.release() };
        }
    }
}
