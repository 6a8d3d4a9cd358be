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
use super::request::{Guest, PageBuffer, Request};
use super::reserve::may_inflate;
use super::traffic::{Pages, Traffic, LOOK, REQUESTS};
use crate::mm::{state, BalloonPage, BalloonPages, OnOutOfMemory};
use crate::virtio::work::{self, impl_has_task, new_task, Run, Task, WorkQueue};
use crate::virtio::{Virtqueue, Wakeup};

/// After how many new requests the device is notified. Half of them: so there are always some to
/// fill.
const BATCH: usize = REQUESTS / 2;

/// How long to wait when memory is short: doubled each time, from the one to the other.
const RETRY_MIN: Msecs = 200;
const RETRY_MAX: Msecs = 3200;
/// How often at most a shortage of memory is worth a line in the log.
const COMPLAINT_INTERVAL: Delta = Delta::from_secs(5);
/// How long a device that must take all pages back may make no progress.
const PATIENCE: Delta = Delta::from_secs(2);

/// How many balloon pages a task that found no memory gets at a time: as many as from the kernel's
/// own balloon driver.
const RESCUE: u64 = 256;
/// How long such a task waits for the device's word, where it has to.
const RESCUE_PATIENCE: Delta = Delta::from_secs(2);
/// How long nothing is inflated after that.
const RESCUE_PAUSE: Delta = Delta::from_secs(10);
/// What part of the guest's memory must then be to be had before anything is.
const RESCUE_SHARE: usize = 16;

/// The event that keeps the system awake.
const ADJUST: u32 = 0;

const STEER: u64 = 1;
const RETRY: u64 = 2;

/// The balloon's size, and all that changes it.
#[pin_data]
pub(crate) struct Sizing {
    dev: ARef<device::Device>,
    config: BalloonConfig,
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

impl_has_task! {
    impl HasTask<1> for Sizing { self.steer }
    impl HasTask<2> for Sizing { self.retry }
}

impl Sizing {
    /// Makes an empty balloon. With `adjust_managed`, its pages do not count as the guest's memory.
    /// With `must_tell_host`, no page is used before the device has given it back.
    ///
    /// May sleep. Fails with `ENOMEM`.
    pub(crate) fn new(
        dev: ARef<device::Device>,
        config: BalloonConfig,
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
            must_tell_host,
            target_changed: AtomicFlag::new(true),
            emptying: AtomicFlag::new(false),
            rescued: AtomicFlag::new(false),
            in_vain_at: Atomic::new(u64::MAX),
            turn <- new_mutex!(turn, "Sizing::turn"),
            pages <- BalloonPages::new(adjust_managed, Traffic::new(counters.clone())?),
            wakeup,
            counters,
            steer <- new_task!(work_queue.clone(), "Sizing::steer"),
            retry <- new_task!(work_queue, "Sizing::retry"),
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
    /// May sleep: for as long as the device makes progress, and at most two seconds without. What
    /// it did not answer for stays where it is, for the reset to bring back. Needs no work item to
    /// run.
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
            } else if since.elapsed() > PATIENCE {
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
    }

    /// Ends all work for good. Nobody waits for the device any more, in any context. May sleep, but
    /// not for the device.
    pub(crate) fn disable(self: &Arc<Self>) {
        self.traffic().close();
        work::disable::<Self, RETRY>(self);
        work::disable::<Self, STEER>(self);
        self.wakeup.take_up(ADJUST);
        self.wakeup.rest();
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
        Ok(())
    }

    /// Sends requests towards the target for as long as there is room and memory.
    ///
    /// The target is looked at before each. `EAGAIN` if memory, or pages to take out, are not to be
    /// had now; any other error if the device is gone. Returns whether the target is reached.
    fn advance(&self, turn: &mut Turn) -> Result<bool> {
        let mut unnoticed = 0;
        let result = loop {
            if let Err(error) = self.read_target(turn) {
                break Err(error);
            }
            let step = self.traffic().next(turn.target);
            if matches!(step, Step::Wait | Step::Rest) {
                break Ok(step == Step::Rest);
            }
            if matches!(step, Step::Inflate(_)) && !self.may_inflate(turn) {
                break Err(EAGAIN);
            }
            let Some(request) = self.traffic().take_spare() else {
                break Ok(false);
            };
            let sent = match step {
                Step::Inflate(pfns) => self.send_in(turn, request, pfns),
                Step::Deflate(pfns) => {
                    Traffic::send_out(&self.pages, request, pfns, false).map(drop)
                }
                Step::Wait | Step::Rest => Ok(()),
            };
            if let Err(error) = sent {
                break Err(error);
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
        result
    }

    /// Whether the guest has memory to give.
    fn may_inflate(&self, turn: &mut Turn) -> bool {
        if self.rescued.xchg(false, Relaxed) {
            turn.rescued = Some(Instant::now());
        }
        if let Some(then) = turn.rescued {
            let enough = state::managed_pages() / RESCUE_SHARE;
            if then.elapsed() < RESCUE_PAUSE || state::obtainable_pages() < enough {
                return false;
            }
        }
        may_inflate()
    }

    /// Fills `request` with up to `pfns` new pages, and offers them to the device.
    fn send_in(&self, turn: &mut Turn, mut request: Request, pfns: u64) -> Result {
        let wanted = Guest::guest_pages(pfns).min(Guest::CAPACITY as u64);
        let mut result = Ok(());
        for _ in 0..wanted {
            let page = BalloonPage::alloc();
            if page.and_then(|page| request.push(page).ok()).is_none() {
                result = Err(EAGAIN);
                break;
            }
        }
        if self.rescued.load(Relaxed) {
            // Somebody found no memory meanwhile: now there is some.
            result = Err(EAGAIN);
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

    /// Tries again later, and says why once in a while.
    fn retry_later(self: &Arc<Self>, turn: &mut Turn) {
        self.counters.shortages.add(1);
        let may_complain = turn
            .complained
            .is_none_or(|then| then.elapsed() > COMPLAINT_INTERVAL);
        if may_complain && !self.emptying.load(Relaxed) {
            turn.complained = Some(Instant::now());
            dev_info!(
                self.dev,
                "Out of puff! {} of {} pages are in the balloon\n",
                self.traffic().balance().inside(),
                turn.target
            );
        }
        let delay: Jiffies = msecs_to_jiffies(turn.delay);
        turn.delay = (turn.delay * 2).min(RETRY_MAX);
        work::enqueue_delayed::<Self, RETRY>(self, delay);
    }

    /// Whether a task that found no memory has waited in vain already, and nothing has been answered
    /// since. `released` is how many pages were released so far.
    fn is_silent(&self, released: u64) -> bool {
        let balance = self.traffic().balance();
        balance.coming_out() > 0 && self.in_vain_at.load(Relaxed) == released
    }

    /// Takes some pages out. If the host need not agree, they are free then.
    fn take_out_for_rescue(&self) {
        let request = self
            .traffic()
            .take_reserved()
            .or_else(|| Traffic::wait(&self.pages, RESCUE_PATIENCE, Traffic::take_reserved));
        if let Some(request) = request {
            // If there is none to take out, there is none to give back.
            let _ = Traffic::send_out(&self.pages, request, RESCUE, !self.must_tell_host);
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
            Ok(true) => {
                turn.rescued = None;
                self.wakeup.rest();
            }
            Ok(false) => {}
            Err(error) if error == EAGAIN => {
                self.retry_later(&mut turn);
                self.wakeup.rest();
            }
            Err(_) => {
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
    fn give_back(self: &Arc<Self>) -> usize {
        let traffic = self.traffic();
        if traffic.is_closed() || self.emptying.load(Relaxed) {
            return 0;
        }
        self.rescued.store(true, Relaxed);
        let before = traffic.released();
        let freed = |traffic: &Traffic| {
            let freed = traffic.released().wrapping_sub(before) as usize;
            Some(freed).filter(|freed| *freed > 0)
        };
        Traffic::collect(&self.pages);
        if freed(traffic).is_none() && !self.is_silent(before) {
            self.take_out_for_rescue();
            if self.must_tell_host && traffic.balance().coming_out() > 0 {
                Traffic::wait(&self.pages, RESCUE_PATIENCE, freed);
            }
        }
        let freed = freed(traffic).unwrap_or(0);
        if freed == 0 {
            self.in_vain_at.store(before, Relaxed);
        } else {
            self.counters.oom_deflations.add(1);
            self.counters.oom_deflated_pages.add(Guest::pfns(freed));
        }
        // To tell the host of the new size.
        self.wake();
        freed
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

/// What comes after a delay: the work proper.
impl Run<2> for Sizing {
    fn run(this: Arc<Self>) {
        this.wake();
    }
}
