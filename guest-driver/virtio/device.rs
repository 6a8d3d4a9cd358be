// SPDX-License-Identifier: GPL-2.0

//! The device, and its features while they are negotiated.

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
/// `Ctx` says in which state it is known to be, as with every bus: [`device::Core`] in a bus
/// callback, [`device::Bound`] while a driver is bound, [`device::Normal`] otherwise.
///
/// # Invariants
///
/// Represents a valid `struct virtio_device` that the C portion of the kernel created.
#[repr(transparent)]
pub struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::virtio_device>,
    PhantomData<Ctx>,
);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    /// Returns the C structure.
    pub(super) fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }
}

impl Device<device::Bound> {
    /// Says whether feature `bit` was negotiated; `false` for a bit that the driver did not ask
    /// for.
    ///
    /// Any context.
    pub fn has_feature(&self, bit: u32) -> bool {
        // SAFETY: By the type invariant the device is valid; its features do not change while a
        // driver is bound.
        unsafe { bindings::vbrs_virtio_has_feature(self.as_raw(), bit) }
    }

    /// Returns the negotiated features 0 to 63 as a set of bits.
    ///
    /// Any context.
    pub fn features(&self) -> u64 {
        (0..u64::BITS)
            .filter(|&bit| self.has_feature(bit))
            .fold(0, |set, bit| set | (1 << bit))
    }
}

impl Device<device::Core<'_>> {
    /// Returns a handle to the first `size` bytes of the device's configuration space, which may be
    /// cloned and kept.
    ///
    /// `size` is what the specification gives the device with the negotiated features. A device
    /// that has less is refused if the transport tells how much there is: PCI does, MMIO and
    /// vhost-user of user-mode Linux do not (nor do they stop the kernel).
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the transport gives no access to configuration space, or to less than `size`
    /// bytes; the log says so.
    pub fn config(&self, size: usize) -> Result<Config> {
        self.binding().config(size)
    }

    /// Creates the device's queues.
    ///
    /// The device numbers them in the order of `queues`: only queues that exist have a number. When
    /// the device has used a buffer of one, `handler` is told its number, unless the queue was
    /// created [without a callback](super::Virtqueue::without_callback). That may happen before this
    /// function returns.
    ///
    /// Once per binding, or once more after [`reset`](Self::reset). Must come before
    /// [`ready`](Self::ready).
    ///
    /// Process context, may sleep.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if the device has queues already or one of `queues` is in use, else what the
    /// transport says.
    pub fn find_queues(&self, queues: &[&dyn AnyQueue], handler: Arc<dyn QueueHandler>) -> Result {
        self.binding().find_queues(queues, handler)
    }

    /// Tells the device that the driver is ready to drive it (`DRIVER_OK`); from now on its queues
    /// work.
    ///
    /// The bus does it after a successful probe or restore unless the driver has. Calling it again
    /// does nothing.
    ///
    /// Process context, may sleep.
    pub fn ready(&self) {
        // SAFETY: By the type invariant the device is valid; `Core` is process context.
        unsafe { bindings::vbrs_virtio_device_ready(self.as_raw()) };
    }

    /// Resets the device and deletes its queues.
    ///
    /// On return the device does not touch any buffer any more, no handler runs, and what was in
    /// flight can be taken by [`Virtqueue::detach_unused_buf`](super::Virtqueue::detach_unused_buf). The bus does it
    /// after `remove` and `freeze` and when `probe` fails, if the driver has not.
    ///
    /// Process context, may sleep. Must not be called with a lock held that [`QueueHandler::used`]
    /// takes.
    pub fn reset(&self) {
        self.binding().reset();
    }

    /// Ends all that the driver can do with the device: as [`reset`](Self::reset), and configuration
    /// space is out of reach.
    pub(super) fn shut_down(&self) {
        self.binding().shut_down();
    }

    fn binding(&self) -> &Binding {
        // SAFETY: `Core` is a callback of a driver that the adapter registered, and the adapter
        // sets `priv` to its `Binding` before it calls the driver and frees it after.
        unsafe { &*(*self.as_raw()).priv_.cast::<Binding>() }
    }
}

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariant `self` is a valid `struct virtio_device`, hence so is the
        // device within.
        unsafe { device::Device::from_raw(&raw mut (*self.as_raw()).dev) }
    }
}

// SAFETY: `Device` is a transparent wrapper of `struct virtio_device`, which has its device at this
// offset.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(bindings::virtio_device, dev);
}

// SAFETY: `Device` is a transparent wrapper of a type that does not depend on its generic argument.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

// SAFETY: `struct virtio_device` is reference-counted by the device within.
unsafe impl AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        self.as_ref().inc_ref();
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller owns a reference, hence the device is valid.
        let device: &device::Device = unsafe { obj.as_ref() }.as_ref();
        // SAFETY: The caller gives up the reference that it owns.
        unsafe { device::Device::dec_ref(NonNull::from(device)) };
    }
}

// SAFETY: A `Device` is reference-counted and can be released from any thread.
unsafe impl Send for Device {}

// SAFETY: The methods of `Device<Normal>` are those of the reference-counted device within, which
// is `Sync`.
unsafe impl Sync for Device {}

// SAFETY: The methods of `Device<Bound>` only read features, which do not change while a driver is
// bound.
unsafe impl Sync for Device<device::Bound> {}

/// The features that device and driver have in common, before the driver accepts them.
///
/// A driver can decline a feature but not add one.
pub struct Negotiation<'a> {
    vdev: NonNull<bindings::virtio_device>,
    device: PhantomData<&'a mut Device>,
}

impl Negotiation<'_> {
    /// # Safety
    ///
    /// `vdev` must be a valid device whose features are being negotiated and change in no other way
    /// for `'_`.
    pub(super) unsafe fn new(vdev: NonNull<bindings::virtio_device>) -> Self {
        Self {
            vdev,
            device: PhantomData,
        }
    }

    /// Says whether feature `bit` is offered by the device and supported by the driver (or, for the
    /// bits of the transport, by the bus).
    pub fn has_feature(&self, bit: u32) -> bool {
        // SAFETY: `vdev` is valid by the requirement of `new`.
        unsafe { bindings::vbrs_virtio_has_feature(self.vdev.as_ptr(), bit) }
    }

    /// Declines feature `bit`.
    pub fn clear_feature(&mut self, bit: u32) {
        // SAFETY: `vdev` is valid, and nobody else uses its features, by the requirement of `new`.
        unsafe { bindings::vbrs_virtio_clear_feature(self.vdev.as_ptr(), bit) };
    }
}
