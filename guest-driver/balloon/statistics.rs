// SPDX-License-Identifier: GPL-2.0

//! Memory statistics for the host.
//!
//! The driver makes one buffer available. The device keeps it, and requests new statistics by using
//! it. A separate work item sends them, so a busy balloon does not delay them.

use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::{msecs_to_jiffies, Msecs};

use super::counters::Counters;
use crate::mm::vmstat::{self, HugetlbEvents, MemInfo, VmEvents};
use crate::shared_abi::queue::Queue;
use crate::shared_abi::stats::{Stat, StatTag};
use crate::virtio::work::{
    self, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem, WorkQueue,
};
use crate::virtio::{AddError, AddFailure, OutgoingWithContext, Virtqueue, Wakeup};

/// The largest size of the statistics in bytes.
const SIZE: usize = Stat::SIZE * StatTag::ALL.len();

/// The delay before another attempt, if the queue was full or memory was short.
const RETRY: Msecs = 1000;

/// The wakeup event of a statistics request.
const WAKEUP_SIGNAL_STATS: u32 = 1;

/// A buffer with statistics. Its length depends on the statistics that the kernel provides.
pub(crate) type StatisticsBuffer = OutgoingWithContext<[u8; SIZE], ()>;

/// The statistics of one device.
#[pin_data]
pub(crate) struct Statistics {
    queue: Virtqueue<StatisticsBuffer>,
    /// The buffer, before it is sent for the first time or if the queue did not accept it.
    #[pin]
    spare: Mutex<Option<StatisticsBuffer>>,
    wakeup: Arc<Wakeup>,
    counters: Arc<Counters>,
    #[pin]
    work: DelayedWork<Self>,
}

impl_has_delayed_work! {
    impl HasDelayedWork<0> for Statistics { self.work }
}

impl Statistics {
    /// Creates the statistics queue and its buffer, and sends nothing. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(
        wakeup: Arc<Wakeup>,
        work_queue: WorkQueue,
        counters: Arc<Counters>,
    ) -> Result<Arc<Self>> {
        let buffer = StatisticsBuffer::new([0; SIZE], (), GFP_KERNEL)?;
        let statistics = try_pin_init!(Self {
            queue: Virtqueue::new(c"stats")?,
            spare <- new_mutex!(Some(buffer), "Statistics::spare"),
            wakeup,
            counters,
            work <- new_delayed_work!(work_queue, "Statistics::work"),
        });
        Arc::pin_init(statistics, GFP_KERNEL)
    }

    /// Returns the statistics queue.
    pub(crate) fn queue(&self) -> &Virtqueue<StatisticsBuffer> {
        &self.queue
    }

    /// Adds the first buffer to the queue. [`notify`](Self::notify) notifies the device when it is
    /// ready. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`] if memory is short, and [`EIO`] if the queue does not accept the buffer.
    pub(crate) fn prime(&self) -> Result {
        match self.handle_request() {
            Ok(_) => Ok(()),
            Err(AddFailure::NoMemory) => Err(ENOMEM),
            Err(
                AddFailure::Full | AddFailure::Broken | AddFailure::Gone | AddFailure::Malformed,
            ) => Err(EIO),
        }
    }

    /// Notifies the device of the buffer.
    pub(crate) fn notify(&self) {
        self.counters.kicked(Queue::Stats, self.queue.kick());
    }

    /// Handles a request for statistics, or a spurious interrupt. Any context but NMI.
    pub(crate) fn stats_requested(self: &Arc<Self>) {
        self.wakeup.stay_awake(WAKEUP_SIGNAL_STATS);
        work::enqueue(self);
    }

    /// Recovers the buffer after a device reset. May sleep.
    pub(crate) fn detach_unused(&self) {
        let mut spare = self.spare.lock();
        while let Some(buffer) = self.queue.detach_unused_buf() {
            *spare = Some(buffer);
        }
        self.wakeup.clear_event(WAKEUP_SIGNAL_STATS);
        self.wakeup.relax();
    }

    /// Adds a buffer with new statistics to the queue, if the device has used the buffer or none
    /// was sent.
    ///
    /// Returns whether it did; the caller then notifies the device. May sleep.
    ///
    /// # Errors
    ///
    /// Keeps the buffer and returns the reason if the queue does not accept it.
    fn handle_request(&self) -> Result<bool, AddFailure> {
        let mut spare = self.spare.lock();
        let used = self.queue.get_buf().map(|(buffer, _)| buffer);
        let Some(mut buffer) = used.or_else(|| spare.take()) else {
            // The interrupt was spurious.
            return Ok(false);
        };
        let (vm_events, hugetlb) = vmstat::vm_events();
        let (bytes, ()) = buffer.parts_mut();
        let length = encode(vmstat::meminfo(), vm_events, hugetlb, bytes);
        buffer.set_length(length);
        match self.queue.add(buffer) {
            Ok(()) => Ok(true),
            Err(AddError { buffer, failure }) => {
                *spare = Some(buffer);
                Err(failure)
            }
        }
    }

    /// Disables the work item permanently. May sleep.
    pub(crate) fn disable(self: &Arc<Self>) {
        work::disable(self);
        self.wakeup.clear_event(WAKEUP_SIGNAL_STATS);
        self.wakeup.relax();
    }
}

impl WorkItem for Statistics {
    fn run(this: Arc<Self>) {
        this.wakeup.clear_event(WAKEUP_SIGNAL_STATS);
        match this.handle_request() {
            Ok(answered) => {
                if answered {
                    this.notify();
                }
                if !this.queue.enable_callback() {
                    this.stats_requested();
                }
            }
            Err(AddFailure::Full | AddFailure::NoMemory) => {
                // No interrupt announces free ring entries or memory.
                work::enqueue_delayed(&this, msecs_to_jiffies(RETRY));
            }
            // Statistics stop until the queue has a new ring.
            Err(AddFailure::Broken | AddFailure::Gone | AddFailure::Malformed) => {}
        }
        this.wakeup.relax();
    }
}

/// Writes the statistics into `buffer`, in the format of the device. Returns their size in bytes.
fn encode(
    meminfo: MemInfo,
    vm_events: Option<VmEvents>,
    hugetlb: Option<HugetlbEvents>,
    buffer: &mut [u8; SIZE],
) -> usize {
    let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE as u64);
    let values = StatTag::ALL.into_iter().filter_map(|tag| {
        let value = match tag {
            StatTag::SwapIn => bytes(vm_events?.swapped_in),
            StatTag::SwapOut => bytes(vm_events?.swapped_out),
            StatTag::MajorFaults => vm_events?.major_faults,
            StatTag::MinorFaults => vm_events?.faults,
            StatTag::FreeMemory => bytes(meminfo.free),
            StatTag::TotalMemory => bytes(meminfo.total),
            StatTag::AvailableMemory => bytes(meminfo.available),
            StatTag::DiskCaches => bytes(meminfo.file_pages),
            StatTag::HugetlbAllocations => hugetlb?.allocations,
            StatTag::HugetlbFailures => hugetlb?.failures,
            StatTag::OomKills => vm_events?.oom_kills,
            StatTag::AllocationStalls => vm_events?.allocation_stalls,
            StatTag::AsyncScanned => bytes(vm_events?.async_scanned),
            StatTag::DirectScanned => bytes(vm_events?.direct_scanned),
            StatTag::AsyncReclaimed => bytes(vm_events?.async_reclaimed),
            StatTag::DirectReclaimed => bytes(vm_events?.direct_reclaimed),
        };
        let tag = tag.number();
        Some(Stat { tag, value })
    });
    let mut length = 0;
    for (slot, stat) in buffer.chunks_exact_mut(Stat::SIZE).zip(values) {
        slot.copy_from_slice(&stat.to_bytes());
        length += Stat::SIZE;
    }
    length
}

#[kunit_tests(virtio_balloon_rs_statistics)]
mod tests {
    use super::*;
    use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};
    use kernel::time::{delay::fsleep, Delta};

    #[test]
    fn a_full_ring_is_no_reason_to_fall_silent() -> Result {
        let bound = BoundTestDevice::with_entries(1)?;
        let statistics = Statistics::new(
            Wakeup::new(bound.device_ref())?,
            WorkQueue::new(c"kunit")?,
            Arc::new(Counters::new(None), GFP_KERNEL)?,
        )?;
        bound.find_queues(&[statistics.queue()], CountingHandler::new()?)?;
        statistics.prime()?;
        assert!(bound.device.pop_descriptor_chain(0).is_some_and(|chain| {
            // The device uses the buffer before the next attempt.
            let buffer = StatisticsBuffer::new([0; SIZE], (), GFP_KERNEL).ok();
            *statistics.spare.lock() = buffer;
            assert_eq!(statistics.handle_request(), Err(AddFailure::Full));
            Statistics::run(statistics.clone());
            bound.device.add_used(0, chain.head, 0);
            true
        }));
        // Times out only if the test fails.
        assert!((0..1000).any(|_| {
            fsleep(Delta::from_millis(10));
            bound.device.pop_descriptor_chain(0).is_some()
        }));
        statistics.disable();
        bound.reset();
        statistics.detach_unused();
        Ok(())
    }

    fn find(buffer: &[u8], tag: StatTag) -> Option<u64> {
        buffer.chunks_exact(Stat::SIZE).find_map(|chunk| {
            let stat = Stat::from_bytes(chunk.try_into().ok()?);
            (stat.tag == tag.number()).then_some(stat.value)
        })
    }

    #[test]
    fn pages_become_bytes_and_counts_stay() {
        let meminfo = MemInfo {
            free: 3,
            ..MemInfo::default()
        };
        let vm_events = VmEvents {
            swapped_in: 5,
            faults: 7,
            ..VmEvents::default()
        };
        let mut buffer = [0; SIZE];
        let length = encode(meminfo, Some(vm_events), None, &mut buffer);
        assert_eq!(length, 14 * Stat::SIZE);
        let sent = &buffer[..length];
        assert_eq!(find(sent, StatTag::FreeMemory), Some(3 * PAGE_SIZE as u64));
        assert_eq!(find(sent, StatTag::SwapIn), Some(5 * PAGE_SIZE as u64));
        assert_eq!(find(sent, StatTag::MinorFaults), Some(7));
        assert_eq!(find(sent, StatTag::HugetlbFailures), None);
    }

    #[test]
    fn what_is_not_counted_is_not_sent() {
        let mut buffer = [0; SIZE];
        let length = encode(MemInfo::default(), None, None, &mut buffer);
        assert_eq!(length, 4 * Stat::SIZE);
    }

    #[test]
    fn the_kernel_counts_its_memory() {
        let meminfo = vmstat::meminfo();
        assert!(meminfo.total > 0);
        assert!(meminfo.free <= meminfo.total);
    }
}
