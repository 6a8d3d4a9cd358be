// SPDX-License-Identifier: GPL-2.0

//! Virtio devices and feature negotiation.
//!
//! C header: [`include/linux/virtio.h`](srctree/include/linux/virtio.h)

use super::{binding::Binding, config::Config, virtqueue::AnyQueue, QueueHandler};
use crate::bindings;
use core::{marker::PhantomData, mem::offset_of, ptr::NonNull};
use kernel::{
    device,
    prelude::*,
    sync::{aref::AlwaysRefCounted, Arc},
    types::Opaque,
};

/// A virtio device.
///
/// `Ctx` is the device context, as on other buses: [`device::Core`] in a bus callback,
/// [`device::Bound`] while a driver is bound, [`device::Normal`] otherwise.
///
/// # Invariants
///
/// A `Device` represents a valid `struct virtio_device` that the C portion of the kernel created.
#[doc(alias = "virtio_device")]
#[repr(transparent)]
pub struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::virtio_device>,
    PhantomData<Ctx>,
);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    /// Returns a pointer to the C structure.
    pub(super) fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }
}

impl Device<device::Bound> {
    /// Returns whether feature `bit` was negotiated. `false` for a bit that the driver did not
    /// request.
    ///
    /// Any context.
    #[doc(alias = "virtio_has_feature")]
    #[inline]
    pub fn has_feature(&self, bit: u32) -> bool {
        // SAFETY: By the type invariant, the device is valid. Its features do not change while a
        // driver is bound.
        unsafe { bindings::vbrs_virtio_has_feature(self.as_raw(), bit) }
    }

    /// Returns the negotiated features 0 to 63 as a bit mask.
    ///
    /// Any context.
    pub fn features(&self) -> u64 {
        (0..u64::BITS)
            .filter(|&bit| self.has_feature(bit))
            .fold(0, |set, bit| set | (1 << bit))
    }
}

impl Device<device::Core<'_>> {
    /// Returns a handle to the first `size` bytes of configuration space. The handle may be cloned,
    /// and may outlive the binding.
    ///
    /// `size` is the size that the specification defines for the negotiated features. If the
    /// transport reports the size of configuration space, a device with less is refused. PCI
    /// reports it. MMIO and the vhost-user transport of user-mode Linux do not, and do not call
    /// `BUG()` for an access beyond the end.
    ///
    /// Process context, may sleep.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the transport gives no access to configuration space, or to less than `size`
    /// bytes. The latter is logged. [`ENOMEM`].
    pub fn config(&self, size: usize) -> Result<Config> {
        self.binding().config(size)
    }

    /// Creates the virtqueues of the device.
    ///
    /// The order of `queues` determines their indices. When the device has used a buffer, `handler`
    /// is called with the index of the queue, unless the queue was created [without a
    /// callback](super::Virtqueue::without_callback). This may happen before this function returns.
    ///
    /// May be called once per binding, and again after [`reset`](Self::reset). Must be called
    /// before [`ready`](Self::ready).
    ///
    /// Process context, may sleep.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if the device has virtqueues already, or if one of `queues` is in use. [`EINVAL`]
    /// if `queues` is empty. Otherwise [`ENOMEM`], or the error of the transport.
    #[doc(alias = "virtio_find_vqs")]
    #[doc(alias = "find_vqs")]
    #[inline]
    pub fn find_queues(&self, queues: &[&dyn AnyQueue], handler: Arc<dyn QueueHandler>) -> Result {
        self.binding().find_queues(queues, handler)
    }

    /// Sets `DRIVER_OK`: the driver is ready, and the virtqueues work from now on.
    ///
    /// The bus calls it after a successful `probe` or `restore` if the driver did not. Calling it
    /// again has no effect.
    ///
    /// Process context, may sleep.
    #[doc(alias = "virtio_device_ready")]
    #[inline]
    pub fn ready(&self) {
        // SAFETY: By the type invariant, the device is valid. `Core` guarantees process context.
        unsafe { bindings::vbrs_virtio_device_ready(self.as_raw()) };
    }

    /// Resets the device and deletes its virtqueues.
    ///
    /// On return, the device no longer accesses any buffer, no handler runs, and
    /// [`Virtqueue::detach_unused_buf`](super::Virtqueue::detach_unused_buf) returns the buffers
    /// that were in flight. The bus calls it after `remove`, `freeze` and a failed `probe` if the
    /// driver did not.
    ///
    /// Process context, may sleep. Must not be called while holding a lock that
    /// [`QueueHandler::used`] takes.
    #[doc(alias = "virtio_reset_device")]
    #[doc(alias = "del_vqs")]
    #[inline]
    pub fn reset(&self) {
        self.binding().reset();
    }

    /// Ends all access to the device: [`reset`](Self::reset), and revokes the access to
    /// configuration space.
    pub(super) fn shut_down(&self) {
        self.binding().shut_down();
    }

    fn binding(&self) -> &Binding {
        // SAFETY: `Core` guarantees a callback of a driver that the adapter registered. The adapter
        // sets `priv` to its `Binding` before it calls the driver, and frees the `Binding`
        // afterwards.
        unsafe { &*(*self.as_raw()).priv_.cast::<Binding>() }
    }
}

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariant, `self` is a valid `struct virtio_device`, which contains
        // the `struct device`.
        unsafe { device::Device::from_raw(&raw mut (*self.as_raw()).dev) }
    }
}

// SAFETY: `Device` is a transparent wrapper of `struct virtio_device`, which contains its
// `struct device` at this offset.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(bindings::virtio_device, dev);
}

// SAFETY: `Device` is a transparent wrapper of a type that does not depend on its generic argument.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

// SAFETY: The reference count of `struct virtio_device` is that of the `struct device` that it
// contains.
unsafe impl AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        self.as_ref().inc_ref();
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller owns a reference, so the device is valid.
        let device: &device::Device = unsafe { obj.as_ref() }.as_ref();
        // SAFETY: The caller transfers its reference.
        unsafe { device::Device::dec_ref(NonNull::from(device)) };
    }
}

// SAFETY: A `Device` is reference-counted, and any thread may release it.
unsafe impl Send for Device {}

// SAFETY: The methods of `Device<Normal>` are those of the reference-counted `struct device`, which
// is `Sync`.
unsafe impl Sync for Device {}

// SAFETY: The methods of `Device<Bound>` only read features, which do not change while a driver is
// bound.
unsafe impl Sync for Device<device::Bound> {}

/// The features that both the device and the driver support, before they are final.
///
/// A driver can decline features, but cannot add any.
pub struct Negotiation<'a> {
    vdev: NonNull<bindings::virtio_device>,
    device: PhantomData<&'a mut Device>,
}

impl Negotiation<'_> {
    /// Creates the negotiation of `vdev`.
    ///
    /// # Safety
    ///
    /// `vdev` must be a valid device whose features are being negotiated. No other code may change
    /// its features during `'_`.
    pub(super) unsafe fn new(vdev: NonNull<bindings::virtio_device>) -> Self {
        Self {
            vdev,
            device: PhantomData,
        }
    }

    /// Returns whether the device offers feature `bit` and the driver supports it. For transport
    /// features, the bus takes the place of the driver.
    #[doc(alias = "virtio_has_feature")]
    #[inline]
    pub fn has_feature(&self, bit: u32) -> bool {
        // SAFETY: By the safety requirements of `new`, `vdev` is valid.
        unsafe { bindings::vbrs_virtio_has_feature(self.vdev.as_ptr(), bit) }
    }

    /// Declines feature `bit`.
    #[doc(alias = "__virtio_clear_bit")]
    #[inline]
    pub fn clear_feature(&mut self, bit: u32) {
        // SAFETY: By the safety requirements of `new`, `vdev` is valid, and no other code changes
        // its features.
        unsafe { bindings::vbrs_virtio_clear_feature(self.vdev.as_ptr(), bit) };
    }
}
