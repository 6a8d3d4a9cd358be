// SPDX-License-Identifier: GPL-2.0

//! Inflating and deflating towards the host's target.
//!
//! It is done in turns. A turn never waits for the device: it collects what the device has used,
//! sends what there is room for, and returns; the device's interrupt asks for the next one. A work
//! item takes the turns; where none can run, or an end is waited for, the caller does.
//!
//! A task that finds no memory takes pages out by itself, see [`OnOutOfMemory`].

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, AtomicFlag, Relaxed};
use kernel::sync::{aref::ARef, new_mutex, Arc, Mutex};
use kernel::time::{msecs_to_jiffies, Delta, Instant, Jiffies, Monotonic, Msecs};
use kernel::{dev_info, dev_warn, device};

use super::balloon_queues::{
    BalloonQueues, Pages, Purpose, SendError, REQUESTS, WAIT_POLL_INTERVAL,
};
use super::config::BalloonConfig;
use super::counters::Counters;
use super::free_block_allocator::may_inflate;
use super::hinted_blocks::HintedBlocks;
use super::page_counts::Step;
use super::request::{GuestGeometry, PageBuffer, Request};
use super::timeout;
use crate::mm::{
    has_one_node, page_alloc, BalloonPage, BalloonPages, NodesBelowWatermark, OnOutOfMemory, Shrink,
};
use crate::virtio::work::{
    self, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem, WorkQueue,
};
use crate::virtio::{Virtqueue, Wakeup};

/// After how many new requests the device is notified. Half of them: so there are always some to
/// fill.
const BATCH: usize = REQUESTS / 2;

/// How long to wait when memory is short: doubled each time, from the one to the other.
const RETRY_MIN: Msecs = 200;
const RETRY_MAX: Msecs = 3200;
/// How long to wait for pages that the kernel is migrating.
const ISOLATED_RETRY: Msecs = 10;
/// After how long the queues are looked at, should no interrupt come for what the device has answered.
const POLL_INTERVAL: Msecs = 1000;
/// How often at most a shortage of memory is worth a line in the log.
const LOG_INTERVAL: Delta = Delta::from_secs(5);

/// How many balloon pages a task that found no memory gets at a time: as many as from the kernel's
/// own balloon driver.
const OOM_NR_PAGES: u64 = 256;
/// How long nothing is inflated after that.
const OOM_INFLATE_PAUSE: Delta = Delta::from_secs(10);
/// What part of the guest's memory must then be to be had before anything is.
const OOM_RESUME_SHARE: usize = 16;

/// The event that keeps the system awake.
const WAKEUP_SIGNAL_ADJUST: u32 = 0;

const UPDATE_SIZE: u64 = 1;
const RETRY: u64 = 2;
const ISOLATED: u64 = 3;
const POLL: u64 = 4;

/// The balloon's size, and all that changes it.
#[pin_data]
pub(crate) struct Resizer {
    dev: ARef<device::Device>,
    config: BalloonConfig,
    /// The blocks that were hinted and are not with the device any more.
    hinted_blocks: Option<Arc<HintedBlocks>>,
    /// The host has to know, and to agree, before a page is used.
    must_tell_host: bool,
    /// The host may have changed its target since it was read.
    target_changed: AtomicFlag,
    /// The target is an empty balloon, whatever the host wants.
    emptying: AtomicFlag,
    /// A task found no memory, and took pages out.
    oom_seen: AtomicFlag,
    /// How many pages had been released when such a task got none.
    timed_out_at: Atomic<u64>,
    /// The start of the times that follow.
    created: Instant<Monotonic>,
    /// When a task last got pages although no node was short, in milliseconds after `created`; `u64::MAX` if none has.
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
    isolated: DelayedWork<Self, ISOLATED>,
    #[pin]
    poll: DelayedWork<Self, POLL>,
}

/// What the turns know. The lock makes them one at a time; memory is allocated under it.
struct ResizerInner {
    target: u64,
    /// What the host was last told about the balloon's size.
    written_actual: Option<u64>,
    delay: Msecs,
    last_logged: Option<Instant<Monotonic>>,
    /// When a task last found no memory, until the target is reached or memory is there again.
    oom_seen: Option<Instant<Monotonic>>,
}

/// How far a turn has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The target is reached, and nothing is on its way.
    Reached,
    /// All that can be sent is with the device.
    Waiting,
    /// Nothing more can be sent now.
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
    impl HasDelayedWork<3> for Resizer { self.isolated }
    impl HasDelayedWork<4> for Resizer { self.poll }
}

impl Resizer {
    /// Makes an empty balloon. With `adjust_managed`, its pages do not count as the guest's memory.
    /// With `must_tell_host`, no page is used before the device has given it back. It inflates with what
    /// is `hinted_blocks` first.
    ///
    /// May sleep. Fails with `ENOMEM`.
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
            isolated <- new_delayed_work!(work_queue.clone(), "Resizer::isolated"),
            poll <- new_delayed_work!(work_queue, "Resizer::poll"),
        });
        Arc::pin_init(resizer, GFP_KERNEL)
    }

    /// The queue of pages that go into the balloon.
    pub(crate) fn inflate_queue(&self) -> &Virtqueue<PageBuffer> {
        self.queues().inflate_queue()
    }

    /// The queue of pages that come out of the balloon.
    pub(crate) fn deflate_queue(&self) -> &Virtqueue<PageBuffer> {
        self.queues().deflate_queue()
    }

    fn queues(&self) -> &BalloonQueues {
        self.pages.migrator()
    }

    /// The host may have a new target. Any context.
    pub(crate) fn target_changed(self: &Arc<Self>) {
        self.target_changed.store(true, Relaxed);
        if !self.queues().is_closed() {
            self.wakeup.stay_awake(WAKEUP_SIGNAL_ADJUST);
            self.wake();
        }
    }

    /// The device has used requests. Any context.
    pub(crate) fn used(self: &Arc<Self>) {
        self.queues().wait_queue.wake_up_all();
        self.wake();
    }

    /// Starts the work, unless it is queued already or disabled.
    fn wake(self: &Arc<Self>) {
        work::enqueue::<Self, UPDATE_SIZE>(self);
    }

    /// Takes all pages out of the balloon and tells the host, as long as it answers.
    ///
    /// May sleep while the device makes progress, and up to [`timeout::host`] without progress. Buffers
    /// still in flight are recovered after the device reset. Needs no work item to run.
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
                    "the host does not take its pages back; resetting it\n"
                );
                break;
            }
            if !more {
                self.queues()
                    .wait_queue
                    .wait_timeout(seen, WAIT_POLL_INTERVAL);
            }
        }
        // The last answers may have come after the last turn's report.
        self.write_actual(&mut self.inner.lock());
    }

    /// Ends all work for good. Nobody waits for the device any more, in any context. May sleep, but
    /// not for the device.
    pub(crate) fn disable(self: &Arc<Self>) {
        self.queues().close();
        self.end_work();
        self.wakeup.clear_event(WAKEUP_SIGNAL_ADJUST);
        self.wakeup.relax();
    }

    fn end_work(self: &Arc<Self>) {
        work::disable::<Self, RETRY>(self);
        work::disable::<Self, ISOLATED>(self);
        work::disable::<Self, POLL>(self);
        work::disable::<Self, UPDATE_SIZE>(self);
    }

    /// No turn is taken any more, and nobody waits for the device, until [`thaw`](Self::thaw). May
    /// sleep, but not for the device.
    pub(crate) fn freeze(&self) {
        self.queues().close();
        // A turn that is under way ends.
        drop(self.inner.lock());
        self.wakeup.clear_event(WAKEUP_SIGNAL_ADJUST);
        self.wakeup.relax();
    }

    /// Frees all pages that the device did not give back. To be called after its reset and
    /// [`freeze`](Self::freeze) or [`disable`](Self::disable). May sleep.
    pub(crate) fn detach_unused(&self) {
        BalloonQueues::detach_unused(&self.pages);
    }

    /// The device is there again, and holds no page: everything begins anew. Any context.
    pub(crate) fn thaw(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        inner.written_actual = None;
        inner.delay = RETRY_MIN;
        drop(inner);
        self.emptying.store(false, Relaxed);
        self.queues().open();
    }

    /// Tells the host the balloon's size, if it does not know it.
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

    /// Sends requests towards the target for as long as there is room and memory.
    ///
    /// The target is looked at before each.
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
        // Also after an error: a request that memory was too short to fill has been sent all the
        // same.
        self.queues().notify();
        progress
    }

    /// Takes a request for `step`, if the queue has room for it; `None` if all are in flight.
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

    /// Whether the guest has memory to give.
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

    /// Fills `request` with up to `pfns` new pages, and offers them to the device.
    ///
    /// Pages of hinted blocks come first: they are free memory that nobody uses, and that the page
    /// allocator does not have. If the host changes its target meanwhile, they are fewer: where memory is short it may take
    /// seconds to find a request's worth of it.
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
                // A page whose number has too many bits for the device goes back to the guest.
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
            // Somebody found no memory meanwhile: now there is some.
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

    /// Tries again after a while without memory, and says why once in a while.
    fn retry_later(self: &Arc<Self>, inner: &mut ResizerInner) {
        if !self.retry_after(inner.delay) {
            // This one has been waiting already.
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

    /// Starts the work after so long. Returns `false` if a delay is running already.
    fn retry_after(self: &Arc<Self>, delay: Msecs) -> bool {
        let delay: Jiffies = msecs_to_jiffies(delay);
        work::enqueue_delayed::<Self, RETRY>(self, delay)
    }

    /// Whether a task that found no memory has waited in vain already, and nothing has been answered
    /// since. `released` is how many pages were released so far.
    fn has_timed_out(&self, released: u64) -> bool {
        let page_counts = self.queues().page_counts();
        page_counts.deflating() > 0 && self.timed_out_at.load(Relaxed) == released
    }

    /// Takes some pages out that lie on these nodes. If the host need not agree, they are free then.
    fn send_oom_deflate(&self, nodes: &NodesBelowWatermark) {
        let request =
            BalloonQueues::wait(&self.pages, timeout::host(), BalloonQueues::take_reserved);
        if let Some(request) = request {
            let sent = BalloonQueues::send_deflate(
                &self.pages,
                request,
                OOM_NR_PAGES,
                Purpose::Oom(nodes),
            );
            if sent.is_ok_and(|pages| pages > 0) {
                self.counters.oom_deflations.add(1);
            }
            self.queues().notify();
        }
    }

    /// One turn: everything that can be done now, and no more than all requests once. Returns
    /// whether another is worth taking at once.
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
                inner.oom_seen = None;
                self.wakeup.relax();
            }
            Progress::Waiting | Progress::Blocked(SendError::RingFull) => {
                // The interrupt does not come if a task that migrates a page has taken the answers.
                let delay = msecs_to_jiffies(POLL_INTERVAL);
                work::enqueue_delayed::<Self, POLL>(self, delay);
            }
            Progress::Blocked(SendError::NoMemory) => {
                self.retry_later(&mut inner);
                self.wakeup.relax();
            }
            Progress::Blocked(SendError::Isolated) => {
                // The kernel does not say when it has put them back.
                let delay = msecs_to_jiffies(ISOLATED_RETRY);
                work::enqueue_delayed::<Self, ISOLATED>(self, delay);
            }
            Progress::Blocked(SendError::Gone) => {
                self.wakeup.relax();
                return false;
            }
        }
        !self.queues().enable_callbacks()
    }
}

/// Deflating where there is no memory left.
///
/// This runs within an allocation, so it takes only the lock of [`BalloonQueues`], allocates nothing and
/// does not touch config space, which some transports allocate for; the work item tells the host the
/// new size. Where the host need not agree, the pages are free as soon as it has been told of them;
/// where it has to, its answer is waited for, but not for ever, and not again before it has answered
/// for the last ones.
impl OnOutOfMemory for Resizer {
    fn oom_notify(self: &Arc<Self>, already_freed: usize) -> usize {
        self.oom_deflate_on(&NodesBelowWatermark::now(), already_freed)
    }
}

impl Resizer {
    /// Implements [`oom_notify`](OnOutOfMemory::oom_notify) for `nodes`: those that are short of memory and
    /// have balloon pages.
    ///
    /// On a machine with one node, `already_freed > 0` is enough. With several nodes those pages may be on a
    /// node that the allocating task cannot use.
    ///
    /// If no node is short, see [`may_be_short`](Self::may_be_short).
    fn oom_deflate_on(
        self: &Arc<Self>,
        nodes: &NodesBelowWatermark,
        already_freed: usize,
    ) -> usize {
        let queues = self.queues();
        if queues.is_closed() || self.emptying.load(Relaxed) {
            return 0;
        }
        let before = queues.released();
        let freed = |queues: &BalloonQueues| {
            let freed = queues.released().wrapping_sub(before) as usize;
            Some(freed).filter(|freed| *freed > 0)
        };
        if !nodes.is_empty() {
            // Balloon pages would help: pause inflation.
            self.oom_seen.store(true, Relaxed);
        }
        if already_freed > 0 && (nodes.is_empty() || has_one_node()) {
            return 0;
        }
        let all = NodesBelowWatermark::all();
        let nodes = if nodes.is_empty() && self.may_be_short(has_one_node()) {
            self.oom_seen.store(true, Relaxed);
            &all
        } else {
            nodes
        };
        BalloonQueues::reap_used(&self.pages);
        if freed(queues).is_none() && !self.has_timed_out(before) {
            if !nodes.is_empty() {
                self.send_oom_deflate(nodes);
            }
            if self.must_tell_host && queues.page_counts().deflating() > 0 {
                let answered = BalloonQueues::wait(&self.pages, timeout::host(), freed);
                if answered.is_none() {
                    self.timed_out_at.store(before, Relaxed);
                }
            }
        }
        let freed = freed(queues).unwrap_or(0);
        // To tell the host of the new size.
        self.wake();
        freed
    }

    /// Returns whether a task that found no memory gets balloon pages although no node is short.
    ///
    /// Other tasks may have freed pages since its allocation failed, or it needs a larger block. Without
    /// any page from here, the kernel kills a process. With several nodes, the task may also be bound to a node
    /// that balloon pages cannot help: then the answer is yes at most once in [`OOM_INFLATE_PAUSE`].
    fn may_be_short(&self, one_node: bool) -> bool {
        if one_node {
            return true;
        }
        let now = self.created.elapsed().as_millis() as u64;
        let last = self.unexplained_oom_at.load(Relaxed);
        let is_due = last == u64::MAX || now - last >= OOM_INFLATE_PAUSE.as_millis() as u64;
        if is_due {
            self.unexplained_oom_at.store(now, Relaxed);
        }
        is_due
    }
}

/// The work proper.
impl WorkItem<1> for Resizer {
    fn run(this: Arc<Self>) {
        // One turn each time, so that the system, which waits for the work to pause before it
        // sleeps, waits for one turn at most.
        if this.update_size() {
            this.wake();
        }
    }
}

/// What comes when memory may be there again: the work proper.
impl WorkItem<2> for Resizer {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

/// What comes instead of an interrupt: the work proper.
impl WorkItem<4> for Resizer {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

/// What comes when the kernel may have put isolated pages back: the work proper.
impl WorkItem<3> for Resizer {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

#[kunit_tests(virtio_balloon_rs_resizer)]
mod tests {
    use super::*;
    use crate::mm::{HintedBlock, PageBlock};
    use crate::shared_abi::config;
    use crate::shared_abi::page::PFN_SHIFT;
    use crate::virtio::kunit_device::{wait_for, BoundTestDevice, CountingHandler};

    const INFLATE: usize = 0;
    const DEFLATE: usize = 1;

    /// A balloon and its device, whose answers the test gives.
    struct Rig {
        resizer: Arc<Resizer>,
        hinted_blocks: Arc<HintedBlocks>,
        counters: Arc<Counters>,
        // Last: the others have references to the device.
        bound: BoundTestDevice,
    }

    impl Rig {
        /// Disables the work items: the test calls them, because the test device supports one thread.
        fn new(entries: usize, must_tell_host: bool) -> Result<Self> {
            let rig = Self::with_work(entries, must_tell_host)?;
            rig.resizer.end_work();
            Ok(rig)
        }

        /// Leaves the work items enabled.
        fn with_work(entries: usize, must_tell_host: bool) -> Result<Self> {
            let bound = BoundTestDevice::with_entries(entries)?;
            let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
            let queue = WorkQueue::new(c"kunit")?;
            let hinted_blocks =
                Arc::pin_init(HintedBlocks::new(counters.clone(), queue), GFP_KERNEL)?;
            let dev = bound.device_ref();
            let printer: &device::Device = dev.as_ref();
            let resizer = Resizer::new(
                ARef::from(printer),
                BalloonConfig::new(bound.config()?),
                Some(hinted_blocks.clone()),
                Wakeup::new(dev.clone())?,
                WorkQueue::new(c"kunit")?,
                counters.clone(),
                true,
                must_tell_host,
            )?;
            let virtqueues: [&dyn crate::virtio::AnyQueue; 2] =
                [resizer.inflate_queue(), resizer.deflate_queue()];
            bound.find_queues(&virtqueues, CountingHandler::new()?)?;
            Ok(Self {
                resizer,
                hinted_blocks,
                counters,
                bound,
            })
        }

        fn set_target(&self, pages: u32) {
            self.bound.device.set_config(config::NUM_PAGES, pages);
            self.resizer.target_changed.store(true, Relaxed);
        }

        fn actual(&self) -> u32 {
            self.bound.device.config_at(config::ACTUAL)
        }

        fn inflated(&self) -> u64 {
            self.resizer.queues().page_counts().inflated()
        }

        /// Lets the device use one buffer of each queue. Returns whether there was any.
        fn answer(&self) -> bool {
            let answers = [INFLATE, DEFLATE].map(|queue| self.bound.device.use_buffer(queue));
            answers.iter().any(Option::is_some)
        }

        /// Takes turns, each for one answer of the device for a queue, until it has nothing to answer.
        ///
        /// Whatever is with the device, its answer must come with an interrupt.
        fn settle(&self) {
            loop {
                self.resizer.update_size();
                let suppressed =
                    [INFLATE, DEFLATE].map(|queue| self.bound.device.interrupts_suppressed(queue));
                if !self.answer() {
                    break;
                }
                assert_eq!(suppressed, [false, false]);
            }
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            self.resizer.disable();
            self.bound.reset();
            self.resizer.detach_unused();
        }
    }

    #[test]
    fn a_ring_of_any_size_brings_the_balloon_to_its_target_and_back() -> Result {
        for entries in [1, 2, 4, 8] {
            let rig = Rig::new(entries, false)?;
            // More than all requests hold.
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
        // Then what the page allocator has.
        rig.set_target(50);
        rig.settle();
        assert_eq!((rig.inflated(), rig.hinted_blocks.count()), (50, 0));
        assert_eq!(rig.counters.hinted_pages_inflated.get(), 32);
        rig.set_target(0);
        rig.settle();
        assert_eq!(rig.inflated(), 0);
        Ok(())
    }

    /// As page migration does it: the pages are on no list meanwhile.
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

    #[test]
    fn pages_that_others_release_are_not_counted_as_oom_deflation() -> Result {
        let rig = Rig::new(4, true)?;
        let resizer = &rig.resizer;
        rig.set_target(600);
        rig.settle();
        let nodes = NodesBelowWatermark::all();
        for purpose in [Purpose::Resize, Purpose::Oom(&nodes)] {
            let request = resizer.queues().take_reserved().ok_or(ENOENT)?;
            let sent = BalloonQueues::send_deflate(
                &resizer.pages,
                request,
                GuestGeometry::pfns(100),
                purpose,
            );
            assert_eq!(sent, Ok(100));
        }
        assert_eq!(rig.counters.oom_deflated_pages.get(), 0);
        resizer.queues().notify();
        assert!(rig.answer() && rig.answer());
        BalloonQueues::reap_used(&resizer.pages);
        assert_eq!(resizer.queues().released(), 200);
        assert_eq!(
            rig.counters.oom_deflated_pages.get(),
            GuestGeometry::pfns(100)
        );
        Ok(())
    }

    /// Pages that another task frees in the meantime do not lead to an OOM kill.
    #[test]
    fn a_task_without_memory_gets_pages_although_no_node_is_short() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(300);
        rig.settle();
        assert!(rig.resizer.oom_deflate_on(&NodesBelowWatermark::none(), 0) > 0);
        assert!(rig.inflated() < 300);
        Ok(())
    }

    /// The task may be bound to a node without balloon pages.
    #[test]
    fn with_several_nodes_the_balloon_is_not_emptied_while_none_is_short() -> Result {
        let rig = Rig::new(4, false)?;
        assert!(rig.resizer.may_be_short(false));
        assert!(!rig.resizer.may_be_short(false));
        assert!(rig.resizer.may_be_short(true));
        Ok(())
    }

    /// OOM deflation is skipped, and inflation pauses: it would compete with the same task.
    #[test]
    fn a_task_that_has_got_hinted_blocks_needs_no_balloon_pages() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(300);
        rig.settle();
        let given = rig.resizer.oom_deflate_on(&NodesBelowWatermark::all(), 4);
        if has_one_node() {
            assert_eq!((given, rig.inflated()), (0, 300));
        } else {
            assert!(given > 0);
        }
        let before = rig.inflated();
        rig.set_target(400);
        rig.settle();
        assert_eq!(rig.inflated(), before);
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
