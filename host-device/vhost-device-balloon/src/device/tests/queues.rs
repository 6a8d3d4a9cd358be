// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Virtqueues: their indices, notifications and interrupts.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use rustix::event::{eventfd, EventfdFlags};
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{Guest, ALL, FREE, SIZE};

#[test]
fn r1_an_empty_queue_ends_the_drain() {
    let mut guest = Guest::new(ALL, ALL);
    for queue in Queue::ALL {
        let (_, index) = guest.queue(queue);
        for _ in 0..3 {
            assert!(
                !guest.kick_index(index),
                "{queue:?} wants another turn with nothing in it"
            );
        }
        assert_eq!(guest.returned(queue), 0);
    }
    let status = guest.device.virtio_status();
    assert!(status
        .queues
        .iter()
        .all(|queue| queue.wakeups == 4 && queue.requests == 0));
}

#[test]
fn r10_queues_are_where_the_accepted_features_put_them() {
    let mut guest = Guest::new(ALL, Features::FREE_PAGE_HINT);
    assert_eq!(Queue::FreePage.index(guest.features), Some(2));
    guest.start_hint_round();
    guest.hint(FREE, 0x1000);
    assert_eq!(guest.device.hinting_status().blocks, 1);
    assert!(!guest.kick_index(3), "there is no queue 3");
    let names: Vec<_> = guest
        .device
        .virtio_status()
        .queues
        .iter()
        .map(|queue| queue.queue)
        .collect();
    assert_eq!(names, [Queue::Inflate, Queue::Deflate, Queue::FreePage]);
}

/// QEMU numbers the queues by the features that the device offers, and the specification by a fixed list. A driver may
/// do the same: without statistics, its free page queue is 3 and not 2.
#[test]
fn r10_a_driver_that_numbers_the_queues_as_qemu_or_the_specification_is_served() {
    let mut guest = Guest::new(ALL, Features::FREE_PAGE_HINT);
    // The rings 0, 1 and 3 are started.
    for index in [2, 4] {
        guest.vrings[index].set_queue_ready(false);
    }
    guest.features = Features::FREE_PAGE_HINT | Features::STATS_VQ;
    guest.start_hint_round();
    guest.hint(FREE, 0x1000);
    assert_eq!(guest.device.hinting_status().blocks, 1);
    let queues = guest.device.virtio_status().queues;
    let indices: Vec<_> = queues.iter().map(|it| (it.queue, it.index)).collect();
    assert!(indices.contains(&(Queue::FreePage, 3)), "{indices:?}");
    assert_eq!(guest.errors(), 0);
}

/// Sets the kick and call descriptors of `queue`, and returns the front end's copies.
fn event_fds(guest: &mut Guest, queue: Queue) -> (File, File) {
    let (_, index) = guest.queue(queue);
    let event = || File::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let (kick, call) = (event(), event());
    guest.vrings[index].set_kick(Some(kick.try_clone().unwrap()));
    guest.vrings[index].set_call(Some(call.try_clone().unwrap()));
    (kick, call)
}

/// Returns the counter of an event descriptor.
fn events(mut fd: &File) -> u64 {
    let mut sum = [0; 8];
    fd.read(&mut sum).map_or(0, |_| u64::from_ne_bytes(sum))
}

#[test]
fn each_notification_counts_even_if_one_drain_handles_several() {
    let mut guest = Guest::new(ALL, ALL);
    let (mut kick, _call) = event_fds(&mut guest, Queue::Inflate);
    for _ in 0..3 {
        kick.write_all(&1u64.to_ne_bytes()).unwrap();
    }
    assert!(guest.vrings[0].read_kick().unwrap());
    guest.kick_index(0);
    let status = guest.device.virtio_status();
    // The start of the queue is the other wakeup.
    assert_eq!(
        (status.queues[0].notifications, status.queues[0].wakeups),
        (3, 2)
    );
    assert_eq!(status.queues[1].notifications, 0);
}

#[test]
fn an_interrupt_counts_and_is_spared_a_driver_that_wants_none() {
    let mut guest = Guest::new(ALL, ALL);
    let (_kick, call) = event_fds(&mut guest, Queue::Inflate);
    let interrupts = |guest: &Guest| guest.device.virtio_status().queues[0].interrupts;
    guest.send_pfns(Queue::Inflate, &[FREE]);
    assert_eq!((interrupts(&guest), events(&call)), (1, 1));
    let flags = GuestAddress(guest.queue(Queue::Inflate).0.base + 0x1000);
    let memory = guest.memory.memory();
    memory.write_obj(1u16, flags).unwrap();
    guest.send_pfns(Queue::Inflate, &[FREE]);
    assert_eq!(interrupts(&guest), 1);
    assert_eq!(events(&call), 0, "a call that the driver did not want");
    // With event index, the used event decides, and the flag has no meaning.
    guest.vrings[0].set_queue_event_idx(true);
    let used: u16 = memory
        .read_obj(GuestAddress(guest.queue(Queue::Inflate).0.base + 0x2002))
        .unwrap();
    let event = GuestAddress(flags.0 + 4 + 2 * u64::from(SIZE));
    memory.write_obj(used, event).unwrap();
    guest.send_pfns(Queue::Inflate, &[FREE]);
    assert_eq!((interrupts(&guest), events(&call)), (2, 1));
}

#[test]
fn notifications_that_cannot_be_read_are_a_failure_of_the_queue() {
    let guest = Guest::new(ALL, ALL);
    let (reader, writer) = std::io::pipe().unwrap();
    let vring = &guest.vrings[0];
    vring.set_kick(Some(File::from(OwnedFd::from(reader))));
    drop(writer);
    assert_eq!(vring.failure(), None);
    assert!(vring.read_kick().unwrap(), "the device must handle it");
    assert!(vring.failure().is_some());
    vring.set_kick(None);
    assert_eq!(vring.failure(), None);
}
