// SPDX-License-Identifier: GPL-2.0

//! The resize worker: inflates and deflates towards the host's target.
//!
//! The function [`update_size`](Resizer::update_size) never waits for the device. It reaps used
//! buffers, sends the requests for which the queues have room, and returns. The next interrupt
//! queues the work item that calls it again. If no work item can run, or a caller waits for the
//! result, that caller calls the function itself.
//!
//! If the guest runs out of memory, an OOM notifier deflates the balloon in the task that needs
//! memory: see [`oom_deflation`].

mod oom_deflation;
#[cfg(CONFIG_KUNIT = "y")]
mod tests_rig;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, AtomicFlag, Relaxed};
use kernel::sync::{aref::ARef, new_mutex, Arc, Mutex};
use kernel::time::{msecs_to_jiffies, Delta, Instant, Jiffies, Monotonic, Msecs};
use kernel::{dev_info, dev_warn, device};

use super::balloon_queues::{
    BalloonQueues, Pages, Purpose, ResizeWorker, SendError, REQUESTS, WAIT_POLL_INTERVAL,
};
use super::config::BalloonConfig;
use super::counters::Counters;
use super::hinted_blocks::HintedBlocks;
use super::page_counts::Step;
use super::page_geometry::GuestGeometry;
use super::request::{PageBuffer, Request};
use super::timeout;
use crate::mm::{page_alloc, BalloonPage, BalloonPages, Shrink};
use crate::virtio::work::{
    self, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem, WorkQueue,
};
use crate::virtio::{Virtqueue, Wakeup};

/// The number of new requests after which the device is notified: half of the requests, so the
/// driver can fill the other half meanwhile.
const BATCH: usize = REQUESTS / 2;

/// The delay before another attempt if memory is short. It doubles from the minimum to the maximum.
const RETRY_MIN: Msecs = 200;
const RETRY_MAX: Msecs = 3200;
/// The delay before another attempt if the kernel has isolated pages for page migration.
const ISOLATED_RETRY: Msecs = 10;
/// The interval at which the worker polls the queues if no interrupt arrives.
const POLL_INTERVAL: Msecs = 1000;
/// The minimum interval between log messages about a shortage of memory.
const LOG_INTERVAL: Delta = Delta::from_secs(5);

/// The time for which inflation pauses after an OOM deflation.
const OOM_INFLATE_PAUSE: Delta = Delta::from_secs(10);
/// The memory that must be available before inflation resumes, as a divisor of the guest's memory:
/// 1/16.
const OOM_RESUME_SHARE: usize = 16;

/// The wakeup event of a config change.
const WAKEUP_SIGNAL_ADJUST: u32 = 0;

const UPDATE_SIZE: u64 = 1;
const RETRY: u64 = 2;
const SOON: u64 = 3;
const POLL: u64 = 4;

/// The balloon of one device, and all that changes its size.
#[pin_data]
pub(crate) struct Resizer {
    dev: ARef<device::Device>,
    config: BalloonConfig,
    /// The hinted blocks whose buffers the device has used.
    hinted_blocks: Option<Arc<HintedBlocks>>,
    /// Whether the guest may use a deflated page only after the device has used its request
    /// (`MUST_TELL_HOST`).
    must_tell_host: bool,
    /// Whether the host's target may have changed since it was read.
    target_changed: AtomicFlag,
    /// Whether the balloon is being emptied: the target is 0, whatever the host wants.
    emptying: AtomicFlag,
    /// Whether inflation has to pause: in an OOM notification, a node with balloon pages was short,
    /// or OOM deflation started although no node was short.
    oom_seen: AtomicFlag,
    /// The value of [`BalloonQueues::released`] when an OOM deflation last timed out. `u64::MAX` if
    /// none has.
    timed_out_at: Atomic<u64>,
    /// The time when the balloon was created.
    created: Instant<Monotonic>,
    /// The time of the last OOM deflation although no node was short, in milliseconds after
    /// `created`. `u64::MAX` if there was none. Used with several nodes only.
    unexplained_oom_at: Atomic<u64>,
    #[pin]
    inner: Mutex<ResizerInner>,
    #[pin]
    pages: Pages,
    wakeup: Arc<Wakeup>,
    counters: Arc<Counters>,
    #[pin]
    update_size_work: DelayedWork<Self, UPDATE_SIZE>,
    #[pin]
    retry: DelayedWork<Self, RETRY>,
    #[pin]
    soon: DelayedWork<Self, SOON>,
    #[pin]
    poll: DelayedWork<Self, POLL>,
}

/// The state of the resize worker. The lock also serialises [`Resizer::update_size`]. Memory is
/// allocated under it, so OOM deflation must not take it.
struct ResizerInner {
    target: u64,
    /// The size of the balloon that was last written to config space. `None` if unknown.
    written_actual: Option<u64>,
    delay: Msecs,
    last_logged: Option<Instant<Monotonic>>,
    /// The time of the last OOM notification that paused inflation. `None` after the target was
    /// reached.
    oom_seen: Option<Instant<Monotonic>>,
}

/// The result of sending requests towards the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The target is reached, and nothing is in flight.
    Reached,
    /// Everything that can be sent is in flight.
    Waiting,
    /// No further request can be sent now.
    Blocked(SendError),
}

impl From<SendError> for Progress {
    fn from(error: SendError) -> Self {
        Self::Blocked(error)
    }
}

impl_has_delayed_work! {
    impl HasDelayedWork<1> for Resizer { self.update_size_work }
    impl HasDelayedWork<2> for Resizer { self.retry }
    impl HasDelayedWork<3> for Resizer { self.soon }
    impl HasDelayedWork<4> for Resizer { self.poll }
}

/// Returns whether the balloon may inflate with `available` pages in the guest.
///
/// At least 1/128 of memory must stay available. Below that, inflation leads to OOM kills or a
/// deadlock, because the OOM killer cannot free the balloon.
fn may_inflate(available: usize) -> bool {
    available > page_alloc::managed_pages() / 128
}

impl Resizer {
    /// Creates an empty balloon.
    ///
    /// With `adjust_managed`, pages in the balloon do not count as managed memory (`MemTotal`).
    /// With `must_tell_host`, the guest uses a deflated page only after the device has used its
    /// request. Inflation takes pages of `hinted_blocks` first. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        dev: ARef<device::Device>,
        config: BalloonConfig,
        hinted_blocks: Option<Arc<HintedBlocks>>,
        wakeup: Arc<Wakeup>,
        work_queue: WorkQueue,
        counters: Arc<Counters>,
        adjust_managed: bool,
        must_tell_host: bool,
    ) -> Result<Arc<Self>> {
        let inner = ResizerInner {
            target: 0,
            written_actual: Some(0),
            delay: RETRY_MIN,
            last_logged: None,
            oom_seen: None,
        };
        let resizer = try_pin_init!(Self {
            dev,
            config,
            hinted_blocks,
            must_tell_host,
            target_changed: AtomicFlag::new(true),
            emptying: AtomicFlag::new(false),
            oom_seen: AtomicFlag::new(false),
            timed_out_at: Atomic::new(u64::MAX),
            created: Instant::now(),
            unexplained_oom_at: Atomic::new(u64::MAX),
            inner <- new_mutex!(inner, "Resizer::inner"),
            pages <- BalloonPages::new(
                adjust_managed,
                BalloonQueues::new(counters.clone(), *must_tell_host)?,
            ),
            wakeup,
            counters,
            update_size_work <- new_delayed_work!(work_queue.clone(), "Resizer::update_size_work"),
            retry <- new_delayed_work!(work_queue.clone(), "Resizer::retry"),
            soon <- new_delayed_work!(work_queue.clone(), "Resizer::soon"),
            poll <- new_delayed_work!(work_queue, "Resizer::poll"),
        });
        let resizer = Arc::pin_init(resizer, GFP_KERNEL)?;
        let worker = Arc::new(Worker(resizer.clone()), GFP_KERNEL)?;
        resizer.queues().set_worker(Some(worker));
        Ok(resizer)
    }

    /// Returns the inflate queue.
    pub(crate) fn inflate_queue(&self) -> &Virtqueue<PageBuffer> {
        self.queues().inflate_queue()
    }

    /// Returns the deflate queue.
    pub(crate) fn deflate_queue(&self) -> &Virtqueue<PageBuffer> {
        self.queues().deflate_queue()
    }

    fn queues(&self) -> &BalloonQueues {
        self.pages.migrator()
    }

    /// Handles a config change: the host may have a new target. Any context but NMI.
    pub(crate) fn target_changed(self: &Arc<Self>) {
        self.target_changed.store(true, Relaxed);
        if !self.queues().is_closed() {
            self.wakeup.stay_awake(WAKEUP_SIGNAL_ADJUST);
            self.wake();
        }
    }

    /// Handles an interrupt of the inflate or deflate queue. Any context but NMI.
    ///
    /// A waiting task completes all used buffers. The resize worker then follows in the next jiffy,
    /// once for many interrupts: each page migration causes one.
    pub(crate) fn used(self: &Arc<Self>) {
        self.queues().wait_queue.wake_up_all();
        if self.queues().has_waiters() {
            work::enqueue_delayed::<Self, SOON>(self, 1);
        } else {
            self.wake();
        }
    }

    /// Queues the work item, unless it is queued or disabled.
    fn wake(self: &Arc<Self>) {
        work::enqueue::<Self, UPDATE_SIZE>(self);
    }

    /// Deflates the balloon to 0 and writes its size to config space, as long as the device makes
    /// progress.
    ///
    /// May sleep while the device makes progress, and up to [`timeout::host`] without progress.
    /// Buffers still in flight are recovered after the device reset. Needs no work item.
    pub(crate) fn empty(self: &Arc<Self>) {
        self.emptying.store(true, Relaxed);
        let mut last = self.queues().page_counts();
        let mut since: Instant<Monotonic> = Instant::now();
        loop {
            let seen = self.queues().wait_queue.wakeups();
            let more = self.update_size();
            if self.queues().is_idle() || self.queues().is_broken() {
                break;
            }
            let page_counts = self.queues().page_counts();
            if page_counts != last {
                last = page_counts;
                since = Instant::now();
            } else if since.elapsed() > timeout::host() {
                dev_warn!(
                    self.dev,
                    "the device does not acknowledge deflation; resetting it\n"
                );
                break;
            }
            if !more {
                self.queues()
                    .wait_queue
                    .wait_timeout(seen, WAIT_POLL_INTERVAL);
            }
        }
        // The last requests may have been completed after the last call of `update_size` wrote the
        // size.
        self.write_actual(&mut self.inner.lock());
    }

    /// Disables all work items permanently and ends all waits for the device. May sleep, but does
    /// not wait for the device.
    pub(crate) fn disable(self: &Arc<Self>) {
        self.queues().close();
        self.end_work();
        self.wakeup.clear_event(WAKEUP_SIGNAL_ADJUST);
        self.wakeup.relax();
    }

    fn end_work(self: &Arc<Self>) {
        self.queues().set_worker(None);
        work::disable::<Self, RETRY>(self);
        work::disable::<Self, SOON>(self);
        work::disable::<Self, POLL>(self);
        work::disable::<Self, UPDATE_SIZE>(self);
    }

    /// Stops resizing and ends all waits for the device, until [`thaw`](Self::thaw). May sleep, but
    /// does not wait for the device.
    pub(crate) fn freeze(&self) {
        self.queues().close();
        // Waits until a running `update_size` returns.
        drop(self.inner.lock());
        self.wakeup.clear_event(WAKEUP_SIGNAL_ADJUST);
        self.wakeup.relax();
    }

    /// Recovers the requests in flight after a device reset, and frees all pages.
    ///
    /// To be called after [`freeze`](Self::freeze) or [`disable`](Self::disable). May sleep.
    pub(crate) fn detach_unused(&self) {
        BalloonQueues::detach_unused(&self.pages);
    }

    /// Starts again with an empty balloon after [`freeze`](Self::freeze). May sleep.
    pub(crate) fn thaw(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        inner.written_actual = None;
        inner.delay = RETRY_MIN;
        drop(inner);
        self.emptying.store(false, Relaxed);
        self.queues().open();
    }

    /// Writes the balloon's size to config space, if it has changed.
    fn write_actual(&self, inner: &mut ResizerInner) {
        let page_counts = self.queues().page_counts();
        self.counters.balloon_pages.set(page_counts.inflated());
        let actual = page_counts.actual();
        if inner.written_actual != Some(actual) && self.config.set_actual(actual).is_ok() {
            inner.written_actual = Some(actual);
        }
    }

    /// Reads the host's target, if it may have changed.
    fn read_target(&self, inner: &mut ResizerInner) -> Result {
        if self.emptying.load(Relaxed) {
            inner.target = 0;
            self.target_changed.store(true, Relaxed);
        } else if self.target_changed.xchg(false, Relaxed) {
            inner.target = self.config.target()?;
            self.counters.target_pages.set(inner.target);
            inner.delay = RETRY_MIN;
        }
        self.queues().set_target(inner.target);
        Ok(())
    }

    /// Sends requests towards the target while the queues have room and memory is available. Checks
    /// for a new target before each request.
    fn advance(&self, inner: &mut ResizerInner) -> Progress {
        let mut pending_kick = 0;
        let progress = loop {
            if self.read_target(inner).is_err() {
                break Progress::Blocked(SendError::Gone);
            }
            let queues = self.queues();
            let (sent, request) = match queues.next() {
                Step::Reached => break Progress::Reached,
                Step::Wait => break Progress::Waiting,
                step => match self.prepare(inner, step) {
                    Err(error) => break error.into(),
                    Ok(None) => break Progress::Waiting,
                    Ok(Some(request)) => (step, request),
                },
            };
            let sent = match sent {
                Step::Inflate(pfns) => self.send_inflate(inner, request, pfns),
                Step::Deflate(pfns) => {
                    BalloonQueues::send_deflate(&self.pages, request, pfns, Purpose::Resize)
                        .map(drop)
                }
                Step::Wait | Step::Reached => Ok(()),
            };
            if let Err(error) = sent {
                break error.into();
            }
            pending_kick += 1;
            if pending_kick == BATCH {
                self.queues().notify();
                pending_kick = 0;
            }
        };
        // Also after an error: if memory is short, the last request is sent partially filled.
        self.queues().notify();
        progress
    }

    /// Takes a request for `step`, if the queue has room for it. Returns `None` if only the
    /// reserved requests are left.
    fn prepare(&self, inner: &mut ResizerInner, step: Step) -> Result<Option<Request>, SendError> {
        let queues = self.queues();
        if matches!(step, Step::Inflate(_)) {
            queues.room_to_inflate()?;
            if !self.may_inflate(inner) {
                return Err(SendError::NoMemory);
            }
        } else {
            queues.room_to_deflate()?;
        }
        Ok(queues.take_spare())
    }

    /// Returns whether the guest has memory for inflation.
    fn may_inflate(&self, inner: &mut ResizerInner) -> bool {
        if self.oom_seen.xchg(false, Relaxed) {
            inner.oom_seen = Some(Instant::now());
        }
        let available = page_alloc::available_and_swap_pages()
            + self.hinted_blocks.as_ref().map_or(0, |it| it.count());
        if let Some(then) = inner.oom_seen {
            let enough = page_alloc::managed_pages() / OOM_RESUME_SHARE;
            if then.elapsed() < OOM_INFLATE_PAUSE || available < enough {
                return false;
            }
        }
        may_inflate(available)
    }

    /// Fills `request` with up to `pfns` new pages and sends it on the inflate queue.
    ///
    /// Pages of hinted blocks come first: they are free memory that the page allocator does not
    /// have. If the target changes meanwhile, the request is sent with the pages so far: when
    /// memory is short, filling a request may take seconds.
    fn send_inflate(
        &self,
        inner: &mut ResizerInner,
        mut request: Request,
        pfns: u64,
    ) -> Result<(), SendError> {
        let mut wanted =
            GuestGeometry::guest_pages(pfns).min(GuestGeometry::CAPACITY as u64) as usize;
        let mut result = Ok(());
        if let Some(hinted_blocks) = &self.hinted_blocks {
            let mut pages = hinted_blocks.take_for_balloon(wanted);
            wanted -= pages.len();
            while let Some(page) = pages.pop() {
                // A page whose page frame number has more than 32 bits goes back to the guest.
                let _ = request.push(page);
            }
        }
        for _ in 0..wanted {
            let page = BalloonPage::alloc();
            if page.and_then(|page| request.push(page).ok()).is_none() {
                result = Err(SendError::NoMemory);
                break;
            }
            if self.target_changed.load(Relaxed) {
                break;
            }
        }
        if self.oom_seen.load(Relaxed) {
            // An OOM notification came meanwhile: these pages help the guest.
            result = Err(SendError::NoMemory);
            drop(request.take());
        }
        if request.is_empty() {
            self.queues().put(request);
            return result;
        }
        self.queues().send_inflate(request)?;
        if result.is_ok() {
            inner.delay = RETRY_MIN;
        }
        result
    }

    /// Schedules another attempt after a shortage of memory. Logs the shortage, rate-limited.
    fn retry_later(self: &Arc<Self>, inner: &mut ResizerInner) {
        if !self.retry_after(inner.delay) {
            // An attempt is scheduled already.
            return;
        }
        inner.delay = (inner.delay * 2).min(RETRY_MAX);
        self.counters.shortages.add(1);
        let should_log = inner
            .last_logged
            .is_none_or(|then| then.elapsed() > LOG_INTERVAL);
        if should_log {
            inner.last_logged = Some(Instant::now());
            dev_info!(
                self.dev,
                "Out of puff! {} of {} pages are in the balloon\n",
                self.queues().page_counts().inflated(),
                inner.target
            );
        }
    }

    /// Queues the work item after `delay`. Returns `false` if a delay is running already.
    fn retry_after(self: &Arc<Self>, delay: Msecs) -> bool {
        let delay: Jiffies = msecs_to_jiffies(delay);
        work::enqueue_delayed::<Self, RETRY>(self, delay)
    }

    /// Does everything that is possible now: reaps used buffers, writes the size, and uses each
    /// request once at most. Returns whether the caller should call again at once.
    fn update_size(self: &Arc<Self>) -> bool {
        let mut inner = self.inner.lock();
        if self.queues().is_closed() {
            return false;
        }
        self.wakeup.clear_event(WAKEUP_SIGNAL_ADJUST);
        BalloonQueues::reap_used(&self.pages);
        self.write_actual(&mut inner);
        match self.advance(&mut inner) {
            Progress::Reached => {
                self.oom_seen.store(false, Relaxed);
                inner.oom_seen = None;
                self.wakeup.relax();
            }
            Progress::Waiting | Progress::Blocked(SendError::RingFull) => {
                // In case an interrupt is lost.
                let delay = msecs_to_jiffies(POLL_INTERVAL);
                work::enqueue_delayed::<Self, POLL>(self, delay);
            }
            Progress::Blocked(SendError::NoMemory) => {
                self.retry_later(&mut inner);
                self.wakeup.relax();
            }
            Progress::Blocked(SendError::Isolated) => {
                // The kernel does not announce that the pages are back in the balloon.
                let delay = msecs_to_jiffies(ISOLATED_RETRY);
                work::enqueue_delayed::<Self, SOON>(self, delay);
            }
            Progress::Blocked(SendError::Gone) => {
                self.wakeup.relax();
                return false;
            }
        }
        !self.queues().enable_callbacks()
    }
}

/// Lets the queues wake the resize worker. Has a reference to the resizer until
/// [`Resizer::disable`] takes it from the queues.
struct Worker(Arc<Resizer>);

impl ResizeWorker for Worker {
    fn requests_reaped(&self) {
        self.0.wake();
    }
}

/// Runs the resize worker.
impl WorkItem<1> for Resizer {
    fn run(this: Arc<Self>) {
        // One call per run: the system waits for running work items before it sleeps.
        if this.update_size() {
            this.wake();
        }
    }
}

/// Runs the resize worker when memory may be available again.
impl WorkItem<2> for Resizer {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

/// Runs the resize worker if no interrupt has arrived.
impl WorkItem<4> for Resizer {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

/// Runs the resize worker when isolated pages may be back in the balloon, or when waiting tasks may
/// have completed its requests.
impl WorkItem<3> for Resizer {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

#[kunit_tests(virtio_balloon_rs_resizer)]
mod tests {
    use super::tests_rig::{Rig, INFLATE};
    use super::*;
    use crate::mm::{HintedBlock, NodesBelowWatermark, OnOutOfMemory, PageBlock};
    use crate::shared_abi::page::PFN_SHIFT;
    use crate::virtio::kunit_device::wait_for;

    #[test]
    fn a_ring_of_any_size_brings_the_balloon_to_its_target_and_back() -> Result {
        for entries in [1, 2, 4, 8] {
            let rig = Rig::new(entries, false)?;
            // The first target exceeds the capacity of all requests.
            for target in [5000, 1200, 2000, 0] {
                rig.set_target(target);
                rig.settle();
                assert_eq!(rig.inflated(), u64::from(target));
                assert_eq!(rig.actual(), target);
            }
            assert_eq!(rig.counters.shortages.get(), 0);
        }
        Ok(())
    }

    #[test]
    fn a_target_that_changes_is_heeded_before_a_request_is_full() -> Result {
        let rig = Rig::new(4, false)?;
        let mut inner = rig.resizer.inner.lock();
        let request = rig.resizer.queues().take_spare().ok_or(ENOENT)?;
        rig.resizer.target_changed.store(true, Relaxed);
        let sent = rig.resizer.send_inflate(&mut inner, request, 100);
        assert_eq!(sent, Ok(()));
        drop(inner);
        assert!(rig.answer());
        BalloonQueues::reap_used(&rig.resizer.pages);
        assert_eq!(rig.inflated(), GuestGeometry::pfns(1));
        Ok(())
    }

    #[test]
    fn hinted_blocks_go_into_the_balloon_first() -> Result {
        let rig = Rig::new(4, false)?;
        let block = PageBlock::try_alloc(5).ok_or(ENOMEM)?;
        let address = block.address();
        rig.hinted_blocks.insert(HintedBlock::new(block));
        rig.set_target(20);
        rig.resizer.update_size();
        let first = rig.bound.device.use_buffer(INFLATE).ok_or(ENOENT)?;
        assert_eq!(u64::from(first) >> 5, address >> PFN_SHIFT >> 5);
        rig.settle();
        assert_eq!((rig.inflated(), rig.hinted_blocks.count()), (20, 12));
        // Then pages from the page allocator.
        rig.set_target(50);
        rig.settle();
        assert_eq!((rig.inflated(), rig.hinted_blocks.count()), (50, 0));
        assert_eq!(rig.counters.hinted_pages_inflated.get(), 32);
        rig.set_target(0);
        rig.settle();
        assert_eq!(rig.inflated(), 0);
        Ok(())
    }

    /// Isolated pages are on no list, as during page migration.
    #[test]
    fn isolated_pages_are_waited_for_and_are_no_shortage() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(200);
        rig.settle();
        let isolated = rig.resizer.pages.dequeue(200);
        rig.set_target(0);
        for _ in 0..3 {
            rig.settle();
        }
        assert_eq!(rig.counters.shortages.get(), 0);
        assert_eq!(rig.inflated(), 200);
        rig.resizer.pages.enqueue(isolated);
        rig.settle();
        assert_eq!((rig.inflated(), rig.actual()), (0, 0));
        Ok(())
    }

    #[test]
    fn emptying_tells_the_host_of_the_last_page() -> Result {
        let rig = Rig::new(2, false)?;
        rig.set_target(700);
        rig.settle();
        assert_eq!(rig.actual(), 700);
        rig.bound.device.set_use_on_notify(true);
        rig.resizer.empty();
        assert_eq!((rig.inflated(), rig.actual()), (0, 0));
        Ok(())
    }

    #[test]
    fn a_closed_balloon_gives_no_page_out_and_recovery_frees_all() -> Result {
        let rig = Rig::new(4, false)?;
        let resizer = &rig.resizer;
        rig.set_target(300);
        rig.settle();
        resizer.freeze();
        let nodes = NodesBelowWatermark::all();
        for purpose in [Purpose::Resize, Purpose::Oom(&nodes)] {
            let request = resizer.queues().take_reserved().ok_or(ENOENT)?;
            let sent = BalloonQueues::send_deflate(&resizer.pages, request, 256, purpose);
            assert_eq!(sent, Err(SendError::Gone));
        }
        assert_eq!(resizer.oom_notify(0), 0);
        rig.bound.reset();
        resizer.detach_unused();
        assert_eq!((resizer.pages.count(), rig.inflated()), (0, 0));
        Ok(())
    }

    /// A task that migrates a page may reap the used buffer of the work item. No interrupt follows.
    #[test]
    fn a_used_buffer_that_another_task_reaped_is_completed() -> Result {
        let rig = Rig::with_work(4, false)?;
        rig.set_target(200);
        rig.resizer.update_size();
        assert!(rig.answer());
        BalloonQueues::reap_used(&rig.resizer.pages);
        assert!(wait_for(|| rig.counters.balloon_pages.get() == 200));
        Ok(())
    }
}
