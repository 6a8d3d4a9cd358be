// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The face towards the crate `vhost-user-backend`.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use shared_abi::queue::Queue;
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};

use crate::device::{Device, MAX_QUEUE_SIZE};
use crate::lock;
use crate::vring::{NotificationSuppression, Vring};

/// The event that stands for "go on with the queues whose turn was over". The crate reserves the numbers up to
/// the number of queues.
pub const RESCHEDULE_EVENT: u16 = Queue::MAX_COUNT as u16 + 1;

/// Passes what the crate tells on to the device. One for each connection.
#[derive(Debug)]
pub struct Backend {
    device: Arc<Mutex<Device>>,
    /// One bit for each queue that has more to do.
    pending_queues: AtomicU64,
    reschedule: (EventConsumer, EventNotifier),
    /// To be closed when a queue cannot be watched any more.
    front_end: UnixStream,
    failure: Mutex<Option<String>>,
    exit: (EventConsumer, EventNotifier),
}

impl Backend {
    /// A face for `device` towards `front_end`.
    ///
    /// # Errors
    ///
    /// If the host has no event descriptors left.
    pub fn new(device: Arc<Mutex<Device>>, front_end: UnixStream) -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        Ok(Self {
            device,
            pending_queues: AtomicU64::new(0),
            reschedule: new_event_consumer_and_notifier(flags)?,
            front_end,
            failure: Mutex::default(),
            exit: new_event_consumer_and_notifier(flags)?,
        })
    }

    /// The descriptor that [`RESCHEDULE_EVENT`] is to be registered for.
    pub fn reschedule_fd(&self) -> RawFd {
        self.reschedule.0.as_raw_fd()
    }

    /// Why the connection was closed from here, if it was.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    /// Ends the connection: without its notifications a queue would stand still for ever, and nobody would know.
    fn fail(&self, index: usize, error: &str) {
        lock(&self.failure).get_or_insert_with(|| {
            // Fails if the front end was faster.
            let _ = self.front_end.shutdown(Shutdown::Both);
            format!("the front end's notifications for queue {index} cannot be read: {error}")
        });
    }

    fn handle(&self, index: usize, vrings: &[Vring]) {
        if lock(&self.device).handle_queue(index, vrings) {
            self.pending_queues.fetch_or(1 << index, Ordering::AcqRel);
            // Fails only if it is pending 2^64 - 1 times.
            let _ = self.reschedule.1.notify();
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
    }

    fn reset_device(&self) {
        lock(&self.device).reset();
    }

    /// The queue is not ready any more, so no request is taken from it. Waits until the last one has been served: then the guest may
    /// use for something else what it was about.
    fn stop_vring(&self, _index: u32) -> io::Result<()> {
        drop(lock(&self.device));
        Ok(())
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queues know it by themselves.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        lock(&self.device).read_config(offset, size)
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        // An error would end the connection, and with it the guest's device, for a write that can be ignored.
        lock(&self.device).write_config(offset, data);
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        lock(&self.device).set_memory(memory);
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().ok()?, self.exit.1.try_clone().ok()?))
    }

    /// Never fails: an error would end the thread that watches the queues, silently.
    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        if device_event == RESCHEDULE_EVENT {
            let _ = self.reschedule.0.consume();
            let pending_queues = self.pending_queues.swap(0, Ordering::AcqRel);
            (0..Queue::MAX_COUNT)
                .filter(|index| pending_queues >> index & 1 == 1)
                .for_each(|index| self.handle(index, vrings));
        } else {
            let index = usize::from(device_event);
            match vrings.get(index).and_then(Vring::failure) {
                Some(error) => self.fail(index, &error),
                None => self.handle(index, vrings),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use vhost_user_backend::VringT;

    use super::*;
    use crate::events::Events;

    #[test]
    fn r17_a_queue_stops_when_its_last_request_has_been_served() {
        let device = Device::new(Default::default(), Arc::new(Events::default()));
        let device = Arc::new(Mutex::new(device));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let backend = Backend::new(device.clone(), ours).unwrap();
        let served = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // What serves a request holds the device.
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
    fn a_queue_with_an_unreadable_kick_ends_the_connection_and_is_named() {
        let device = Device::new(Default::default(), Arc::new(Events::default()));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(600)))
            .unwrap();
        let backend = Backend::new(Arc::new(Mutex::new(device)), ours).unwrap();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let vrings = [Vring::new(memory, 16).unwrap()];
        backend.handle_event(0, EventSet::IN, &vrings, 0).unwrap();
        assert_eq!(backend.failure(), None);
        // A pipe that nobody will ever write to again.
        let (reader, _) = std::io::pipe().unwrap();
        let reader = std::os::fd::OwnedFd::from(reader);
        vrings[0].set_kick(Some(reader.into()));
        assert!(vrings[0].read_kick().unwrap());
        backend.handle_event(0, EventSet::IN, &vrings, 0).unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        let failure = backend.failure().unwrap();
        assert!(failure.contains("queue 0"), "{failure}");
    }
}
