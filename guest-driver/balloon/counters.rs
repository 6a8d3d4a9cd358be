// SPDX-License-Identifier: GPL-2.0

//! Counters of the driver, shown in a debugfs file.
//!
//! The file is `/sys/kernel/debug/virtio_balloon_rs/<device>/counters`, where `<device>` is the
//! virtio device, for example `virtio0`. Each line is `key value`: the key consists of lowercase
//! letters, digits and underscores, the value is a decimal number, and one space separates them.
//! New keys may appear anywhere. An existing key keeps its name and meaning; it disappears only
//! together with the feature that it counts. Readers must look keys up by name and ignore unknown
//! keys.
//!
//! Counts start at zero when the device is bound. They have 64 bits and do not wrap in practice.
//! The values are read one after another while the driver works, so they are not a consistent
//! snapshot.
//!
//! Without debugfs in the kernel the file does not exist; the driver works all the same.

use kernel::debugfs::{File, Writer};
use kernel::device;
use kernel::fmt;
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{aref::ARef, Arc};

use crate::bindings::trace::Tracer;
use crate::shared_abi::queue::Queue;
use crate::virtio::{debugfs, Kick};

/// The number of orders with a counter of their own. Blocks of larger orders, which no architecture
/// has, count as the last order.
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

    /// Sets the number. For gauges, which show a state and not a count of events.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Sets the number to `value` if that is less.
    ///
    /// Not atomic: allowed for one writer at a time.
    pub(crate) fn lower(&self, value: u64) {
        if value < self.get() {
            self.set(value);
        }
    }

    /// Returns the number.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of a device. Their methods may be called in any context but NMI.
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
            /// The keys `QUEUE_notifications` and `QUEUE_interrupts`, in the order of
            /// [`Queue::ALL`].
            queues: [QueueCounters; Queue::MAX_COUNT],
            /// The keys `hinted_blocks_order_N`: free blocks of `2^N` pages offered on the free
            /// page queue.
            hinted_by_order: [Counter; ORDERS],
            tracer: Tracer,
        }

        impl Counters {
            /// Creates counters that are zero. The methods that count events also trace them, as
            /// events of `device`.
            pub(crate) fn new(device: Option<ARef<device::Device>>) -> Self {
                Self {
                    $($name: Counter::new(),)*
                    queues: [const { QueueCounters::new() }; Queue::MAX_COUNT],
                    hinted_by_order: [const { Counter::new() }; ORDERS],
                    tracer: Tracer::new(device),
                }
            }

            /// Calls `show` with the key and value of each counter that is a field, in the order of
            /// the fields.
            fn show(&self, show: &mut dyn FnMut(&str, u64) -> fmt::Result) -> fmt::Result {
                $(show(stringify!($name), self.$name.get())?;)*
                Ok(())
            }
        }
    };
}

counters! {
    /// Pages of 4 KiB in the balloon that the device has acknowledged.
    balloon_pages,
    /// The host's target as last read, in pages of 4 KiB.
    target_pages,
    /// Requests sent on the inflate queue, without page migrations.
    inflate_requests,
    /// Requests sent on the deflate queue, including page migrations that deflate.
    deflate_requests,
    /// Guest pages that page migration replaced in the balloon.
    migrated_pages,
    /// OOM deflations.
    oom_deflations,
    /// Pages of 4 KiB freed by OOM deflation.
    oom_deflated_pages,
    /// Times that inflation had to wait for memory.
    shortages,
    /// Hint rounds started.
    rounds_started,
    /// Hint rounds that ended because no free block above the reserve was left.
    rounds_finished,
    /// Duration of the last hint round that `rounds_finished` counts, in microseconds.
    last_round_us,
    /// Free blocks offered on the free page queue, of all orders.
    hinted_blocks,
    /// Bytes of the free blocks that `hinted_blocks` counts.
    hinted_bytes,
    /// The reserve of free guest pages that hinting leaves to the guest, as last computed: at the
    /// start of a hint round, or when it resumes after a pause.
    hint_reserve_pages,
    /// The lowest number of free guest pages right after hinting took a free block: since the last
    /// hint round started or resumed, and took any.
    hint_free_pages_low,
    /// Free blocks that hinting returned at once, because the allocation had cut into the reserve.
    hint_taken_back_blocks,
    /// Guest pages of hinted blocks that went into the balloon before DONE.
    hinted_pages_inflated,
    /// Hinted blocks, or parts of one, that the guest reclaimed before DONE.
    returned_blocks,
    /// Guest pages that `returned_blocks` counts.
    returned_pages,
    /// Hinted blocks, or parts of one, that left the driver filled with zeroes before DONE.
    zeroed_blocks,
    /// Guest pages that `zeroed_blocks` counts.
    zeroed_pages,
    /// Free blocks that were reported and acknowledged (free page reporting).
    reported_blocks,
    /// Guest pages that `reported_blocks` counts.
    reported_pages,
    /// Reports that the queue did not accept, or that the device did not acknowledge.
    failed_reports,
}

/// The counters of one queue.
struct QueueCounters {
    /// Notifications sent to the device.
    notifications: Counter,
    /// Interrupts received.
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
    /// Counts a notification if `kick` says that one was sent.
    pub(crate) fn kicked(&self, queue: Queue, kick: Kick) {
        if kick == Kick::Sent {
            self.queue_counters(queue).notifications.add(1);
        }
    }

    /// Counts an interrupt.
    pub(crate) fn interrupted(&self, queue: Queue) {
        self.queue_counters(queue).interrupts.add(1);
    }

    /// Counts and traces a request of `pages` balloon pages that was sent on `queue`.
    pub(crate) fn requested(&self, queue: Queue, pages: u64) {
        match queue {
            Queue::Inflate => self.inflate_requests.add(1),
            Queue::Deflate => self.deflate_requests.add(1),
            Queue::Stats | Queue::FreePage | Queue::Reporting => {}
        }
        self.tracer.request(c_name(queue), pages);
    }

    /// Traces a request of `pages` balloon pages that the device has used.
    pub(crate) fn acknowledged(&self, queue: Queue, pages: u64) {
        self.tracer.acknowledge(c_name(queue), pages);
    }

    /// Counts and traces the start of the hint round with command id `id`.
    pub(crate) fn hint_round_started(&self, id: u32) {
        self.rounds_started.add(1);
        self.tracer.hint_start(id, self.hint_reserve_pages.get());
    }

    /// Traces the end of a hint round, `microseconds` after its start.
    pub(crate) fn hint_round_stopped(&self, microseconds: u64) {
        self.tracer.hint_stop(microseconds);
    }

    /// Counts and traces a reclaimed hinted block, or part of one, of `pages` pages.
    pub(crate) fn reclaimed(&self, pages: u64) {
        self.returned_blocks.add(1);
        self.returned_pages.add(pages);
        self.tracer.hint_return(pages);
    }

    /// Counts and traces the end of a free page report.
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

    /// Counts and traces an offered free block of `2^order` pages and `bytes` bytes at the physical
    /// address `address`.
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
                // The name of a queue may contain a hyphen; keys contain none.
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

/// Returns the name of the queue as a C string.
fn c_name(queue: Queue) -> &'static CStr {
    match queue {
        Queue::Inflate => c"inflate",
        Queue::Deflate => c"deflate",
        Queue::Stats => c"stats",
        Queue::FreePage => c"free-page",
        Queue::Reporting => c"reporting",
    }
}

/// The content of the debugfs file.
pub(crate) struct CountersText(Arc<Counters>);

impl Writer for CountersText {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f)
    }
}

/// The debugfs file. Dropping it removes the file.
pub(crate) struct CountersFile {
    _file: Pin<KBox<File<CountersText>>>,
}

impl CountersFile {
    /// Creates the file in the device's debugfs folder. Returns `None` if the folder does not
    /// exist.
    ///
    /// May sleep. If debugfs cannot create the file, that is not an error.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
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
