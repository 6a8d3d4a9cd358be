// SPDX-License-Identifier: GPL-2.0

//! Abstractions for the virtio bus.
//!
//! A driver implements [`Driver`] and is registered by
//! [`module_virtio_driver!`](crate::module_virtio_driver). From its bus callbacks it sees a
//! [`Device`], negotiates features ([`Negotiation`]), reads and writes configuration space
//! ([`Config`]), and exchanges [`Buffer`]s with the device over [`Virtqueue`]s.
//!
//! # Ownership
//!
//! A [`Virtqueue<B>`] takes each buffer by value and gives it back by value: between the two nobody
//! can touch, free or add it again. It comes back once, in one of three ways: the device returns it
//! ([`Virtqueue::get_buf`]); it could not be added ([`AddError`]); or the queue ceased to exist
//! ([`Virtqueue::detach_unused_buf`], or dropped).
//!
//! # Lifetime
//!
//! [`Virtqueue`] and [`Config`] are handles without a lifetime, so that a work item, a shrinker or
//! a timer can hold them. What is behind them goes away when the device is unbound; from then on
//! each operation says so. Nothing that a driver forgets, leaks or does late can reach a device
//! that is not its own any more.
//!
//! The bus takes down what a driver set up, after a removal as after a probe that failed: queues
//! refuse further work, notifications in progress end, the device is reset, the transport deletes
//! the queues, and only then the buffers that were in flight come back. The last step waits for the
//! deletion because a transport's reset may be nothing but a note to itself, as that of user-mode
//! Linux is, and the device then reads the rings until they are taken from it.
//!
//! # Contexts
//!
//! | what | context |
//! |---|---|
//! | [`Driver::validate`], `probe`, `remove`, `freeze`, `restore`, `shutdown` | process, may sleep, device lock held |
//! | [`Driver::config_changed`], [`QueueHandler::used`] | hard interrupt or interrupts off, must not sleep |
//! | methods of [`Virtqueue`] | any but NMI |
//! | methods of [`Config`] | process, may sleep |
//! | [`WaitQueue::wake_up_all`], methods of [`Wakeup`] | any but NMI |
//! | [`WaitQueue::wait_timeout`] | process, sleeps for a limited time; within an allocation, too |
//!
//! Who needs to wait for a device does so with a limit ([`WaitQueue`]): it may be silent or gone. A
//! [`Virtqueue`] says when it is [broken](Virtqueue::is_broken), which comes without an interrupt.
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
