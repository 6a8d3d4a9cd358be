// SPDX-License-Identifier: GPL-2.0

//! KUnit tests of virtqueues and configuration space, with a test device.

use super::AddError;
use kernel::prelude::*;

/// For tests, which treat all failures alike. Drivers have to distinguish them.
impl<B> From<AddError<B>> for Error {
    fn from(_error: AddError<B>) -> Self {
        EIO
    }
}

#[kunit_tests(virtio_balloon_rs_virtqueue)]
mod tests {
    use super::super::{
        kunit_device::{
            BoundTestDevice, CountingHandler, DropCountedBuffer, SegmentLayout, ENTRIES,
        },
        AddFailure, Either, Field, Incoming, Kick, Outgoing, Virtqueue,
    };
    use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use kernel::prelude::*;

    /// Creates a device with one queue of [`DropCountedBuffer`]s.
    fn queue() -> Result<(BoundTestDevice, Virtqueue<DropCountedBuffer>)> {
        let queue = Virtqueue::new(c"test")?;
        let bound = BoundTestDevice::new()?;
        bound.find_queues(&[&queue], CountingHandler::new()?)?;
        Ok((bound, queue))
    }

    #[test]
    fn buffers_are_available_in_order_and_returned_in_order_of_use() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        for number in 1..=3 {
            queue.add(DropCountedBuffer::new(number, &DROPS)?)?;
        }

        let mut heads = KVec::new();
        for number in 1..=3u64 {
            let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
            assert_eq!(chain.segments.len(), 1);
            let segment = &chain.segments[0];
            assert_eq!((segment.length, segment.writable), (8, false));
            assert_eq!(segment.read(), number);
            heads.push(chain.head, GFP_KERNEL)?;
        }
        assert!(bound.device.pop_descriptor_chain(0).is_none());
        assert!(queue.get_buf().is_none());

        for index in [2, 0, 1] {
            bound.device.add_used(0, heads[index], 0);
        }
        for number in [3, 1, 2] {
            let (buffer, written) = queue.get_buf().ok_or(ENOENT)?;
            assert_eq!((buffer.number(), written), (number, 0));
        }
        assert!(queue.get_buf().is_none());
        assert_eq!(DROPS.load(Relaxed), 3);
        Ok(())
    }

    #[test]
    fn the_ring_and_its_indices_wrap() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        const BUFFERS: u32 = 66_000;
        let (bound, queue) = queue()?;
        for number in 0..BUFFERS {
            queue.add(DropCountedBuffer::new(number.into(), &DROPS)?)?;
            let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
            bound.device.add_used(0, chain.head, 0);
            let (buffer, _) = queue.get_buf().ok_or(ENOENT)?;
            if buffer.number() != u64::from(number) {
                return Err(EILSEQ);
            }
        }
        assert_eq!(DROPS.load(Relaxed), BUFFERS);
        assert_eq!(queue.free_entries(), ENTRIES);
        Ok(())
    }

    #[test]
    fn a_full_ring_returns_the_buffer_without_a_notification() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        for number in 0..ENTRIES as u64 {
            assert_eq!(queue.free_entries(), ENTRIES - number as usize);
            queue.add(DropCountedBuffer::new(number, &DROPS)?)?;
        }
        let error = queue
            .add(DropCountedBuffer::new(99, &DROPS)?)
            .err()
            .ok_or(EINVAL)?;
        assert_eq!(error.failure, AddFailure::Full);
        assert_eq!(error.buffer.number(), 99);
        assert_eq!(DROPS.load(Relaxed), 0);
        assert_eq!(bound.device.notifications(), 0);
        assert!(!queue.is_broken());

        let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
        bound.device.add_used(0, chain.head, 0);
        let (buffer, _) = queue.get_buf().ok_or(ENOENT)?;
        assert_eq!(buffer.number(), 0);
        queue.add(error.buffer)?;
        assert_eq!(queue.free_entries(), 0);
        Ok(())
    }

    #[test]
    fn unused_buffers_are_detached_once_after_a_reset() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        bound.device.watch_drops(&DROPS);
        for number in 0..4 {
            queue.add(DropCountedBuffer::new(number, &DROPS)?)?;
        }
        // Of the four buffers, the first is used and taken, the second is used but not taken, the
        // third is with the device, and the device has not seen the fourth.
        let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
        bound.device.add_used(0, chain.head, 0);
        drop(queue.get_buf().ok_or(ENOENT)?);
        let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
        bound.device.add_used(0, chain.head, 0);
        bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
        assert_eq!(DROPS.load(Relaxed), 1);
        assert!(queue.detach_unused_buf().is_none());

        bound.binding().reset();
        assert_eq!(bound.device.resets(), 1);
        assert_eq!(bound.device.drops_at_del_vqs(), Some(1));
        assert_eq!(DROPS.load(Relaxed), 1);

        let first = queue.detach_unused_buf().ok_or(ENOENT)?;
        assert!((1..4).contains(&first.number()));
        drop(first);
        assert_eq!(DROPS.load(Relaxed), 2);
        bound.binding().drop_detached();
        assert_eq!(DROPS.load(Relaxed), 4);
        assert!(queue.detach_unused_buf().is_none());
        drop(bound);
        drop(queue);
        assert_eq!(DROPS.load(Relaxed), 4);
        Ok(())
    }

    #[test]
    fn a_queue_dropped_by_its_driver_loses_nothing() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        bound.device.watch_drops(&DROPS);
        queue.add(DropCountedBuffer::new(1, &DROPS)?)?;
        queue.add(DropCountedBuffer::new(2, &DROPS)?)?;
        drop(queue);
        assert_eq!(DROPS.load(Relaxed), 0);
        drop(bound);
        assert_eq!(DROPS.load(Relaxed), 2);
        Ok(())
    }

    #[test]
    fn a_queue_that_outlives_its_device_does_nothing() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        queue.add(DropCountedBuffer::new(1, &DROPS)?)?;
        drop(bound);
        assert_eq!(DROPS.load(Relaxed), 1);

        let error = queue
            .add(DropCountedBuffer::new(2, &DROPS)?)
            .err()
            .ok_or(EINVAL)?;
        assert_eq!(error.failure, AddFailure::Gone);
        assert_eq!(queue.kick(), Kick::Failed);
        assert!(queue.get_buf().is_none());
        assert!(queue.detach_unused_buf().is_none());
        assert!(queue.is_broken());
        assert!(queue.enable_callback());
        assert_eq!((queue.entries(), queue.free_entries()), (0, 0));
        Ok(())
    }

    #[test]
    fn an_id_that_is_no_buffer_breaks_the_queue() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        // An id beyond the ring, and an id that was not made available.
        for id in [ENTRIES as u32, 2] {
            let (bound, queue) = queue()?;
            queue.add(DropCountedBuffer::new(1, &DROPS)?)?;
            bound.device.add_used(0, id, 0);
            assert!(queue.get_buf().is_none());
            assert!(queue.is_broken());
            let error = queue
                .add(DropCountedBuffer::new(2, &DROPS)?)
                .err()
                .ok_or(EINVAL)?;
            assert_eq!(error.failure, AddFailure::Broken);
            assert_eq!(queue.kick(), Kick::Failed);
            let before = DROPS.load(Relaxed);
            drop(error);
            drop(bound);
            assert_eq!(DROPS.load(Relaxed), before + 2);
        }
        Ok(())
    }

    #[test]
    fn a_buffer_used_twice_is_returned_once() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        queue.add(DropCountedBuffer::new(1, &DROPS)?)?;
        let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
        bound.device.add_used(0, chain.head, 0);
        bound.device.add_used(0, chain.head, 0);
        drop(queue.get_buf().ok_or(ENOENT)?);
        assert!(queue.get_buf().is_none());
        assert!(queue.is_broken());
        drop(bound);
        assert_eq!(DROPS.load(Relaxed), 1);
        Ok(())
    }

    #[test]
    fn no_more_bytes_are_written_than_there_are() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        // Readable and writable segments of 8 bytes, the written length from the device, and the
        // length that `get_buf` returns.
        for (layout, said, heard) in [((1, 0), u32::MAX, 0), ((1, 1), u32::MAX, 8), ((0, 2), 9, 9)]
        {
            let layout = SegmentLayout::Segments(layout.0, layout.1);
            queue.add(DropCountedBuffer::with_layout(7, layout, &DROPS)?)?;
            let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
            if let Some(segment) = chain.segments.iter().find(|segment| segment.writable) {
                segment.write(0x5a5a);
            }
            bound.device.add_used(0, chain.head, said);
            let (buffer, written) = queue.get_buf().ok_or(ENOENT)?;
            assert_eq!(written, heard);
            assert_eq!(buffer.written(), if heard > 0 { 0x5a5a } else { 0 });
        }
        Ok(())
    }

    #[test]
    fn what_no_device_could_take_is_refused() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        for layout in [
            SegmentLayout::Segments(0, 0),
            SegmentLayout::Segments(ENTRIES, 1),
            SegmentLayout::Segments(40, 0),
            SegmentLayout::Empty,
            SegmentLayout::WrongOrder,
        ] {
            let error = queue
                .add(DropCountedBuffer::with_layout(1, layout, &DROPS)?)
                .err()
                .ok_or(EINVAL)?;
            assert_eq!(error.failure, AddFailure::Malformed);
            assert_eq!(error.buffer.number(), 1);
        }
        assert!(bound.device.pop_descriptor_chain(0).is_none());

        queue.add(DropCountedBuffer::with_layout(
            2,
            SegmentLayout::Segments(2, 2),
            &DROPS,
        )?)?;
        assert_eq!(queue.free_entries(), 0);
        let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
        let writable = chain.segments.iter().map(|segment| segment.writable);
        assert!(writable.eq([false, false, true, true]));
        Ok(())
    }

    #[test]
    fn the_device_is_notified_when_it_wants_to_be() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        queue.add(DropCountedBuffer::new(1, &DROPS)?)?;
        queue.add(DropCountedBuffer::new(2, &DROPS)?)?;
        assert_eq!(bound.device.notifications(), 0);
        assert_eq!(queue.kick(), Kick::Sent);
        assert_eq!(bound.device.notifications(), 1);
        // No kick is pending.
        assert_eq!(queue.kick(), Kick::NotNeeded);
        assert_eq!(bound.device.notifications(), 1);

        bound.device.suppress_notifications(0, true);
        queue.add(DropCountedBuffer::new(3, &DROPS)?)?;
        assert_eq!(queue.kick(), Kick::NotNeeded);
        assert_eq!(bound.device.notifications(), 1);

        bound.device.suppress_notifications(0, false);
        bound.device.fail_notify();
        queue.add(DropCountedBuffer::new(4, &DROPS)?)?;
        assert_eq!(queue.kick(), Kick::Failed);
        assert!(queue.is_broken());
        Ok(())
    }

    #[test]
    fn the_handler_hears_of_used_buffers_by_the_number_of_their_queue() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let first = Virtqueue::<DropCountedBuffer>::without_callback(c"first")?;
        let second = Virtqueue::<DropCountedBuffer>::new(c"second")?;
        let counter = CountingHandler::new()?;
        let bound = BoundTestDevice::new()?;
        bound.find_queues(&[&first, &second], counter.clone())?;

        for (index, queue) in [&first, &second].into_iter().enumerate() {
            bound.device.interrupt(index);
            assert_eq!(counter.used_count(index), 0);
            queue.add(DropCountedBuffer::new(1, &DROPS)?)?;
            let chain = bound.device.pop_descriptor_chain(index).ok_or(ENOENT)?;
            bound.device.add_used(index, chain.head, 0);
            bound.device.interrupt(index);
        }
        assert_eq!((counter.used_count(0), counter.used_count(1)), (0, 1));

        second.disable_callback();
        assert!(bound.device.interrupts_suppressed(1));
        assert!(!second.enable_callback());
        drop(second.get_buf().ok_or(ENOENT)?);
        assert!(second.enable_callback());
        assert!(!bound.device.interrupts_suppressed(1));
        assert!(second.enable_callback_delayed());
        Ok(())
    }

    #[test]
    fn a_queue_has_one_ring_at_a_time() -> Result {
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let queue = Virtqueue::<DropCountedBuffer>::new(c"test")?;
        let counter = CountingHandler::new()?;
        let bound = BoundTestDevice::new()?;
        assert_eq!(
            bound.find_queues(&[&queue, &queue], counter.clone()).err(),
            Some(EBUSY)
        );
        bound.device.fail_find_vqs();
        assert_eq!(
            bound.find_queues(&[&queue], counter.clone()).err(),
            Some(ENOENT)
        );
        assert_eq!(bound.find_queues(&[], counter.clone()).err(), Some(EINVAL));
        bound.find_queues(&[&queue], counter.clone())?;
        assert_eq!(
            bound.find_queues(&[&queue], counter.clone()).err(),
            Some(EBUSY)
        );
        let other = BoundTestDevice::new()?;
        assert_eq!(
            other.find_queues(&[&queue], counter.clone()).err(),
            Some(EBUSY)
        );

        // A new ring after a reset: the old buffers are dropped, and new buffers can be added.
        queue.add(DropCountedBuffer::new(1, &DROPS)?)?;
        bound.binding().reset();
        assert_eq!(DROPS.load(Relaxed), 0);
        other.find_queues(&[&queue], counter)?;
        assert_eq!(DROPS.load(Relaxed), 1);
        queue.add(DropCountedBuffer::new(2, &DROPS)?)?;
        assert!(bound.device.pop_descriptor_chain(0).is_none());
        assert!(other.device.pop_descriptor_chain(0).is_some());
        // Resetting a device without queues again is allowed.
        bound.binding().reset();
        assert!(!queue.is_broken());
        Ok(())
    }

    #[test]
    fn either_kind_is_returned_as_it_was_added() -> Result {
        type Both = Either<Outgoing<u64>, Incoming<u64>>;
        let queue = Virtqueue::<Both>::new(c"test")?;
        let bound = BoundTestDevice::new()?;
        bound.find_queues(&[&queue], CountingHandler::new()?)?;
        queue.add(Either::Right(Incoming::zeroed(GFP_KERNEL)?))?;
        queue.add(Either::Left(Outgoing::new(11, GFP_KERNEL)?))?;
        for writable in [true, false] {
            let chain = bound.device.pop_descriptor_chain(0).ok_or(ENOENT)?;
            assert_eq!(chain.segments[0].writable, writable);
            if writable {
                chain.segments[0].write(22);
            }
            bound.device.add_used(0, chain.head, 8);
        }
        let (first, written) = queue.get_buf().ok_or(ENOENT)?;
        assert_eq!(written, 8);
        assert!(matches!(first, Either::Right(value) if *value == 22));
        let (second, written) = queue.get_buf().ok_or(ENOENT)?;
        assert_eq!(written, 0);
        assert!(matches!(second, Either::Left(value) if *value == 11));
        Ok(())
    }

    #[test]
    fn configuration_space_is_reached_until_the_device_is_unbound() -> Result {
        let bound = BoundTestDevice::new()?;
        let config = bound.binding().config(16)?;
        const WORD: Field<u32> = Field::new::<4, 16>();
        config.write(WORD, 0x0102_0304)?;
        assert_eq!(config.read(WORD)?, 0x0102_0304);
        assert_eq!(config.read(Field::<u8>::new::<4, 16>())?, 4);
        assert_eq!(
            bound
                .binding()
                .config(8)?
                .read(Field::<u64>::new::<0, 16>())?,
            0x0102_0304_0000_0000
        );
        bound.binding().reset();
        assert_eq!(config.read(Field::<u16>::new::<6, 16>())?, 0x0102);
        drop(bound);
        assert_eq!(config.read(WORD).err(), Some(ENODEV));
        assert_eq!(config.write(WORD, 0).err(), Some(ENODEV));
        Ok(())
    }

    #[test]
    fn a_field_that_the_device_has_not_is_refused() -> Result {
        /// `VIRTIO_F_VERSION_1`, the only feature of the device.
        const PRESENT: u32 = 32;
        const ABSENT: u32 = 5;
        const LAST: Field<u32> = Field::new::<12, 16>();
        // A layout may be larger than the configuration space of the device.
        const BEYOND: Field<u32> = Field::new::<16, 20>();
        let bound = BoundTestDevice::new()?;
        let config = bound.binding().config(16)?;
        for field in [LAST, LAST.with_feature(PRESENT)] {
            config.write(field, 7)?;
            assert_eq!(config.read(field), Ok(7));
        }
        let absent = LAST.with_feature(ABSENT);
        let shorter = bound.binding().config(12)?;
        for (config, field) in [(&config, absent), (&config, BEYOND), (&shorter, LAST)] {
            assert_eq!(config.read(field), Err(EINVAL));
            assert_eq!(config.write(field, 8), Err(EINVAL));
        }
        assert_eq!(config.read(LAST), Ok(7));
        // The conversion of the size does not wrap.
        assert_eq!(bound.binding().config(usize::MAX).err(), Some(EINVAL));
        Ok(())
    }
}
