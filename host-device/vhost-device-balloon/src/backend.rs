// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The [`VhostUserBackend`] of the crate `vhost-user-backend`: passes vhost-user requests and queue
//! events to the [`Device`].
//!
//! The device holds all state of the balloon. Two threads of the crate call this module: one handles the front end's
//! messages, the other watches the kick descriptors of all queues. Both lock the device.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use shared_abi::queue::Queue;
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};

use crate::device::MAX_QUEUE_SIZE;
use crate::device_lock::DeviceLock;
use crate::memory::pin_scan::NewFiles;
use crate::memory::Ram;
use crate::sync::lock;
use crate::vring::{NotificationSuppression, Vring};

/// Event number of [`Backend::reschedule_fd`]: queues that exhausted their drain budget get another turn. The crate
/// reserves the numbers from 0 to the number of queues, inclusive.
pub const RESCHEDULE_EVENT: u16 = Queue::MAX_COUNT as u16 + 1;

/// How often the thread of the queues is helped out of a write to a call descriptor.
const UNBLOCK_ATTEMPTS: u32 = 1000;

const UNBLOCK_INTERVAL: Duration = Duration::from_millis(1);

/// The text of the error that ends the thread of the queues when its session has ended. The crate logs it.
pub const ORDERED_END: &str = "session has ended, and with it the thread of its queues";

/// Passes vhost-user requests and queue events to the device. There is one for each connection.
#[derive(Debug)]
pub struct Backend {
    device: Arc<DeviceLock>,
    /// One bit for each queue that has more work.
    pending_queues: AtomicU64,
    reschedule: (EventConsumer, EventNotifier),
    /// The connection. It is shut down when the queues can no longer be served.
    front_end: UnixStream,
    failure: Mutex<Option<String>>,
    new_files: Mutex<NewFiles>,
    /// The queues, once one of them was used.
    vrings: Mutex<Vec<Vring>>,
    /// Whether the thread that watches the queues should end.
    has_ended: AtomicBool,
}

impl Backend {
    /// Creates the backend that serves the connection `front_end` with `device`.
    ///
    /// # Errors
    ///
    /// If the host has no event descriptors left.
    pub fn new(device: Arc<DeviceLock>, front_end: UnixStream) -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let new_files = NewFiles::new(lock(&device).pin_finder());
        Ok(Self {
            device,
            pending_queues: AtomicU64::new(0),
            reschedule: new_event_consumer_and_notifier(flags)?,
            front_end,
            failure: Mutex::default(),
            new_files: Mutex::new(new_files),
            vrings: Mutex::default(),
            has_ended: AtomicBool::new(false),
        })
    }

    /// Returns the descriptor to register for [`RESCHEDULE_EVENT`].
    pub fn reschedule_fd(&self) -> RawFd {
        self.reschedule.0.as_raw_fd()
    }

    /// Tells the thread that watches the queues to end. If it waits in a write to a call descriptor, makes room there.
    pub fn end_queue_thread(&self) {
        self.has_ended.store(true, Ordering::Release);
        // Fails only if the counter of the event descriptor would overflow. Then the thread is woken already.
        let _ = self.reschedule.1.notify();
        let vrings = lock(&self.vrings).clone();
        // A front end that still runs may fill the descriptor again.
        for _ in 0..UNBLOCK_ATTEMPTS {
            let waiting = vrings.iter().filter(|it| it.unblock_interrupts());
            if waiting.count() == 0 {
                break;
            }
            thread::sleep(UNBLOCK_INTERVAL);
        }
    }

    /// Returns why a queue failure closed the connection, if one did.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    /// Closes the connection, for this `reason`, when queues can no longer be served. Otherwise they would hang
    /// silently.
    fn fail(&self, reason: impl FnOnce() -> String) {
        lock(&self.failure).get_or_insert_with(|| {
            // Fails if the front end has already closed the connection.
            let _ = self.front_end.shutdown(Shutdown::Both);
            reason()
        });
    }

    /// Closes the connection if guest memory cannot be accessed. The handler of SIGBUS notifies `reschedule`.
    fn check_memory(&self) {
        if let Some(reason) = lock(&self.device).memory_fault() {
            self.fail(|| reason);
        }
    }

    fn handle(&self, index: usize, vrings: &[Vring]) {
        if lock(&self.device).handle_queue(index, vrings) {
            self.pending_queues.fetch_or(1 << index, Ordering::AcqRel);
            // Fails only if the counter of the event descriptor would overflow.
            let _ = self.reschedule.1.notify();
        }
    }

    fn handle_any(&self, device_event: u16, vrings: &[Vring]) {
        {
            let mut known = lock(&self.vrings);
            if known.is_empty() {
                *known = vrings.to_vec();
            }
        }
        if device_event == RESCHEDULE_EVENT {
            self.check_memory();
            let pending_queues = self.pending_queues.swap(0, Ordering::AcqRel);
            (0..Queue::MAX_COUNT)
                .filter(|index| pending_queues >> index & 1 == 1)
                .for_each(|index| self.handle(index, vrings));
        } else {
            let index = usize::from(device_event);
            match vrings.get(index).and_then(Vring::failure) {
                Some(error) => {
                    self.fail(|| {
                        format!("kick descriptor of queue {index} cannot be read: {error}")
                    });
                }
                None => self.handle(index, vrings),
            }
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        Queue::MAX_COUNT
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        let device = lock(&self.device);
        let event_idx = device.suppression() == NotificationSuppression::EventIdx;
        device.offered_features().bits()
            | 1 << VIRTIO_F_VERSION_1
            | u64::from(event_idx) << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        lock(&self.device).set_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        lock(&self.device).reset();
    }

    /// Waits until the device has served the last request of the queue. The guest may then reuse the memory of its
    /// requests. The crate has already marked the queue not ready, so the device takes no further request.
    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        while lock(&self.device).finish_request(index) {}
        Ok(())
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate tells each queue itself.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        lock(&self.device).read_config(offset, size)
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        // An error would end the connection, and with it the guest's device. An invalid write is ignored instead.
        lock(&self.device).write_config(offset, data);
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // Not under the device's lock: the file system of a memory file may have to read its disk.
        let ram = Ram::of_front_end(&memory.memory());
        // As well: this takes time for each process of the host.
        let searches = ram.is_ok() && lock(&self.device).searches_for_pins();
        let pinning = searches.then(|| lock(&self.new_files).find_pins(&memory.memory()));
        let wake = self.reschedule.1.try_clone()?;
        let mut device = lock(&self.device);
        if let Some(pinning) = pinning.flatten() {
            device.set_pinning(pinning);
        }
        let queues = device.set_memory(memory, ram, Some(wake));
        drop(device);
        let queues = queues.map_err(|error| {
            self.fail(|| error.to_string());
            io::Error::other(error)
        })?;
        self.pending_queues.fetch_or(queues, Ordering::AcqRel);
        let _ = self.reschedule.1.notify();
        Ok(())
    }

    /// There is none: see [`crate::vhost_daemon`].
    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        None
    }

    /// Handles a kick, or gives queues another turn. Fails only to end the thread that watches the queues, after the
    /// session. A panic ends the session: without this thread the queues would hang silently.
    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        if device_event == RESCHEDULE_EVENT {
            // Before the reasons of the notification are read: whatever is added later has its own notification.
            let _ = self.reschedule.0.consume();
        }
        if self.has_ended.load(Ordering::Acquire) {
            return Err(io::Error::other(ORDERED_END));
        }
        catch_unwind(AssertUnwindSafe(|| self.handle_any(device_event, vrings)))
            .unwrap_or_else(|_| self.fail(|| "thread of the queues panicked".into()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use vhost_user_backend::VringT;

    use super::*;
    use crate::device::Device;
    use crate::events::Events;

    #[test]
    fn r17_a_queue_stops_when_its_last_request_has_been_served() {
        let device = Device::new(Default::default(), Arc::new(Events::default()));
        let device = Arc::new(DeviceLock::new(device));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let backend = Backend::new(device.clone(), ours).unwrap();
        let served = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // A thread that serves a request holds this lock.
            let serving = lock(&device);
            scope.spawn(|| {
                backend.stop_vring(0).unwrap();
                assert!(served.load(Ordering::Acquire), "it was still served");
            });
            std::thread::sleep(Duration::from_millis(50));
            served.store(true, Ordering::Release);
            drop(serving);
        });
    }

    #[test]
    fn a_queue_thread_that_is_just_woken_learns_of_the_end() {
        for _ in 0..100 {
            let device = Device::new(Default::default(), Arc::new(Events::default()));
            let (ours, _theirs) = UnixStream::pair().unwrap();
            let backend = Backend::new(Arc::new(DeviceLock::new(device)), ours).unwrap();
            let is_told = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    backend.end_queue_thread();
                    is_told.store(true, Ordering::Release);
                });
                loop {
                    let ends = backend.handle_event(RESCHEDULE_EVENT, EventSet::IN, &[], 0);
                    if ends.is_err() {
                        break;
                    }
                    if is_told.load(Ordering::Acquire) {
                        // The crate calls again only if the descriptor is readable.
                        let wakes = backend.reschedule.0.consume();
                        wakes.expect("nothing wakes the thread again");
                        break;
                    }
                }
            });
        }
    }

    #[test]
    fn a_panic_while_a_queue_is_served_ends_the_session() {
        #[derive(Debug)]
        struct Panics;
        impl crate::device::NotifyConfigChange for Panics {
            fn notify(&self) {
                panic!("for the test");
            }
        }
        let memory = GuestMemoryAtomic::new(crate::memory::tests::guest(&[(0, 0x4000, 0)]));
        let vrings = vec![Vring::new(memory.clone(), 16).unwrap()];
        let mut device = Device::new(Default::default(), Arc::new(Events::default()));
        device.front_end_connected(Arc::new(Panics));
        let ram = Ram::of_front_end(&memory.memory());
        device.set_memory(memory, ram, None).unwrap();
        let device = Arc::new(DeviceLock::new(device));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(600)))
            .unwrap();
        let backend = Backend::new(device.clone(), ours).unwrap();
        backend.handle_event(0, EventSet::IN, &vrings, 0).unwrap();
        // The device holds this change back until the queues run.
        lock(&device).set_target(0x1000).unwrap();
        vrings[0].set_queue_ready(true);
        backend.handle_event(0, EventSet::IN, &vrings, 0).unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        assert_eq!(backend.failure().unwrap(), "thread of the queues panicked");
    }

    #[test]
    fn a_queue_with_an_unreadable_kick_ends_the_connection_and_is_named() {
        let device = Device::new(Default::default(), Arc::new(Events::default()));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(600)))
            .unwrap();
        let backend = Backend::new(Arc::new(DeviceLock::new(device)), ours).unwrap();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let vrings = [Vring::new(memory, 16).unwrap()];
        backend.handle_event(0, EventSet::IN, &vrings, 0).unwrap();
        assert_eq!(backend.failure(), None);
        // The write end of this pipe is closed, so reading the kick fails.
        let (reader, _) = std::io::pipe().unwrap();
        let reader = std::os::fd::OwnedFd::from(reader);
        vrings[0].set_kick(Some(reader.into()));
        assert!(vrings[0].read_kick().unwrap());
        backend.handle_event(0, EventSet::IN, &vrings, 0).unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        let failure = backend.failure().unwrap();
        assert!(failure.contains("queue 0"), "{failure}");
        backend.end_queue_thread();
        let end = backend.handle_event(0, EventSet::IN, &vrings, 0);
        assert!(end.is_err(), "the thread of the queues ends");
    }
}
