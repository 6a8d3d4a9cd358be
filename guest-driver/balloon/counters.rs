// SPDX-License-Identifier: GPL-2.0

//! What the driver counts, for people and tests: a file in debugfs.
//!
//! The file is `/sys/kernel/debug/virtio_balloon_rs/<device>/counters`, for instance with `virtio0`
//! as the device. It has one `key value` a line, the key of lowercase letters, digits and
//! underscores, one space, and the value as a decimal number. All values are of now, read one after
//! the other while the driver works. Keys may be added anywhere; a key that is there keeps its name
//! and its meaning, and goes only when what it counts does. So a reader should look keys up by
//! name, and ignore those that it does not know.
//!
//! Counts start at zero when the device is bound, and do not wrap in practice (64 bits). They are
//! not meant to be summed up over time with one another at a given moment.
//!
//! Without debugfs in the kernel nobody can read them; the driver works all the same.

use kernel::debugfs::{File, Writer};
use kernel::device;
use kernel::fmt;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{aref::ARef, Arc};

use crate::bindings::trace::Tracer;
use crate::shared_abi::queue::Queue;
use crate::virtio::{debugfs, Kick};

/// Orders that have a counter of their own. Larger ones, which no architecture has, count as the
/// last.
const ORDERS: usize = 16;

/// A number that any context may change and read.
pub(crate) struct Counter(Atomic<u64>);

impl Counter {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Adds `count`.
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// Replaces the number: for those that say how things are, not how often something happened.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Replaces the number if `value` is less.
    ///
    /// Of several that do so at once the last one may win: for one writer at a time.
    pub(crate) fn lower(&self, value: u64) {
        if value < self.get() {
            self.set(value);
        }
    }

    /// The number.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of a device. Each may be used in any context.
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
            /// `notifications` and `interrupts` of each queue, as [`Queue::ALL`] has them.
            queues: [QueueCounters; Queue::MAX_COUNT],
            /// `hinted_blocks_order_N`: blocks of `2^N` pages offered on the free page queue.
            hinted_by_order: [Counter; ORDERS],
            tracer: Tracer,
        }

        impl Counters {
            /// All zero. What is counted by methods is traced too, as events of `device`.
            pub(crate) fn new(device: Option<ARef<device::Device>>) -> Self {
                Self {
                    $($name: Counter::new(),)*
                    queues: [const { QueueCounters::new() }; Queue::MAX_COUNT],
                    hinted_by_order: [const { Counter::new() }; ORDERS],
                    tracer: Tracer::new(device),
                }
            }

            /// Shows those that have a field of their own, in the order of the fields.
            fn show(&self, show: &mut dyn FnMut(&str, u64) -> fmt::Result) -> fmt::Result {
                $(show(stringify!($name), self.$name.get())?;)*
                Ok(())
            }
        }
    };
}

counters! {
    /// Pages of 4 KiB that are in the balloon, acknowledged by the device.
    balloon_pages,
    /// Pages of 4 KiB that the device wants in the balloon, as last read.
    target_pages,
    /// Requests sent to put pages in.
    inflate_requests,
    /// Requests sent to take pages out.
    deflate_requests,
    /// Pages of the guest that were moved within the balloon, for compaction.
    migrated_pages,
    /// Times that the guest was so short of memory that it took pages out of the balloon.
    oom_deflations,
    /// Pages of 4 KiB that it took out then.
    oom_deflated_pages,
    /// Times that inflating had to wait for memory.
    shortages,
    /// Rounds of hinting that began.
    rounds_started,
    /// Rounds of hinting that went on until there was nothing more to offer.
    rounds_finished,
    /// Microseconds from the begin of the last round that finished to its end.
    last_round_us,
    /// Blocks offered on the free page queue, of all orders.
    hinted_blocks,
    /// Bytes of these.
    hinted_bytes,
    /// Pages of the guest that hinting leaves to it, as computed for the last round.
    hint_reserve_pages,
    /// The fewest free pages that the guest had when hinting had just taken a block, in the last
    /// round that took any.
    hint_free_pages_low,
    /// Blocks that were taken and given back at once, because less than the reserve was left.
    hint_taken_back_blocks,
    /// Pages of the guest that went from hinted blocks into the balloon before the device was done
    /// with them.
    hinted_pages_inflated,
    /// Blocks that the guest, short of memory, took back before the device was done with them.
    returned_blocks,
    /// Pages of the guest of these.
    returned_pages,
    /// Blocks that were filled with zeroes because they went back before the device was done.
    zeroed_blocks,
    /// Pages of the guest of these.
    zeroed_pages,
    /// Blocks of free pages that were reported and acknowledged.
    reported_blocks,
    /// Pages of the guest of these.
    reported_pages,
    /// Times that the device could not be given a report, or did not acknowledge it.
    failed_reports,
}

/// What passes between driver and device for one queue.
struct QueueCounters {
    /// Notifications that were sent to the device.
    notifications: Counter,
    /// Interrupts that were taken.
    interrupts: Counter,
}

impl QueueCounters {
    const fn new() -> Self {
        Self {
            notifications: Counter::new(),
            interrupts: Counter::new(),
        }
    }
}

impl Counters {
    /// Counts a notification of the device, if one was sent.
    pub(crate) fn kicked(&self, queue: Queue, kick: Kick) {
        if kick == Kick::Sent {
            self.queue_counters(queue).notifications.add(1);
        }
    }

    /// Counts an interrupt.
    pub(crate) fn interrupted(&self, queue: Queue) {
        self.queue_counters(queue).interrupts.add(1);
    }

    /// Counts a request of so many balloon pages that was sent.
    pub(crate) fn requested(&self, queue: Queue, pages: u64) {
        match queue {
            Queue::Inflate => self.inflate_requests.add(1),
            Queue::Deflate => self.deflate_requests.add(1),
            Queue::Stats | Queue::FreePage | Queue::Reporting => {}
        }
        self.tracer.request(c_name(queue), pages);
    }

    /// The device has used a request of so many balloon pages.
    pub(crate) fn acknowledged(&self, queue: Queue, pages: u64) {
        self.tracer.acknowledge(c_name(queue), pages);
    }

    /// Counts a round that begins.
    pub(crate) fn hint_round_started(&self, id: u32) {
        self.rounds_started.add(1);
        self.tracer.hint_start(id, self.hint_reserve_pages.get());
    }

    /// A round ends, after so many microseconds.
    pub(crate) fn hint_round_stopped(&self, microseconds: u64) {
        self.tracer.hint_stop(microseconds);
    }

    /// Counts a block of so many pages that the guest took back.
    pub(crate) fn reclaimed(&self, pages: u64) {
        self.returned_blocks.add(1);
        self.returned_pages.add(pages);
        self.tracer.hint_return(pages);
    }

    /// Counts a report of free pages that has ended.
    pub(crate) fn reported(&self, blocks: usize, pages: usize, acknowledged: bool) {
        if acknowledged {
            self.reported_blocks.add(blocks as u64);
            self.reported_pages.add(pages as u64);
        } else {
            self.failed_reports.add(1);
        }
        self.tracer
            .report(blocks as u32, pages as u64, acknowledged);
    }

    /// Counts a block of `2^order` pages and `bytes` bytes at a physical address that was offered.
    pub(crate) fn hinted(&self, address: u64, order: u32, bytes: usize) {
        self.tracer.hint_block(address, order);
        let slot = (order as usize).min(ORDERS - 1);
        self.hinted_by_order[slot].add(1);
        self.hinted_blocks.add(1);
        self.hinted_bytes.add(bytes as u64);
    }

    fn queue_counters(&self, queue: Queue) -> &QueueCounters {
        &self.queues[queue as usize]
    }

    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.show(&mut |key, value| writeln!(f, "{key} {value}"))?;
        for queue in Queue::ALL {
            let queue_counters = self.queue_counters(queue);
            for (what, counter) in [
                ("notifications", &queue_counters.notifications),
                ("interrupts", &queue_counters.interrupts),
            ] {
                // Keys have no hyphen, though a queue's name may.
                let name = queue.name();
                let (name, rest) = name.split_once('-').unwrap_or((name, ""));
                let joint = if rest.is_empty() { "" } else { "_" };
                writeln!(f, "{name}{joint}{rest}_{what} {}", counter.get())?;
            }
        }
        for (order, blocks) in self.hinted_by_order.iter().enumerate() {
            writeln!(f, "hinted_blocks_order_{order} {}", blocks.get())?;
        }
        Ok(())
    }
}

/// The queue's name as C has strings.
fn c_name(queue: Queue) -> &'static CStr {
    match queue {
        Queue::Inflate => c"inflate",
        Queue::Deflate => c"deflate",
        Queue::Stats => c"stats",
        Queue::FreePage => c"free-page",
        Queue::Reporting => c"reporting",
    }
}

/// The file's content.
pub(crate) struct CountersText(Arc<Counters>);

impl Writer for CountersText {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f)
    }
}

/// The file, which goes when this is dropped.
pub(crate) struct CountersFile {
    _file: Pin<KBox<File<CountersText>>>,
}

impl CountersFile {
    /// Shows `counters` in the device's folder; `None` if there is no such folder.
    ///
    /// May sleep. Fails with `ENOMEM`; a debugfs that does not want the file is no error.
    pub(crate) fn new(device: &device::Device, counters: Arc<Counters>) -> Result<Option<Self>> {
        let Some(dir) = debugfs::device_dir(device) else {
            return Ok(None);
        };
        let file = dir.read_only_file(c"counters", Ok::<_, Error>(CountersText(counters)));
        let _file = KBox::pin_init(file, GFP_KERNEL)?;
        Ok(Some(Self { _file }))
    }
}

#[kunit_tests(virtio_balloon_rs_counters)]
mod tests {
    use super::*;
    use kernel::str::CString;

    #[test]
    fn the_file_is_keys_and_values() -> Result {
        let counters = Counters::new(None);
        counters.hint_round_started(7);
        counters.hint_round_started(8);
        counters.requested(Queue::Deflate, 256);
        counters.acknowledged(Queue::Deflate, 256);
        counters.hint_round_stopped(100);
        counters.reclaimed(16);
        counters.reported(2, 1024, true);
        counters.reported(1, 512, false);
        counters.hinted(0x10000, 4, 65536);
        counters.hinted(0, u32::MAX, 1);
        counters.kicked(Queue::FreePage, Kick::Sent);
        counters.kicked(Queue::FreePage, Kick::NotNeeded);
        counters.interrupted(Queue::Inflate);
        let report = CountersText(Arc::new(counters, GFP_KERNEL)?);

        struct Shown<'a>(&'a CountersText);
        impl fmt::Display for Shown<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Writer::write(self.0, f)
            }
        }
        let text = CString::try_from_fmt(fmt!("{}", Shown(&report)))?;
        let text = text.to_str()?;
        let find = |key: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(' '));
            lines
                .find(|(found, _)| *found == key)
                .map(|(_, value)| value)
        };
        assert_eq!(find("rounds_started"), Some("2"));
        assert_eq!(find("rounds_finished"), Some("0"));
        assert_eq!(find("inflate_requests"), Some("0"));
        assert_eq!(find("deflate_requests"), Some("1"));
        assert_eq!(find("returned_pages"), Some("16"));
        assert_eq!(find("reported_pages"), Some("1024"));
        assert_eq!(find("failed_reports"), Some("1"));
        assert_eq!(find("hinted_blocks_order_4"), Some("1"));
        assert_eq!(find("hinted_blocks_order_15"), Some("1"));
        assert_eq!(find("hinted_bytes"), Some("65537"));
        assert_eq!(find("free_page_notifications"), Some("1"));
        assert_eq!(find("free_page_interrupts"), Some("0"));
        assert_eq!(find("inflate_interrupts"), Some("1"));
        assert!(text.lines().all(|line| line.split(' ').count() == 2));
        Ok(())
    }

    #[test]
    fn the_lowest_value_stays() {
        let counter = Counter::new();
        counter.set(7);
        counter.lower(9);
        assert_eq!(counter.get(), 7);
        counter.lower(3);
        assert_eq!(counter.get(), 3);
    }
}
