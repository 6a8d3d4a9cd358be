// SPDX-License-Identifier: GPL-2.0

//! Abstractions for the virtio bus.
//!
//! A driver implements [`Driver`], and [`module_virtio_driver!`](crate::module_virtio_driver)
//! registers it. The bus callbacks get a [`Device`], or a [`Negotiation`] while features are
//! negotiated. [`Config`] accesses configuration space. [`Virtqueue`]s exchange [`Buffer`]s with
//! the device. `guest-driver/samples/virtio_rng.rs` is a whole driver.
//!
//! Nothing here depends on the balloon. A crate that includes this folder needs `bindings` at its
//! root.
//!
//! # Ownership
//!
//! A [`Virtqueue<B>`] takes each buffer by value and returns it by value. In between, no other code
//! can access, free or add the buffer. Each buffer is returned exactly once, in one of three ways:
//!
//! - the device has used it ([`Virtqueue::get_buf`]);
//! - it could not be added ([`AddError`]);
//! - its ring was deleted: [`Virtqueue::detach_unused_buf`] returns it, or the queue drops it.
//!
//! # Lifetime
//!
//! [`Virtqueue`] and [`Config`] are handles without a lifetime, so work items, shrinkers and timers
//! can own them. When the device is unbound, their access to it is revoked, and each later
//! operation fails. Therefore a driver that leaks a handle, or uses it late, cannot access a device
//! that it is no longer bound to.
//!
//! The bus resets a device after `remove` and after a failed `probe`, in this order:
//!
//! 1. the queues refuse further operations (*quiesce*), and notifications in progress end;
//! 2. the device is reset;
//! 3. the transport deletes the queues;
//! 4. the driver can take the buffers that were in flight (*detach*).
//!
//! The last step waits for the deletion, because some transports do not reach the device with a
//! reset. On user-mode Linux, the device reads the rings until they are deleted.
//!
//! # Contexts
//!
//! | what | context |
//! |---|---|
//! | [`Driver::validate`], `probe`, `remove`, `freeze`, `restore`, `shutdown` | process, may sleep, device lock held |
//! | [`Driver::config_changed`], [`QueueHandler::used`] | hard interrupt or interrupts disabled, must not sleep |
//! | methods of [`Virtqueue`] | any but NMI |
//! | methods of [`Config`] | process, may sleep |
//! | [`WaitQueue::wake_up_all`], methods of [`Wakeup`] | any but NMI |
//! | [`WaitQueue::wait_timeout`] | process, sleeps for a limited time, also within an allocation |
//!
//! A wait for the device needs a timeout ([`WaitQueue`]), because the device may not answer or may
//! be gone. No interrupt reports a [broken](Virtqueue::is_broken) queue.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

mod binding;
mod buffer;
pub(crate) mod compat;
mod config;
pub mod debugfs;
mod device;
mod driver;
mod outgoing_with_context;
mod queue_state;
mod virtqueue;
mod wait_queue;
mod wakeup;
pub mod work;

#[cfg(CONFIG_KUNIT = "y")]
mod kunit;
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod kunit_device;

pub use self::{
    buffer::{Buffer, Either, Incoming, Outgoing, Segments},
    config::{Config, ConfigValue, Field},
    device::{Device, Negotiation},
    driver::{Adapter, DeviceId, Driver, IdTable},
    outgoing_with_context::OutgoingWithContext,
    virtqueue::{AddError, AddFailure, AnyQueue, Kick, QueueHandler, Virtqueue},
    wait_queue::WaitQueue,
    wakeup::Wakeup,
};
