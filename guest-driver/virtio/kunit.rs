// SPDX-License-Identifier: GPL-2.0

//! Tests of the queues, on rings whose far side is in the test.

use super::AddError;
use kernel::prelude::*;

/// For tests, where any failure is one. A driver has to tell them apart.
impl<B> From<AddError<B>> for Error {
    fn from(_error: AddError<B>) -> Self {
        EIO
    }
}

#[kunit_tests(virtio_balloon_rs_virtqueue)]
mod tests {
    use super::super::{
        kunit_device::{Bound, Counter, Mortal, Shape, ENTRIES},
        AddFailure, Either, Field, Incoming, Kick, Outgoing, Virtqueue,
    };
    use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use kernel::prelude::*;

    /// One queue of [`Mortal`]s on a device of its own.
    fn queue() -> Result<(Bound, Virtqueue<Mortal>)> {
        let queue = Virtqueue::new(c"test")?;
        let bound = Bound::new()?;
        bound.find_queues(&[&queue], Counter::new()?)?;
        Ok((bound, queue))
    }

    #[test]
    fn buffers_reach_the_device_in_order_and_come_back_in_the_order_of_their_use() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        for number in 1..=3 {
            queue.add(Mortal::new(number, &DEATHS)?)?;
        }

        let mut heads = KVec::new();
        for number in 1..=3u64 {
            let seen = bound.device.take(0).ok_or(ENOENT)?;
            assert_eq!(seen.segments.len(), 1);
            let segment = &seen.segments[0];
            assert_eq!((segment.length, segment.writable), (8, false));
            assert_eq!(segment.read(), number);
            heads.push(seen.head, GFP_KERNEL)?;
        }
        assert!(bound.device.take(0).is_none());
        assert!(queue.pop().is_none());

        for index in [2, 0, 1] {
            bound.device.give_back(0, heads[index], 0);
        }
        for number in [3, 1, 2] {
            let (buffer, written) = queue.pop().ok_or(ENOENT)?;
            assert_eq!((buffer.number(), written), (number, 0));
        }
        assert!(queue.pop().is_none());
        assert_eq!(DEATHS.load(Relaxed), 3);
        Ok(())
    }

    #[test]
    fn the_ring_and_its_indices_wrap() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        const BUFFERS: u32 = 66_000;
        let (bound, queue) = queue()?;
        for number in 0..BUFFERS {
            queue.add(Mortal::new(number.into(), &DEATHS)?)?;
            let seen = bound.device.take(0).ok_or(ENOENT)?;
            bound.device.give_back(0, seen.head, 0);
            let (buffer, _) = queue.pop().ok_or(ENOENT)?;
            if buffer.number() != u64::from(number) {
                return Err(EILSEQ);
            }
        }
        assert_eq!(DEATHS.load(Relaxed), BUFFERS);
        assert_eq!(queue.free_entries(), ENTRIES);
        Ok(())
    }

    #[test]
    fn a_full_ring_gives_the_buffer_back_and_bothers_nobody() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        for number in 0..ENTRIES as u64 {
            assert_eq!(queue.free_entries(), ENTRIES - number as usize);
            queue.add(Mortal::new(number, &DEATHS)?)?;
        }
        let error = queue.add(Mortal::new(99, &DEATHS)?).err().ok_or(EINVAL)?;
        assert_eq!(error.failure, AddFailure::Full);
        assert_eq!(error.buffer.number(), 99);
        assert_eq!(DEATHS.load(Relaxed), 0);
        assert_eq!(bound.device.notifications(), 0);
        assert!(!queue.is_broken());

        let seen = bound.device.take(0).ok_or(ENOENT)?;
        bound.device.give_back(0, seen.head, 0);
        let (buffer, _) = queue.pop().ok_or(ENOENT)?;
        assert_eq!(buffer.number(), 0);
        queue.add(error.buffer)?;
        assert_eq!(queue.free_entries(), 0);
        Ok(())
    }

    #[test]
    fn buffers_in_flight_come_back_once_when_the_ring_goes() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        bound.device.watch(&DEATHS);
        for number in 0..4 {
            queue.add(Mortal::new(number, &DEATHS)?)?;
        }
        // One is used and popped, one is used and not popped, one is with the device, one unseen.
        let seen = bound.device.take(0).ok_or(ENOENT)?;
        bound.device.give_back(0, seen.head, 0);
        drop(queue.pop().ok_or(ENOENT)?);
        let seen = bound.device.take(0).ok_or(ENOENT)?;
        bound.device.give_back(0, seen.head, 0);
        bound.device.take(0).ok_or(ENOENT)?;
        assert_eq!(DEATHS.load(Relaxed), 1);
        assert!(queue.detach().is_none());

        bound.binding().take_down();
        assert_eq!(bound.device.resets(), 1);
        assert_eq!(bound.device.deaths_at_deletion(), Some(1));
        assert_eq!(DEATHS.load(Relaxed), 1);

        let first = queue.detach().ok_or(ENOENT)?;
        assert!((1..4).contains(&first.number()));
        drop(first);
        assert_eq!(DEATHS.load(Relaxed), 2);
        bound.binding().drop_returned();
        assert_eq!(DEATHS.load(Relaxed), 4);
        assert!(queue.detach().is_none());
        drop(bound);
        drop(queue);
        assert_eq!(DEATHS.load(Relaxed), 4);
        Ok(())
    }

    #[test]
    fn a_queue_dropped_by_its_driver_loses_nothing() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        bound.device.watch(&DEATHS);
        queue.add(Mortal::new(1, &DEATHS)?)?;
        queue.add(Mortal::new(2, &DEATHS)?)?;
        drop(queue);
        assert_eq!(DEATHS.load(Relaxed), 0);
        drop(bound);
        assert_eq!(DEATHS.load(Relaxed), 2);
        Ok(())
    }

    #[test]
    fn a_queue_that_outlives_its_device_does_nothing() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        queue.add(Mortal::new(1, &DEATHS)?)?;
        drop(bound);
        assert_eq!(DEATHS.load(Relaxed), 1);

        let error = queue.add(Mortal::new(2, &DEATHS)?).err().ok_or(EINVAL)?;
        assert_eq!(error.failure, AddFailure::Gone);
        assert_eq!(queue.kick(), Kick::Failed);
        assert!(queue.pop().is_none());
        assert!(queue.detach().is_none());
        assert!(queue.is_broken());
        assert!(queue.enable_callback());
        assert_eq!((queue.entries(), queue.free_entries()), (0, 0));
        Ok(())
    }

    #[test]
    fn an_id_that_is_no_buffer_breaks_the_queue() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        // Beyond the ring; and one that was not made available.
        for id in [ENTRIES as u32, 2] {
            let (bound, queue) = queue()?;
            queue.add(Mortal::new(1, &DEATHS)?)?;
            bound.device.give_back(0, id, 0);
            assert!(queue.pop().is_none());
            assert!(queue.is_broken());
            let error = queue.add(Mortal::new(2, &DEATHS)?).err().ok_or(EINVAL)?;
            assert_eq!(error.failure, AddFailure::Broken);
            assert_eq!(queue.kick(), Kick::Failed);
            let before = DEATHS.load(Relaxed);
            drop(error);
            drop(bound);
            assert_eq!(DEATHS.load(Relaxed), before + 2);
        }
        Ok(())
    }

    #[test]
    fn a_buffer_used_twice_comes_back_once() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        queue.add(Mortal::new(1, &DEATHS)?)?;
        let seen = bound.device.take(0).ok_or(ENOENT)?;
        bound.device.give_back(0, seen.head, 0);
        bound.device.give_back(0, seen.head, 0);
        drop(queue.pop().ok_or(ENOENT)?);
        assert!(queue.pop().is_none());
        assert!(queue.is_broken());
        drop(bound);
        assert_eq!(DEATHS.load(Relaxed), 1);
        Ok(())
    }

    #[test]
    fn no_more_bytes_are_written_than_there_are() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        // (readable, writable) segments of 8 bytes; what the device says; what the driver hears.
        for (shape, said, heard) in [((1, 0), u32::MAX, 0), ((1, 1), u32::MAX, 8), ((0, 2), 9, 9)] {
            let shape = Shape::Segments(shape.0, shape.1);
            queue.add(Mortal::shaped(7, shape, &DEATHS)?)?;
            let seen = bound.device.take(0).ok_or(ENOENT)?;
            if let Some(segment) = seen.segments.iter().find(|segment| segment.writable) {
                segment.write(0x5a5a);
            }
            bound.device.give_back(0, seen.head, said);
            let (buffer, written) = queue.pop().ok_or(ENOENT)?;
            assert_eq!(written, heard);
            assert_eq!(buffer.written(), if heard > 0 { 0x5a5a } else { 0 });
        }
        Ok(())
    }

    #[test]
    fn what_no_device_could_take_is_refused() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        for shape in [
            Shape::Segments(0, 0),
            Shape::Segments(ENTRIES, 1),
            Shape::Segments(40, 0),
            Shape::Empty,
            Shape::WrongOrder,
        ] {
            let error = queue
                .add(Mortal::shaped(1, shape, &DEATHS)?)
                .err()
                .ok_or(EINVAL)?;
            assert_eq!(error.failure, AddFailure::Malformed);
            assert_eq!(error.buffer.number(), 1);
        }
        assert!(bound.device.take(0).is_none());

        queue.add(Mortal::shaped(2, Shape::Segments(2, 2), &DEATHS)?)?;
        assert_eq!(queue.free_entries(), 0);
        let seen = bound.device.take(0).ok_or(ENOENT)?;
        let writable = seen.segments.iter().map(|segment| segment.writable);
        assert!(writable.eq([false, false, true, true]));
        Ok(())
    }

    #[test]
    fn the_device_is_notified_when_it_wants_to_be() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let (bound, queue) = queue()?;
        queue.add(Mortal::new(1, &DEATHS)?)?;
        queue.add(Mortal::new(2, &DEATHS)?)?;
        assert_eq!(bound.device.notifications(), 0);
        assert_eq!(queue.kick(), Kick::Sent);
        assert_eq!(bound.device.notifications(), 1);
        // There is nothing new to tell it of.
        assert_eq!(queue.kick(), Kick::NotWanted);
        assert_eq!(bound.device.notifications(), 1);

        bound.device.suppress_notifications(0, true);
        queue.add(Mortal::new(3, &DEATHS)?)?;
        assert_eq!(queue.kick(), Kick::NotWanted);
        assert_eq!(bound.device.notifications(), 1);

        bound.device.suppress_notifications(0, false);
        bound.device.deafen();
        queue.add(Mortal::new(4, &DEATHS)?)?;
        assert_eq!(queue.kick(), Kick::Failed);
        assert!(queue.is_broken());
        Ok(())
    }

    #[test]
    fn the_handler_hears_of_used_buffers_by_the_number_of_their_queue() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let first = Virtqueue::<Mortal>::without_callback(c"first")?;
        let second = Virtqueue::<Mortal>::new(c"second")?;
        let counter = Counter::new()?;
        let bound = Bound::new()?;
        bound.find_queues(&[&first, &second], counter.clone())?;

        for (index, queue) in [&first, &second].into_iter().enumerate() {
            bound.device.interrupt(index);
            assert_eq!(counter.told(index), 0);
            queue.add(Mortal::new(1, &DEATHS)?)?;
            let seen = bound.device.take(index).ok_or(ENOENT)?;
            bound.device.give_back(index, seen.head, 0);
            bound.device.interrupt(index);
        }
        assert_eq!((counter.told(0), counter.told(1)), (0, 1));

        second.disable_callback();
        assert!(bound.device.interrupts_suppressed(1));
        assert!(!second.enable_callback());
        drop(second.pop().ok_or(ENOENT)?);
        assert!(second.enable_callback());
        assert!(!bound.device.interrupts_suppressed(1));
        assert!(second.enable_callback_delayed());
        Ok(())
    }

    #[test]
    fn a_queue_has_one_ring_at_a_time() -> Result {
        static DEATHS: AtomicU32 = AtomicU32::new(0);
        let queue = Virtqueue::<Mortal>::new(c"test")?;
        let counter = Counter::new()?;
        let bound = Bound::new()?;
        assert_eq!(
            bound.find_queues(&[&queue, &queue], counter.clone()).err(),
            Some(EBUSY)
        );
        bound.device.refuse_queues();
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
        let other = Bound::new()?;
        assert_eq!(
            other.find_queues(&[&queue], counter.clone()).err(),
            Some(EBUSY)
        );

        // A new ring after a reset, as after a sleep: the old buffers are gone, new ones travel.
        queue.add(Mortal::new(1, &DEATHS)?)?;
        bound.binding().take_down();
        assert_eq!(DEATHS.load(Relaxed), 0);
        other.find_queues(&[&queue], counter)?;
        assert_eq!(DEATHS.load(Relaxed), 1);
        queue.add(Mortal::new(2, &DEATHS)?)?;
        assert!(bound.device.take(0).is_none());
        assert!(other.device.take(0).is_some());
        // Taking down twice, and a device without queues, is nothing special.
        bound.binding().take_down();
        assert!(!queue.is_broken());
        Ok(())
    }

    #[test]
    fn either_kind_comes_back_as_what_it_was() -> Result {
        type Both = Either<Outgoing<u64>, Incoming<u64>>;
        let queue = Virtqueue::<Both>::new(c"test")?;
        let bound = Bound::new()?;
        bound.find_queues(&[&queue], Counter::new()?)?;
        queue.add(Either::Right(Incoming::zeroed(GFP_KERNEL)?))?;
        queue.add(Either::Left(Outgoing::new(11, GFP_KERNEL)?))?;
        for writable in [true, false] {
            let seen = bound.device.take(0).ok_or(ENOENT)?;
            assert_eq!(seen.segments[0].writable, writable);
            if writable {
                seen.segments[0].write(22);
            }
            bound.device.give_back(0, seen.head, 8);
        }
        let (first, written) = queue.pop().ok_or(ENOENT)?;
        assert_eq!(written, 8);
        assert!(matches!(first, Either::Right(value) if *value == 22));
        let (second, written) = queue.pop().ok_or(ENOENT)?;
        assert_eq!(written, 0);
        assert!(matches!(second, Either::Left(value) if *value == 11));
        Ok(())
    }

    #[test]
    fn configuration_space_is_reached_until_the_device_is_unbound() -> Result {
        let bound = Bound::new()?;
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
        bound.binding().take_down();
        assert_eq!(config.read(Field::<u16>::new::<6, 16>())?, 0x0102);
        drop(bound);
        assert_eq!(config.read(WORD).err(), Some(ENODEV));
        assert_eq!(config.write(WORD, 0).err(), Some(ENODEV));
        Ok(())
    }

    #[test]
    fn a_field_that_the_device_has_not_is_refused() -> Result {
        /// `VIRTIO_F_VERSION_1`, the one feature that the device has.
        const PRESENT: u32 = 32;
        const ABSENT: u32 = 5;
        const LAST: Field<u32> = Field::new::<12, 16>();
        // A layout may be longer than the device.
        const BEYOND: Field<u32> = Field::new::<16, 20>();
        let bound = Bound::new()?;
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
        // Nobody's offset wraps.
        assert_eq!(bound.binding().config(usize::MAX).err(), Some(EINVAL));
        Ok(())
    }
}
