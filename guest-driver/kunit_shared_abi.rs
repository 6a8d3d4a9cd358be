// SPDX-License-Identifier: GPL-2.0

//! KUnit tests of [`shared_abi`](crate::shared_abi).
//!
//! They compare the ABI with the kernel's UAPI header, and run the hinting state machines as the
//! kernel compiles them.

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_shared_abi)]
mod tests {
    use crate::{
        bindings,
        shared_abi::{
            command::{CommandId, HintId},
            config,
            features::Features,
            hinting::{device, driver},
            page, queue,
            queue::Queue,
            stats::{Stat, StatTag},
        },
    };
    use core::mem::{offset_of, size_of};
    use kernel::prelude::*;

    #[test]
    fn features_are_those_of_the_kernel() {
        for (feature, bit) in [
            (
                Features::MUST_TELL_HOST,
                bindings::VIRTIO_BALLOON_F_MUST_TELL_HOST,
            ),
            (Features::STATS_VQ, bindings::VIRTIO_BALLOON_F_STATS_VQ),
            (
                Features::DEFLATE_ON_OOM,
                bindings::VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
            ),
            (
                Features::FREE_PAGE_HINT,
                bindings::VIRTIO_BALLOON_F_FREE_PAGE_HINT,
            ),
            (
                Features::PAGE_POISON,
                bindings::VIRTIO_BALLOON_F_PAGE_POISON,
            ),
            (Features::REPORTING, bindings::VIRTIO_BALLOON_F_REPORTING),
        ] {
            assert_eq!(feature.bits(), 1 << bit);
            assert_eq!(feature.bit_number(), bit);
        }
    }

    #[test]
    fn config_space_is_laid_out_as_in_the_kernel() {
        use bindings::virtio_balloon_config as Layout;
        assert_eq!(config::NUM_PAGES, offset_of!(Layout, num_pages));
        assert_eq!(config::ACTUAL, offset_of!(Layout, actual));
        assert_eq!(
            config::FREE_PAGE_HINT_CMD_ID,
            offset_of!(Layout, __bindgen_anon_1)
        );
        assert_eq!(config::POISON_VAL, offset_of!(Layout, poison_val));
        assert_eq!(config::MAX_SIZE, size_of::<Layout>());

        let values = config::ConfigSpace {
            num_pages: 1,
            actual: 2,
            free_page_hint_cmd_id: 0x8000_0003,
            poison_val: 0xaaaa_aaaa,
        };
        assert_eq!(config::ConfigSpace::from_bytes(values.to_bytes()), values);
    }

    #[test]
    fn pages_are_those_of_the_kernel() {
        assert_eq!(page::PFN_SHIFT, bindings::VIRTIO_BALLOON_PFN_SHIFT);
        assert_eq!(
            page::balloon_pages_per_guest_page(kernel::page::PAGE_SHIFT as u32),
            Some(1 << (kernel::page::PAGE_SHIFT - 12))
        );
        // A guest with 64 KiB pages.
        assert_eq!(page::balloon_pages_per_guest_page(16), Some(16));
        assert_eq!(page::round_up_to_guest_pages(17, 16), Some(32));
    }

    #[test]
    fn statistics_are_those_of_the_kernel() {
        assert_eq!(StatTag::ALL.len(), bindings::VIRTIO_BALLOON_S_NR as usize);
        assert_eq!(Stat::SIZE, size_of::<bindings::virtio_balloon_stat>());
        let stat = Stat {
            tag: bindings::VIRTIO_BALLOON_S_AVAIL as u16,
            value: 0x0123_4567_89ab_cdef,
        };
        assert_eq!(
            StatTag::from_number(stat.tag).map(StatTag::qemu_name),
            Some("stat-available-memory")
        );
        assert_eq!(Stat::from_bytes(stat.to_bytes()), stat);
    }

    #[test]
    fn queues_that_are_absent_take_no_number() {
        let features = Features::FREE_PAGE_HINT.union(Features::REPORTING);
        assert_eq!(Queue::FreePage.index(features), Some(2));
        assert_eq!(Queue::Reporting.index(features), Some(3));
        assert_eq!(Queue::Stats.index(features), None);
        assert_eq!(queue::negotiated_queues(features).count(), 4);
    }

    #[test]
    fn r8_ids_wrap_inside_their_range() {
        assert_eq!(
            CommandId::Stop.number(),
            bindings::VIRTIO_BALLOON_CMD_ID_STOP
        );
        assert_eq!(
            CommandId::Done.number(),
            bindings::VIRTIO_BALLOON_CMD_ID_DONE
        );
        assert_eq!(HintId::LAST.successor(), HintId::FIRST);
        assert_eq!(HintId::FIRST.steps_since(HintId::LAST), 1);
        assert_eq!(
            CommandId::from_number(u32::MAX),
            CommandId::Hint(HintId::LAST)
        );
        assert_eq!(
            CommandId::from_number(0x7fff_ffff),
            CommandId::Reserved(0x7fff_ffff)
        );
    }

    /// A device and a driver state machine with the free page queue between them.
    struct Pair {
        device: device::State,
        driver: driver::State,
        /// Events that the driver has sent and the device has not received.
        queue: KVec<device::Event>,
        hinted: u32,
        used: u32,
        ignored: u32,
    }

    impl Pair {
        fn new(next: HintId) -> Self {
            Self {
                device: device::State::with_next_id(next),
                driver: driver::State::default(),
                queue: KVec::new(),
                hinted: 0,
                used: 0,
                ignored: 0,
            }
        }

        /// Steps the device. The driver handles a config change at once.
        fn device(&mut self, event: device::Event) -> Result {
            let (next, action) = self.device.step(event);
            self.device = next;
            match action {
                Some(device::Action::NotifyConfig) => {
                    self.driver(driver::Event::ConfigChanged(self.device.command()))
                }
                Some(device::Action::UseFreeBlock(_)) => {
                    self.used += 1;
                    Ok(())
                }
                Some(device::Action::Ignore(_)) => {
                    self.ignored += 1;
                    Ok(())
                }
                _ => Ok(()),
            }
        }

        fn driver(&mut self, event: driver::Event) -> Result {
            let (next, actions) = self.driver.step(event);
            self.driver = next;
            for action in actions {
                match action {
                    driver::Action::SendStart(id) => {
                        let id = CommandId::from_number(id.number());
                        self.queue.push(device::Event::Command(id), GFP_KERNEL)?;
                    }
                    driver::Action::SendStop => {
                        let stop = device::Event::Command(CommandId::Stop);
                        self.queue.push(stop, GFP_KERNEL)?;
                    }
                    driver::Action::ReofferHinted => {
                        for _ in 0..self.hinted {
                            self.queue.push(device::Event::FreeBlock, GFP_KERNEL)?;
                        }
                    }
                    driver::Action::ReleaseHinted => self.hinted = 0,
                }
            }
            Ok(())
        }

        /// Offers `blocks` free blocks to the device.
        fn offer(&mut self, blocks: u32) -> Result {
            for _ in 0..blocks {
                self.hinted += 1;
                self.queue.push(device::Event::FreeBlock, GFP_KERNEL)?;
            }
            Ok(())
        }

        /// Delivers everything on the queue to the device.
        fn deliver(&mut self) -> Result {
            for event in core::mem::replace(&mut self.queue, KVec::new()) {
                self.device(event)?;
            }
            Ok(())
        }
    }

    #[test]
    fn a_round_from_start_to_done() -> Result {
        let mut pair = Pair::new(HintId::LAST);
        pair.device(device::Event::Start)?;
        pair.offer(3)?;
        pair.deliver()?;
        assert_eq!((pair.used, pair.hinted), (3, 3));
        pair.driver(driver::Event::Exhausted)?;
        pair.deliver()?;
        assert_eq!(pair.device.phase(), device::Phase::Finished(HintId::LAST));
        assert_eq!(pair.driver.offering(), None);
        assert_eq!(pair.hinted, 3);
        pair.device(device::Event::Done)?;
        assert_eq!((pair.driver, pair.hinted), (driver::State::Idle, 0));
        // The next id wraps.
        pair.device(device::Event::Start)?;
        assert_eq!(pair.device.phase(), device::Phase::Requested(HintId::FIRST));
        Ok(())
    }

    #[test]
    fn r2_a_stop_of_a_cancelled_round_does_not_end_the_next() -> Result {
        let mut pair = Pair::new(HintId::FIRST);
        pair.device(device::Event::Start)?;
        pair.offer(2)?;
        // The hint round is cancelled and another one requested before the device receives
        // anything.
        pair.device(device::Event::Stop)?;
        pair.device(device::Event::Start)?;
        pair.offer(1)?;
        pair.deliver()?;
        let second = HintId::FIRST.successor();
        assert_eq!(pair.device.phase(), device::Phase::Started(second));
        // Blocks of the first hint round do not count; all three are offered again under the second
        // id.
        assert_eq!((pair.used, pair.hinted), (3, 3));
        Ok(())
    }

    #[test]
    fn r6_a_block_counts_only_between_two_syncs() -> Result {
        let mut pair = Pair::new(HintId::FIRST);
        pair.device(device::Event::Start)?;
        pair.offer(1)?;
        pair.deliver()?;
        pair.offer(1)?;
        pair.device(device::Event::SyncStarts)?;
        pair.deliver()?;
        assert_eq!(pair.used, 1);
        pair.device(device::Event::SyncEnds)?;
        pair.deliver()?;
        assert_eq!(
            pair.device.phase(),
            device::Phase::Started(HintId::FIRST.successor())
        );
        // Both hinted blocks are offered again under the new id.
        assert_eq!((pair.used, pair.hinted), (3, 2));
        Ok(())
    }

    #[test]
    fn r16_blocks_return_when_the_device_is_gone() -> Result {
        let mut pair = Pair::new(HintId::FIRST);
        pair.device(device::Event::Start)?;
        pair.offer(5)?;
        pair.driver(driver::Event::Reset)?;
        assert_eq!((pair.driver, pair.hinted), (driver::State::Idle, 0));
        Ok(())
    }
}
