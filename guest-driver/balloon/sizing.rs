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

use super::balance::Step;
use super::config::BalloonConfig;
use super::counters::Counters;
use super::held::Held;
use super::request::{Guest, PageBuffer, Request};
use super::reserve::may_inflate;
use super::timeout;
use super::traffic::{Pages, Purpose, SendError, Traffic, LOOK, REQUESTS};
use crate::mm::{
    has_one_node, state, BalloonPage, BalloonPages, OnOutOfMemory, ShortNodes, Shrink,
};
use crate::virtio::work::{self, impl_has_task, new_task, Run, Task, WorkQueue};
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
const ANSWER_RETRY: Msecs = 1000;
/// How often at most a shortage of memory is worth a line in the log.
const COMPLAINT_INTERVAL: Delta = Delta::from_secs(5);

/// How many balloon pages a task that found no memory gets at a time: as many as from the kernel's
/// own balloon driver.
const RESCUE: u64 = 256;
/// How long nothing is inflated after that.
const RESCUE_PAUSE: Delta = Delta::from_secs(10);
/// What part of the guest's memory must then be to be had before anything is.
const RESCUE_SHARE: usize = 16;

/// The event that keeps the system awake.
const ADJUST: u32 = 0;

const STEER: u64 = 1;
const RETRY: u64 = 2;
const ISOLATED: u64 = 3;
const ANSWER: u64 = 4;

/// The balloon's size, and all that changes it.
#[pin_data]
pub(crate) struct Sizing {
    dev: ARef<device::Device>,
    config: BalloonConfig,
    /// The blocks that were hinted and are not with the device any more.
    held: Option<Arc<Held>>,
    /// The host has to know, and to agree, before a page is used.
    must_tell_host: bool,
    /// The host may have changed its target since it was read.
    target_changed: AtomicFlag,
    /// The target is an empty balloon, whatever the host wants.
    emptying: AtomicFlag,
    /// A task found no memory, and took pages out.
    rescued: AtomicFlag,
    /// How many pages had been released when such a task got none.
    in_vain_at: Atomic<u64>,
    /// The start of the times that follow.
    created: Instant<Monotonic>,
    /// When a task last got pages although no node was short, in milliseconds after `created`; `u64::MAX` if none has.
    unexplained_oom_at: Atomic<u64>,
    #[pin]
    turn: Mutex<Turn>,
    #[pin]
    pages: Pages,
    wakeup: Arc<Wakeup>,
    counters: Arc<Counters>,
    #[pin]
    steer: Task<Self, STEER>,
    #[pin]
    retry: Task<Self, RETRY>,
    #[pin]
    isolated: Task<Self, ISOLATED>,
    #[pin]
    answer: Task<Self, ANSWER>,
}

/// What the turns know. The lock makes them one at a time; memory is allocated under it.
struct Turn {
    target: u64,
    /// What the host was last told about the balloon's size.
    reported: Option<u64>,
    delay: Msecs,
    complained: Option<Instant<Monotonic>>,
    /// When a task last found no memory, until the target is reached or memory is there again.
    rescued: Option<Instant<Monotonic>>,
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

impl_has_task! {
    impl HasTask<1> for Sizing { self.steer }
    impl HasTask<2> for Sizing { self.retry }
    impl HasTask<3> for Sizing { self.isolated }
    impl HasTask<4> for Sizing { self.answer }
}

impl Sizing {
    /// Makes an empty balloon. With `adjust_managed`, its pages do not count as the guest's memory.
    /// With `must_tell_host`, no page is used before the device has given it back. It inflates with what
    /// is `held` first.
    ///
    /// May sleep. Fails with `ENOMEM`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        dev: ARef<device::Device>,
        config: BalloonConfig,
        held: Option<Arc<Held>>,
        wakeup: Arc<Wakeup>,
        work_queue: WorkQueue,
        counters: Arc<Counters>,
        adjust_managed: bool,
        must_tell_host: bool,
    ) -> Result<Arc<Self>> {
        let turn = Turn {
            target: 0,
            reported: Some(0),
            delay: RETRY_MIN,
            complained: None,
            rescued: None,
        };
        let sizing = try_pin_init!(Self {
            dev,
            config,
            held,
            must_tell_host,
            target_changed: AtomicFlag::new(true),
            emptying: AtomicFlag::new(false),
            rescued: AtomicFlag::new(false),
            in_vain_at: Atomic::new(u64::MAX),
            created: Instant::now(),
            unexplained_oom_at: Atomic::new(u64::MAX),
            turn <- new_mutex!(turn, "Sizing::turn"),
            pages <- BalloonPages::new(
                adjust_managed,
                Traffic::new(counters.clone(), *must_tell_host)?,
            ),
            wakeup,
            counters,
            steer <- new_task!(work_queue.clone(), "Sizing::steer"),
            retry <- new_task!(work_queue.clone(), "Sizing::retry"),
            isolated <- new_task!(work_queue.clone(), "Sizing::isolated"),
            answer <- new_task!(work_queue, "Sizing::answer"),
        });
        Arc::pin_init(sizing, GFP_KERNEL)
    }

    /// The queue of pages that go into the balloon.
    pub(crate) fn inflate_queue(&self) -> &Virtqueue<PageBuffer> {
        self.traffic().inflate_queue()
    }

    /// The queue of pages that come out of the balloon.
    pub(crate) fn deflate_queue(&self) -> &Virtqueue<PageBuffer> {
        self.traffic().deflate_queue()
    }

    fn traffic(&self) -> &Traffic {
        self.pages.migrator()
    }

    /// The host may have a new target. Any context.
    pub(crate) fn target_changed(self: &Arc<Self>) {
        self.target_changed.store(true, Relaxed);
        if !self.traffic().is_closed() {
            self.wakeup.begin(ADJUST);
            self.wake();
        }
    }

    /// The device has used requests. Any context.
    pub(crate) fn used(self: &Arc<Self>) {
        self.traffic().signal.raise();
        self.wake();
    }

    /// Starts the work, unless it is queued already or disabled.
    fn wake(self: &Arc<Self>) {
        work::enqueue::<Self, STEER>(self);
    }

    /// Takes all pages out of the balloon and tells the host, as long as it answers.
    ///
    /// May sleep while the device makes progress, and up to [`timeout::host`] without progress. Buffers
    /// still in flight are recovered after the device reset. Needs no work item to run.
    pub(crate) fn empty(self: &Arc<Self>) {
        self.emptying.store(true, Relaxed);
        let mut last = self.traffic().balance();
        let mut since: Instant<Monotonic> = Instant::now();
        loop {
            let seen = self.traffic().signal.count();
            let more = self.take_turn();
            if self.traffic().is_idle() || self.traffic().is_broken() {
                break;
            }
            let balance = self.traffic().balance();
            if balance != last {
                last = balance;
                since = Instant::now();
            } else if since.elapsed() > timeout::host() {
                dev_warn!(
                    self.dev,
                    "the host does not take its pages back; resetting it\n"
                );
                break;
            }
            if !more {
                self.traffic().signal.wait(seen, LOOK);
            }
        }
        // The last answers may have come after the last turn's report.
        self.report(&mut self.turn.lock());
    }

    /// Ends all work for good. Nobody waits for the device any more, in any context. May sleep, but
    /// not for the device.
    pub(crate) fn disable(self: &Arc<Self>) {
        self.traffic().close();
        self.end_work();
        self.wakeup.take_up(ADJUST);
        self.wakeup.rest();
    }

    fn end_work(self: &Arc<Self>) {
        work::disable::<Self, RETRY>(self);
        work::disable::<Self, ISOLATED>(self);
        work::disable::<Self, ANSWER>(self);
        work::disable::<Self, STEER>(self);
    }

    /// No turn is taken any more, and nobody waits for the device, until [`thaw`](Self::thaw). May
    /// sleep, but not for the device.
    pub(crate) fn freeze(&self) {
        self.traffic().close();
        // A turn that is under way ends.
        drop(self.turn.lock());
        self.wakeup.take_up(ADJUST);
        self.wakeup.rest();
    }

    /// Frees all pages that the device did not give back. To be called after its reset and
    /// [`freeze`](Self::freeze) or [`disable`](Self::disable). May sleep.
    pub(crate) fn recover(&self) {
        Traffic::recover(&self.pages);
    }

    /// The device is there again, and holds no page: everything begins anew. Any context.
    pub(crate) fn thaw(self: &Arc<Self>) {
        let mut turn = self.turn.lock();
        turn.reported = None;
        turn.delay = RETRY_MIN;
        drop(turn);
        self.emptying.store(false, Relaxed);
        self.traffic().open();
    }

    /// Tells the host the balloon's size, if it does not know it.
    fn report(&self, turn: &mut Turn) {
        let balance = self.traffic().balance();
        self.counters.balloon_pages.set(balance.inside());
        let actual = balance.actual();
        if turn.reported != Some(actual) && self.config.set_actual(actual).is_ok() {
            turn.reported = Some(actual);
        }
    }

    /// Reads the host's target, if it may have changed.
    fn read_target(&self, turn: &mut Turn) -> Result {
        if self.emptying.load(Relaxed) {
            turn.target = 0;
            self.target_changed.store(true, Relaxed);
        } else if self.target_changed.xchg(false, Relaxed) {
            turn.target = self.config.target()?;
            self.counters.target_pages.set(turn.target);
            turn.delay = RETRY_MIN;
        }
        self.traffic().set_target(turn.target);
        Ok(())
    }

    /// Sends requests towards the target for as long as there is room and memory.
    ///
    /// The target is looked at before each.
    fn advance(&self, turn: &mut Turn) -> Progress {
        let mut unnoticed = 0;
        let progress = loop {
            if self.read_target(turn).is_err() {
                break Progress::Blocked(SendError::Gone);
            }
            let traffic = self.traffic();
            let (sent, request) = match traffic.next() {
                Step::Rest => break Progress::Reached,
                Step::Wait => break Progress::Waiting,
                step => match self.prepare(turn, step) {
                    Err(error) => break error.into(),
                    Ok(None) => break Progress::Waiting,
                    Ok(Some(request)) => (step, request),
                },
            };
            let sent = match sent {
                Step::Inflate(pfns) => self.send_in(turn, request, pfns),
                Step::Deflate(pfns) => {
                    Traffic::send_out(&self.pages, request, pfns, Purpose::Resize).map(drop)
                }
                Step::Wait | Step::Rest => Ok(()),
            };
            if let Err(error) = sent {
                break error.into();
            }
            unnoticed += 1;
            if unnoticed == BATCH {
                self.traffic().notify();
                unnoticed = 0;
            }
        };
        // Also after an error: a request that memory was too short to fill has been sent all the
        // same.
        self.traffic().notify();
        progress
    }

    /// Takes a request for `step`, if the queue has room for it; `None` if all are in flight.
    fn prepare(&self, turn: &mut Turn, step: Step) -> Result<Option<Request>, SendError> {
        let traffic = self.traffic();
        if matches!(step, Step::Inflate(_)) {
            traffic.room_to_inflate()?;
            if !self.may_inflate(turn) {
                return Err(SendError::NoMemory);
            }
        } else {
            traffic.room_to_deflate()?;
        }
        Ok(traffic.take_spare())
    }

    /// Whether the guest has memory to give.
    fn may_inflate(&self, turn: &mut Turn) -> bool {
        if self.rescued.xchg(false, Relaxed) {
            turn.rescued = Some(Instant::now());
        }
        let obtainable = state::obtainable_pages() + self.held.as_ref().map_or(0, |it| it.count());
        if let Some(then) = turn.rescued {
            let enough = state::managed_pages() / RESCUE_SHARE;
            if then.elapsed() < RESCUE_PAUSE || obtainable < enough {
                return false;
            }
        }
        may_inflate(obtainable)
    }

    /// Fills `request` with up to `pfns` new pages, and offers them to the device.
    ///
    /// Pages of hinted blocks come first: they are free memory that nobody uses, and that the page
    /// allocator does not have. If the host changes its target meanwhile, they are fewer: where memory is short it may take
    /// seconds to find a request's worth of it.
    fn send_in(&self, turn: &mut Turn, mut request: Request, pfns: u64) -> Result<(), SendError> {
        let mut wanted = Guest::guest_pages(pfns).min(Guest::CAPACITY as u64) as usize;
        let mut result = Ok(());
        if let Some(held) = &self.held {
            let mut pages = held.take_for_balloon(wanted);
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
        if self.rescued.load(Relaxed) {
            // Somebody found no memory meanwhile: now there is some.
            result = Err(SendError::NoMemory);
            drop(request.take());
        }
        if request.is_empty() {
            self.traffic().put(request);
            return result;
        }
        self.traffic().send_in(request)?;
        if result.is_ok() {
            turn.delay = RETRY_MIN;
        }
        result
    }

    /// Tries again after a while without memory, and says why once in a while.
    fn retry_later(self: &Arc<Self>, turn: &mut Turn) {
        if !self.retry_after(turn.delay) {
            // This one has been waiting already.
            return;
        }
        turn.delay = (turn.delay * 2).min(RETRY_MAX);
        self.counters.shortages.add(1);
        let may_complain = turn
            .complained
            .is_none_or(|then| then.elapsed() > COMPLAINT_INTERVAL);
        if may_complain {
            turn.complained = Some(Instant::now());
            dev_info!(
                self.dev,
                "Out of puff! {} of {} pages are in the balloon\n",
                self.traffic().balance().inside(),
                turn.target
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
    fn is_silent(&self, released: u64) -> bool {
        let balance = self.traffic().balance();
        balance.coming_out() > 0 && self.in_vain_at.load(Relaxed) == released
    }

    /// Takes some pages out that lie on these nodes. If the host need not agree, they are free then.
    fn take_out_for_rescue(&self, nodes: &ShortNodes) {
        let request = Traffic::wait(&self.pages, timeout::host(), Traffic::take_reserved);
        if let Some(request) = request {
            let sent = Traffic::send_out(&self.pages, request, RESCUE, Purpose::Oom(nodes));
            if sent.is_ok_and(|pages| pages > 0) {
                self.counters.oom_deflations.add(1);
            }
            self.traffic().notify();
        }
    }

    /// One turn: everything that can be done now, and no more than all requests once. Returns
    /// whether another is worth taking at once.
    fn take_turn(self: &Arc<Self>) -> bool {
        let mut turn = self.turn.lock();
        if self.traffic().is_closed() {
            return false;
        }
        self.wakeup.take_up(ADJUST);
        Traffic::collect(&self.pages);
        self.report(&mut turn);
        match self.advance(&mut turn) {
            Progress::Reached => {
                turn.rescued = None;
                self.wakeup.rest();
            }
            Progress::Waiting | Progress::Blocked(SendError::RingFull) => {
                // The interrupt does not come if a task that migrates a page has taken the answers.
                let delay = msecs_to_jiffies(ANSWER_RETRY);
                work::enqueue_delayed::<Self, ANSWER>(self, delay);
            }
            Progress::Blocked(SendError::NoMemory) => {
                self.retry_later(&mut turn);
                self.wakeup.rest();
            }
            Progress::Blocked(SendError::Isolated) => {
                // The kernel does not say when it has put them back.
                let delay = msecs_to_jiffies(ISOLATED_RETRY);
                work::enqueue_delayed::<Self, ISOLATED>(self, delay);
            }
            Progress::Blocked(SendError::Gone) => {
                self.wakeup.rest();
                return false;
            }
        }
        !self.traffic().listen()
    }
}

/// Deflating where there is no memory left.
///
/// This runs within an allocation, so it takes only the lock of [`Traffic`], allocates nothing and
/// does not touch config space, which some transports allocate for; the work item tells the host the
/// new size. Where the host need not agree, the pages are free as soon as it has been told of them;
/// where it has to, its answer is waited for, but not for ever, and not again before it has answered
/// for the last ones.
impl OnOutOfMemory for Sizing {
    fn give_back(self: &Arc<Self>, already: usize) -> usize {
        self.give_back_on(&ShortNodes::now(), already)
    }
}

impl Sizing {
    /// Implements [`give_back`](OnOutOfMemory::give_back) for `nodes`: those that are short of memory and
    /// have balloon pages.
    ///
    /// On a machine with one node, `already > 0` is enough. With several nodes those pages may be on a
    /// node that the allocating task cannot use.
    ///
    /// If no node is short, see [`may_be_short`](Self::may_be_short).
    fn give_back_on(self: &Arc<Self>, nodes: &ShortNodes, already: usize) -> usize {
        let traffic = self.traffic();
        if traffic.is_closed() || self.emptying.load(Relaxed) {
            return 0;
        }
        let before = traffic.released();
        let freed = |traffic: &Traffic| {
            let freed = traffic.released().wrapping_sub(before) as usize;
            Some(freed).filter(|freed| *freed > 0)
        };
        if !nodes.is_empty() {
            // Balloon pages would help: pause inflation.
            self.rescued.store(true, Relaxed);
        }
        if already > 0 && (nodes.is_empty() || has_one_node()) {
            return 0;
        }
        let all = ShortNodes::all();
        let nodes = if nodes.is_empty() && self.may_be_short(has_one_node()) {
            self.rescued.store(true, Relaxed);
            &all
        } else {
            nodes
        };
        Traffic::collect(&self.pages);
        if freed(traffic).is_none() && !self.is_silent(before) {
            if !nodes.is_empty() {
                self.take_out_for_rescue(nodes);
            }
            if self.must_tell_host && traffic.balance().coming_out() > 0 {
                let answered = Traffic::wait(&self.pages, timeout::host(), freed);
                if answered.is_none() {
                    self.in_vain_at.store(before, Relaxed);
                }
            }
        }
        let freed = freed(traffic).unwrap_or(0);
        // To tell the host of the new size.
        self.wake();
        freed
    }

    /// Returns whether a task that found no memory gets balloon pages although no node is short.
    ///
    /// Other tasks may have freed pages since its allocation failed, or it needs a larger block. Without
    /// any page from here, the kernel kills a process. With several nodes, the task may also be bound to a node
    /// that balloon pages cannot help: then the answer is yes at most once in [`RESCUE_PAUSE`].
    fn may_be_short(&self, one_node: bool) -> bool {
        if one_node {
            return true;
        }
        let now = self.created.elapsed().as_millis() as u64;
        let last = self.unexplained_oom_at.load(Relaxed);
        let is_due = last == u64::MAX || now - last >= RESCUE_PAUSE.as_millis() as u64;
        if is_due {
            self.unexplained_oom_at.store(now, Relaxed);
        }
        is_due
    }
}

/// The work proper.
impl Run<1> for Sizing {
    fn run(this: Arc<Self>) {
        // One turn each time, so that the system, which waits for the work to pause before it
        // sleeps, waits for one turn at most.
        if this.take_turn() {
            this.wake();
        }
    }
}

/// What comes when memory may be there again: the work proper.
impl Run<2> for Sizing {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

/// What comes instead of an interrupt: the work proper.
impl Run<4> for Sizing {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

/// What comes when the kernel may have put isolated pages back: the work proper.
impl Run<3> for Sizing {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}

#[kunit_tests(virtio_balloon_rs_sizing)]
mod tests {
    use super::*;
    use crate::mm::{LentBlock, PageBlock};
    use crate::shared_abi::config;
    use crate::shared_abi::page::PFN_SHIFT;
    use crate::virtio::kunit_device::{wait_for, Bound, Counter};

    const INFLATE: usize = 0;
    const DEFLATE: usize = 1;

    /// A balloon and its device, whose answers the test gives.
    struct Rig {
        sizing: Arc<Sizing>,
        held: Arc<Held>,
        counters: Arc<Counters>,
        // Last: the others have references to the device.
        bound: Bound,
    }

    impl Rig {
        /// Disables the work items: the test calls them, because the test device supports one thread.
        fn new(entries: usize, must_tell_host: bool) -> Result<Self> {
            let rig = Self::with_work(entries, must_tell_host)?;
            rig.sizing.end_work();
            Ok(rig)
        }

        /// Leaves the work items enabled.
        fn with_work(entries: usize, must_tell_host: bool) -> Result<Self> {
            let bound = Bound::with_entries(entries)?;
            let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
            let queue = WorkQueue::new(c"kunit")?;
            let held = Arc::pin_init(Held::new(counters.clone(), queue), GFP_KERNEL)?;
            let dev = bound.device_ref();
            let printer: &device::Device = dev.as_ref();
            let sizing = Sizing::new(
                ARef::from(printer),
                BalloonConfig::new(bound.config()?),
                Some(held.clone()),
                Wakeup::new(dev.clone())?,
                WorkQueue::new(c"kunit")?,
                counters.clone(),
                true,
                must_tell_host,
            )?;
            let queues: [&dyn crate::virtio::AnyQueue; 2] =
                [sizing.inflate_queue(), sizing.deflate_queue()];
            bound.find_queues(&queues, Counter::new()?)?;
            Ok(Self {
                sizing,
                held,
                counters,
                bound,
            })
        }

        fn set_target(&self, pages: u32) {
            self.bound.device.set_config(config::NUM_PAGES, pages);
            self.sizing.target_changed.store(true, Relaxed);
        }

        fn actual(&self) -> u32 {
            self.bound.device.config_at(config::ACTUAL)
        }

        fn inside(&self) -> u64 {
            self.sizing.traffic().balance().inside()
        }

        /// Lets the device use one buffer of each queue. Returns whether there was any.
        fn answer(&self) -> bool {
            let answers = [INFLATE, DEFLATE].map(|queue| self.bound.device.answer(queue));
            answers.iter().any(Option::is_some)
        }

        /// Takes turns, each for one answer of the device for a queue, until it has nothing to answer.
        ///
        /// Whatever is with the device, its answer must come with an interrupt.
        fn settle(&self) {
            loop {
                self.sizing.take_turn();
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
            self.sizing.disable();
            self.bound.reset();
            self.sizing.recover();
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
                assert_eq!(rig.inside(), u64::from(target));
                assert_eq!(rig.actual(), target);
            }
            assert_eq!(rig.counters.shortages.get(), 0);
        }
        Ok(())
    }

    #[test]
    fn a_target_that_changes_is_heeded_before_a_request_is_full() -> Result {
        let rig = Rig::new(4, false)?;
        let mut turn = rig.sizing.turn.lock();
        let request = rig.sizing.traffic().take_spare().ok_or(ENOENT)?;
        rig.sizing.target_changed.store(true, Relaxed);
        let sent = rig.sizing.send_in(&mut turn, request, 100);
        assert_eq!(sent, Ok(()));
        drop(turn);
        assert!(rig.answer());
        Traffic::collect(&rig.sizing.pages);
        assert_eq!(rig.inside(), Guest::pfns(1));
        Ok(())
    }

    #[test]
    fn hinted_blocks_go_into_the_balloon_first() -> Result {
        let rig = Rig::new(4, false)?;
        let block = PageBlock::take_free(5).ok_or(ENOMEM)?;
        let address = block.address();
        rig.held.hold(LentBlock::new(block));
        rig.set_target(20);
        rig.sizing.take_turn();
        let first = rig.bound.device.answer(INFLATE).ok_or(ENOENT)?;
        assert_eq!(u64::from(first) >> 5, address >> PFN_SHIFT >> 5);
        rig.settle();
        assert_eq!((rig.inside(), rig.held.count()), (20, 12));
        // Then what the page allocator has.
        rig.set_target(50);
        rig.settle();
        assert_eq!((rig.inside(), rig.held.count()), (50, 0));
        assert_eq!(rig.counters.hinted_pages_inflated.get(), 32);
        rig.set_target(0);
        rig.settle();
        assert_eq!(rig.inside(), 0);
        Ok(())
    }

    /// As page migration does it: the pages are on no list meanwhile.
    #[test]
    fn isolated_pages_are_waited_for_and_are_no_shortage() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(200);
        rig.settle();
        let isolated = rig.sizing.pages.dequeue(200);
        rig.set_target(0);
        for _ in 0..3 {
            rig.settle();
        }
        assert_eq!(rig.counters.shortages.get(), 0);
        assert_eq!(rig.inside(), 200);
        rig.sizing.pages.enqueue(isolated);
        rig.settle();
        assert_eq!((rig.inside(), rig.actual()), (0, 0));
        Ok(())
    }

    #[test]
    fn emptying_tells_the_host_of_the_last_page() -> Result {
        let rig = Rig::new(2, false)?;
        rig.set_target(700);
        rig.settle();
        assert_eq!(rig.actual(), 700);
        rig.bound.device.answer_at_once(true);
        rig.sizing.empty();
        assert_eq!((rig.inside(), rig.actual()), (0, 0));
        Ok(())
    }

    #[test]
    fn a_closed_balloon_gives_no_page_out_and_recovery_frees_all() -> Result {
        let rig = Rig::new(4, false)?;
        let sizing = &rig.sizing;
        rig.set_target(300);
        rig.settle();
        sizing.freeze();
        let nodes = ShortNodes::all();
        for purpose in [Purpose::Resize, Purpose::Oom(&nodes)] {
            let request = sizing.traffic().take_reserved().ok_or(ENOENT)?;
            let sent = Traffic::send_out(&sizing.pages, request, 256, purpose);
            assert_eq!(sent, Err(SendError::Gone));
        }
        assert_eq!(sizing.give_back(0), 0);
        rig.bound.reset();
        sizing.recover();
        assert_eq!((sizing.pages.count(), rig.inside()), (0, 0));
        Ok(())
    }

    #[test]
    fn pages_that_others_release_are_not_counted_as_oom_deflation() -> Result {
        let rig = Rig::new(4, true)?;
        let sizing = &rig.sizing;
        rig.set_target(600);
        rig.settle();
        let nodes = ShortNodes::all();
        for purpose in [Purpose::Resize, Purpose::Oom(&nodes)] {
            let request = sizing.traffic().take_reserved().ok_or(ENOENT)?;
            let sent = Traffic::send_out(&sizing.pages, request, Guest::pfns(100), purpose);
            assert_eq!(sent, Ok(100));
        }
        assert_eq!(rig.counters.oom_deflated_pages.get(), 0);
        sizing.traffic().notify();
        assert!(rig.answer() && rig.answer());
        Traffic::collect(&sizing.pages);
        assert_eq!(sizing.traffic().released(), 200);
        assert_eq!(rig.counters.oom_deflated_pages.get(), Guest::pfns(100));
        Ok(())
    }

    /// Pages that another task frees in the meantime do not lead to an OOM kill.
    #[test]
    fn a_task_without_memory_gets_pages_although_no_node_is_short() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(300);
        rig.settle();
        assert!(rig.sizing.give_back_on(&ShortNodes::none(), 0) > 0);
        assert!(rig.inside() < 300);
        Ok(())
    }

    /// The task may be bound to a node without balloon pages.
    #[test]
    fn with_several_nodes_the_balloon_is_not_emptied_while_none_is_short() -> Result {
        let rig = Rig::new(4, false)?;
        assert!(rig.sizing.may_be_short(false));
        assert!(!rig.sizing.may_be_short(false));
        assert!(rig.sizing.may_be_short(true));
        Ok(())
    }

    /// OOM deflation is skipped, and inflation pauses: it would compete with the same task.
    #[test]
    fn a_task_that_has_got_hinted_blocks_needs_no_balloon_pages() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(300);
        rig.settle();
        let given = rig.sizing.give_back_on(&ShortNodes::all(), 4);
        if has_one_node() {
            assert_eq!((given, rig.inside()), (0, 300));
        } else {
            assert!(given > 0);
        }
        let before = rig.inside();
        rig.set_target(400);
        rig.settle();
        assert_eq!(rig.inside(), before);
        Ok(())
    }

    /// A task that migrates a page may reap the used buffer of the work item. No interrupt follows.
    #[test]
    fn an_answer_that_another_task_has_taken_is_noticed() -> Result {
        let rig = Rig::with_work(4, false)?;
        rig.set_target(200);
        rig.sizing.take_turn();
        assert!(rig.answer());
        Traffic::collect(&rig.sizing.pages);
        assert!(wait_for(|| rig.counters.balloon_pages.get() == 200));
        Ok(())
    }
}
