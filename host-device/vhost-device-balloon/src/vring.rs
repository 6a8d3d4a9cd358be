// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtqueue for the crate `vhost-user-backend`. It extends the crate's [`VringRwLock`]: it counts notifications and
//! interrupts, and without event index it sends no interrupt that the driver does not want.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhost_user_backend::{VringRwLock, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::descriptors::SharedDescriptor;
use crate::sync::lock;

type AtomicGuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// How many notifications in a row may be without a counter to read. A few happen when a queue starts. Many mean that
/// the device watches a descriptor that the front end has replaced, and can no longer reset it.
const MAX_EMPTY_KICKS: u32 = 1000;

/// How the device asks a driver to leave out notifications.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum NotificationSuppression {
    /// By `VIRTIO_RING_F_EVENT_IDX`: the device tells after which buffer it wants a notification.
    #[default]
    EventIdx,
    /// By the flag of the used ring, while the device processes the queue.
    Flag,
    /// Never.
    Never,
}

/// Counters of a queue since its front end connected.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct NotificationCounts {
    /// Notifications by the driver. One turn of the queue may answer several.
    pub notifications: u64,
    /// Interrupts that were sent to the driver.
    pub interrupts: u64,
}

#[derive(Debug, Default)]
struct Shared {
    /// The kick descriptor, to read its counter. The crate has another descriptor of the same file.
    kick: Mutex<Option<SharedDescriptor>>,
    /// The call descriptor. The crate has none: it would write to it under a lock.
    call: Mutex<Option<Arc<SharedDescriptor>>>,
    /// The number of threads that write to a call descriptor.
    interrupting: AtomicU32,
    failure: Mutex<Option<String>>,
    /// Notifications in a row without a counter to read.
    empty_kicks: AtomicU32,
    notifications: AtomicU64,
    interrupts: AtomicU64,
}

/// A virtqueue that counts.
#[derive(Clone)]
pub struct Vring {
    inner: VringRwLock,
    memory: AtomicGuestMemory,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Vring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut vring = f.debug_struct("Vring");
        vring.field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Vring {
    /// Returns the counters.
    pub fn notification_counts(&self) -> NotificationCounts {
        NotificationCounts {
            notifications: self.shared.notifications.load(Ordering::Relaxed),
            interrupts: self.shared.interrupts.load(Ordering::Relaxed),
        }
    }

    /// Returns why notifications cannot be read, if they cannot. The failure lasts until the front end
    /// sets another kick descriptor.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.failure).clone()
    }

    /// Returns whether the driver asks for no interrupts, by the flag of the available ring.
    fn is_interrupt_suppressed(&self) -> bool {
        let address = GuestAddress(self.inner.get_ref().get_queue().avail_ring());
        let flags: Result<u16, _> = self.memory.memory().read_obj(address);
        flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT != 0)
    }

    /// Counts a notification without a counter to read.
    ///
    /// # Errors
    ///
    /// If there were [`MAX_EMPTY_KICKS`] in a row.
    fn count_empty_kick(&self) -> io::Result<()> {
        match self.shared.empty_kicks.fetch_add(1, Ordering::Relaxed) {
            MAX_EMPTY_KICKS.. => Err(io::Error::other(
                "it is always ready and always empty; a running queue's descriptor must not be replaced",
            )),
            _ => Ok(()),
        }
    }

    /// Returns the number of notifications since the last read. An event descriptor sums them up.
    fn read_notifications(&self) -> io::Result<u64> {
        let kick = lock(&self.shared.kick);
        let Some(kick) = kick.as_ref() else {
            return Ok(0);
        };
        let mut count = [0; size_of::<u64>()];
        let mut filled = 0;
        // A pipe or a socket may have a part of a counter.
        while let Some(rest) = count.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match kick.read(rest) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => filled += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
                Err(error) => return Err(error),
            }
        }
        Ok(u64::from_ne_bytes(count))
    }

    /// Returns an interrupt of the driver, to send it later.
    pub(crate) fn interrupt(&self) -> Interrupt {
        Interrupt(self.shared.clone())
    }

    /// Returns whether a thread writes to a call descriptor, and takes what the descriptor contains, so that the thread
    /// does not wait for room: see [`SharedDescriptor::write`].
    pub(crate) fn unblock_interrupts(&self) -> bool {
        let is_interrupting = self.shared.interrupting.load(Ordering::Acquire) > 0;
        let call = lock(&self.shared.call).clone();
        if let Some(call) = call.filter(|_| is_interrupting) {
            // Fails for the write end of a pipe, on which no write waits.
            let _ = call.read(&mut [0; size_of::<u64>()]);
        }
        is_interrupting
    }
}

/// An interrupt of the driver that has not been sent.
#[derive(Debug)]
#[must_use = "it is not sent yet"]
pub struct Interrupt(Arc<Shared>);

impl Interrupt {
    /// Sends the interrupt. A malicious front end can make this wait, so the caller must hold no lock.
    ///
    /// # Errors
    ///
    /// The error of the host.
    pub(crate) fn send(&self) -> io::Result<()> {
        let Some(call) = lock(&self.0.call).clone() else {
            return Ok(());
        };
        self.0.interrupting.fetch_add(1, Ordering::AcqRel);
        let result = call.write(&1u64.to_ne_bytes());
        self.0.interrupting.fetch_sub(1, Ordering::AcqRel);
        match result {
            Ok(_) => {
                self.0.interrupts.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            // The front end has not taken earlier interrupts. They tell the driver of these buffers as well.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl VringT<AtomicGuestMemory> for Vring {
    fn new(memory: AtomicGuestMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            inner: VringRwLock::new(memory.clone(), max_queue_size)?,
            memory,
            shared: Arc::default(),
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, AtomicGuestMemory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, AtomicGuestMemory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.interrupt().send()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        let needed = self.inner.needs_notification()?;
        // The crate checks the event index. Without event index, it does not check the driver's flag.
        let by_flag = !self.inner.get_ref().get_queue().event_idx_enabled();
        Ok(needed && !(by_flag && self.is_interrupt_suppressed()))
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(
        &self,
        desc_table: u64,
        avail_ring: u64,
        used_ring: u64,
    ) -> Result<(), QueueError> {
        self.inner.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let copy = file.as_ref().map(File::try_clone).transpose();
        let mut kick = lock(&self.shared.kick);
        self.shared.empty_kicks.store(0, Ordering::Relaxed);
        *lock(&self.shared.failure) = None;
        let copy = copy.unwrap_or_else(|error| {
            *lock(&self.shared.failure) = Some(error.to_string());
            None
        });
        *kick = copy.map(|file| SharedDescriptor::new(file.into()));
        self.inner.set_kick(file);
    }

    /// Counts the notifications, and returns whether the device must handle the queue. Never fails: an error would
    /// silently end the thread that watches the queues. See [`Vring::failure`].
    fn read_kick(&self) -> io::Result<bool> {
        match self.read_notifications() {
            Ok(0) => {
                if let Err(error) = self.count_empty_kick() {
                    *lock(&self.shared.failure) = Some(error.to_string());
                }
            }
            Ok(count) => {
                self.shared.empty_kicks.store(0, Ordering::Relaxed);
                let notifications = &self.shared.notifications;
                let _ = notifications.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |sum| {
                    Some(sum.saturating_add(count))
                });
            }
            Err(error) => *lock(&self.shared.failure) = Some(error.to_string()),
        }
        Ok(self.inner.get_ref().is_enabled() || self.failure().is_some())
    }

    fn set_call(&self, file: Option<File>) {
        let call = file.map(|file| Arc::new(SharedDescriptor::new(file.into())));
        *lock(&self.shared.call) = call;
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

impl<'a> VringStateGuard<'a, AtomicGuestMemory> for Vring {
    type G = <VringRwLock as VringStateGuard<'a, AtomicGuestMemory>>::G;
}

impl<'a> VringStateMutGuard<'a, AtomicGuestMemory> for Vring {
    type G = <VringRwLock as VringStateMutGuard<'a, AtomicGuestMemory>>::G;
}

#[cfg(test)]
mod tests {
    use rustix::event::{eventfd, EventfdFlags};

    use super::*;

    #[test]
    fn a_thread_that_waits_for_room_for_its_interrupt_gets_it() {
        let vring = Vring::new(AtomicGuestMemory::new(GuestMemoryMmap::new()), 16).unwrap();
        let call = File::from(eventfd(0, EventfdFlags::empty()).unwrap());
        vring.set_call(Some(call.try_clone().unwrap()));
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        // No thread waits yet, and what the driver has not taken stays.
        assert!(!vring.unblock_interrupts());
        let waiting = vring.clone();
        let thread = std::thread::spawn(move || {
            waiting.shared.interrupting.fetch_add(1, Ordering::AcqRel);
            // As if the front end had filled the counter in the moment before this write.
            rustix::io::write(&call, &1u64.to_ne_bytes()).unwrap();
            waiting.shared.interrupting.fetch_sub(1, Ordering::AcqRel);
        });
        while !thread.is_finished() {
            vring.unblock_interrupts();
            std::thread::yield_now();
        }
        thread.join().unwrap();
        assert!(!vring.unblock_interrupts());
    }
}
