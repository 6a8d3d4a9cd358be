// SPDX-License-Identifier: GPL-2.0

//! Inflating and deflating towards the host's target.
//!
//! One work item does it. It never waits for the device: it collects what the device has used,
//! sends what there is room for, and returns; the device's interrupt starts it again. So it can be
//! stopped at any time, whatever the device does.

use kernel::prelude::*;
use kernel::sync::atomic::{AtomicFlag, Relaxed};
use kernel::sync::{aref::ARef, new_condvar, new_mutex, Arc, CondVar, CondVarTimeoutResult, Mutex};
use kernel::time::{msecs_to_jiffies, Delta, Instant, Jiffies, Monotonic, Msecs};
use kernel::workqueue::{
    impl_has_delayed_work, impl_has_work, new_delayed_work, new_work, DelayedWork, Work, WorkItem,
};
use kernel::{dev_info, dev_warn, device};

use super::balance::{Balance, Step};
use super::config::BalloonConfig;
use super::counters::Counters;
use super::request::{guest_pages, Request, RequestBuffer};
use super::reserve::may_inflate;
use crate::mm::{BalloonPage, BalloonPages};
use crate::shared_abi::queue::Queue;
use crate::virtio::work::{self, WorkQueue};
use crate::virtio::{AddError, Virtqueue};

/// How many requests there are. The next ones are filled while the device works on the last.
const REQUESTS: usize = 16;
/// After how many new requests the device is notified. Half of them: so there are always some to
/// fill.
const BATCH: usize = REQUESTS / 2;

/// How long to wait when memory is short: doubled each time, from the one to the other.
const RETRY_MIN: Msecs = 200;
const RETRY_MAX: Msecs = 3200;
/// How often at most a shortage of memory is worth a line in the log.
const COMPLAINT_INTERVAL: Delta = Delta::from_secs(5);
/// How long a device that must take all pages back may make no progress.
const PATIENCE: Msecs = 2000;

const STEER: u64 = 1;
const RETRY: u64 = 2;

/// The balloon's size, and all that changes it.
#[pin_data]
pub(crate) struct Sizing {
    dev: ARef<device::Device>,
    config: BalloonConfig,
    inflate: Virtqueue<RequestBuffer>,
    deflate: Virtqueue<RequestBuffer>,
    /// The host may have changed its target since it was read.
    target_changed: AtomicFlag,
    /// The driver goes: the target is an empty balloon, whatever the host wants.
    emptying: AtomicFlag,
    #[pin]
    state: Mutex<State>,
    /// Notified when pages have come out while the balloon is being emptied.
    #[pin]
    progress: CondVar,
    #[pin]
    pages: BalloonPages,
    work_queue: Arc<WorkQueue>,
    counters: Arc<Counters>,
    #[pin]
    steer: Work<Self, STEER>,
    #[pin]
    retry: DelayedWork<Self, RETRY>,
}

struct State {
    balance: Balance,
    target: u64,
    /// What the host was last told about the balloon's size.
    reported: u64,
    /// The requests that are not in flight. Has room for all.
    spare: KVec<Request>,
    delay: Msecs,
    complained: Option<Instant<Monotonic>>,
}

impl_has_work! {
    impl HasWork<Self, 1> for Sizing { self.steer }
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self, 2> for Sizing { self.retry }
}

impl Sizing {
    /// Makes an empty balloon. With `adjust_managed`, its pages do not count as the guest's memory.
    ///
    /// May sleep. Fails with `ENOMEM`.
    pub(crate) fn new(
        dev: ARef<device::Device>,
        config: BalloonConfig,
        work_queue: Arc<WorkQueue>,
        counters: Arc<Counters>,
        adjust_managed: bool,
    ) -> Result<Arc<Self>> {
        let mut spare = KVec::with_capacity(REQUESTS, GFP_KERNEL)?;
        for _ in 0..REQUESTS {
            spare.push(Request::new()?, GFP_KERNEL)?;
        }
        let state = State {
            balance: Balance::default(),
            target: 0,
            reported: 0,
            spare,
            delay: RETRY_MIN,
            complained: None,
        };
        let sizing = try_pin_init!(Self {
            dev,
            config,
            inflate: Virtqueue::new(c"inflate")?,
            deflate: Virtqueue::new(c"deflate")?,
            target_changed: AtomicFlag::new(true),
            emptying: AtomicFlag::new(false),
            state <- new_mutex!(state, "Sizing::state"),
            progress <- new_condvar!("Sizing::progress"),
            pages <- BalloonPages::new(adjust_managed),
            work_queue,
            counters,
            steer <- new_work!("Sizing::steer"),
            retry <- new_delayed_work!("Sizing::retry"),
        });
        Arc::pin_init(sizing, GFP_KERNEL)
    }

    /// The queue of pages that go into the balloon.
    pub(crate) fn inflate_queue(&self) -> &Virtqueue<RequestBuffer> {
        &self.inflate
    }

    /// The queue of pages that come out of the balloon.
    pub(crate) fn deflate_queue(&self) -> &Virtqueue<RequestBuffer> {
        &self.deflate
    }

    /// The host may have a new target. Any context.
    pub(crate) fn target_changed(self: &Arc<Self>) {
        self.target_changed.store(true, Relaxed);
        self.wake();
    }

    /// The device has used requests. Any context.
    pub(crate) fn used(self: &Arc<Self>) {
        self.wake();
    }

    /// Starts the work, unless it is queued already or disabled.
    fn wake(self: &Arc<Self>) {
        let _ = self.work_queue.enqueue::<Arc<Self>, STEER>(self.clone());
    }

    /// Takes all pages out of the balloon and tells the host, as long as it answers.
    ///
    /// May sleep: for as long as the device makes progress, and at most two seconds without. What
    /// it did not answer for stays where it is, for the reset to bring back.
    pub(crate) fn empty(self: &Arc<Self>) {
        self.emptying.store(true, Relaxed);
        let patience = msecs_to_jiffies(PATIENCE);
        let mut state = self.state.lock();
        let mut last = state.balance;
        while !state.balance.is_empty() && !self.is_broken() {
            // Under the lock, so that the answer cannot come before the wait.
            self.wake();
            match self
                .progress
                .wait_interruptible_timeout(&mut state, patience)
            {
                CondVarTimeoutResult::Woken { .. } => {}
                CondVarTimeoutResult::Signal { .. } => break,
                CondVarTimeoutResult::Timeout if state.balance == last => {
                    dev_warn!(
                        self.dev,
                        "the host does not take its pages back; resetting it\n"
                    );
                    break;
                }
                CondVarTimeoutResult::Timeout => {}
            }
            last = state.balance;
        }
    }

    /// Ends all work for good. May sleep.
    pub(crate) fn disable(self: &Arc<Self>) {
        work::disable_delayed::<Self, RETRY>(self);
        work::disable::<Self, STEER>(self);
    }

    fn is_broken(&self) -> bool {
        self.inflate.is_broken() || self.deflate.is_broken()
    }

    /// Takes back the requests that the device has used, and does what they were for.
    fn collect(&self, state: &mut State) {
        while let Some((buffer, _)) = self.inflate.pop() {
            let mut request = Request::from_buffer(buffer);
            state.balance.arrived(request.pfns());
            self.pages.enqueue(request.take());
            state.put(request);
        }
        while let Some((buffer, _)) = self.deflate.pop() {
            let mut request = Request::from_buffer(buffer);
            state.balance.left(request.pfns());
            // The device has let go of the pages: only now are they the guest's again.
            drop(request.take());
            state.put(request);
        }
    }

    /// Tells the host the balloon's size, if it does not know it.
    fn report(&self, state: &mut State) {
        let inside = state.balance.inside();
        self.counters.balloon_pages.set(inside);
        if inside != state.reported && self.config.set_actual(inside).is_ok() {
            state.reported = inside;
        }
    }

    /// Reads the host's target, if it may have changed.
    fn read_target(&self, state: &mut State) -> Result {
        if self.emptying.load(Relaxed) {
            state.target = 0;
        } else if self.target_changed.xchg(false, Relaxed) {
            state.target = self.config.target()?;
            self.counters.target_pages.set(state.target);
            state.delay = RETRY_MIN;
        }
        Ok(())
    }

    /// Sends requests towards the target for as long as there is room and memory.
    ///
    /// The target is looked at before each. `EAGAIN` if memory, or pages to take out, are not to be
    /// had now; any other error if the device is gone.
    fn advance(&self, state: &mut State) -> Result {
        let mut unnoticed = 0;
        let result = loop {
            if let Err(error) = self.read_target(state) {
                break Err(error);
            }
            let step = state.balance.next(state.target);
            if matches!(step, Step::Wait | Step::Rest) {
                break Ok(());
            }
            let Some(request) = state.spare.pop() else {
                break Ok(());
            };
            let sent = match step {
                Step::Inflate(pfns) => self.send_in(state, request, pfns),
                Step::Deflate(pfns) => self.send_out(state, request, pfns),
                Step::Wait | Step::Rest => Ok(()),
            };
            if sent.is_err() {
                break sent;
            }
            unnoticed += 1;
            if unnoticed == BATCH {
                self.notify();
                unnoticed = 0;
            }
        };
        // Also after an error: a request that memory was too short to fill has been sent all the
        // same.
        self.notify();
        result
    }

    /// Fills `request` with up to `pfns` new pages, and offers them to the device.
    fn send_in(&self, state: &mut State, mut request: Request, pfns: u64) -> Result {
        let wanted = guest_pages(pfns).min(Request::capacity() as u64);
        let mut result = Ok(());
        if !may_inflate() {
            state.put(request);
            return Err(EAGAIN);
        }
        for _ in 0..wanted {
            let page = BalloonPage::alloc();
            if page.and_then(|page| request.push(page).ok()).is_none() {
                result = Err(EAGAIN);
                break;
            }
        }
        if request.is_empty() {
            state.put(request);
            return result;
        }
        let pfns = request.pfns();
        if let Err(AddError { buffer, failure }) = self.inflate.add(request.into_buffer()) {
            state.take_back(buffer, drop);
            return Err(failure.into());
        }
        self.counters.inflate_requests.add(1);
        state.balance.send_in(pfns);
        if result.is_ok() {
            state.delay = RETRY_MIN;
        }
        result
    }

    /// Fills `request` with up to `pfns` pages from the balloon, and asks the device for them.
    fn send_out(&self, state: &mut State, mut request: Request, pfns: u64) -> Result {
        let wanted = guest_pages(pfns).min(Request::capacity() as u64);
        let mut pages = self.pages.dequeue(wanted as usize);
        while let Some(page) = pages.pop() {
            // There is room, and the number did fit on the way in.
            let _ = request.push(page);
        }
        if request.is_empty() {
            state.put(request);
            // All pages are isolated for compaction, from which they come back soon.
            return Err(EAGAIN);
        }
        let pfns = request.pfns();
        if let Err(AddError { buffer, failure }) = self.deflate.add(request.into_buffer()) {
            state.take_back(buffer, |pages| self.pages.enqueue(pages));
            return Err(failure.into());
        }
        self.counters.deflate_requests.add(1);
        state.balance.send_out(pfns);
        Ok(())
    }

    /// Lets the device know of all requests.
    fn notify(&self) {
        self.counters.kicked(Queue::Inflate, self.inflate.kick());
        self.counters.kicked(Queue::Deflate, self.deflate.kick());
    }

    /// Tries again later, and says why once in a while.
    fn retry_later(self: &Arc<Self>, state: &mut State) {
        self.counters.shortages.add(1);
        let may_complain = state
            .complained
            .is_none_or(|then| then.elapsed() > COMPLAINT_INTERVAL);
        if may_complain && state.balance.next(state.target) != Step::Rest {
            state.complained = Some(Instant::now());
            dev_info!(
                self.dev,
                "Out of puff! {} of {} pages are in the balloon\n",
                state.balance.inside(),
                state.target
            );
        }
        let delay: Jiffies = msecs_to_jiffies(state.delay);
        state.delay = (state.delay * 2).min(RETRY_MAX);
        let _ = self
            .work_queue
            .enqueue_delayed::<Arc<Self>, RETRY>(self.clone(), delay);
    }
}

impl State {
    /// Puts a request that is not in flight away, for the next use.
    fn put(&mut self, request: Request) {
        // Its room is still there: requests are only ever taken and put back.
        let _ = self.spare.push_within_capacity(request);
    }

    /// Puts away a request that the queue did not take, after `undo` has seen to its pages.
    fn take_back(
        &mut self,
        buffer: RequestBuffer,
        undo: impl FnOnce(crate::mm::BlockList<BalloonPage>),
    ) {
        let mut request = Request::from_buffer(buffer);
        undo(request.take());
        self.put(request);
    }
}

/// The work proper.
impl WorkItem<1> for Sizing {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let mut state = this.state.lock();
        loop {
            this.collect(&mut state);
            this.report(&mut state);
            match this.advance(&mut state) {
                Ok(()) => {}
                Err(error) if error == EAGAIN => this.retry_later(&mut state),
                Err(_) => break,
            }
            // Both, lest an interrupt is lost: the one may be asked for while the other is late.
            let quiet = this.inflate.enable_callback_delayed();
            if this.deflate.enable_callback_delayed() && quiet {
                break;
            }
        }
        if this.emptying.load(Relaxed) {
            this.progress.notify_all();
        }
    }
}

/// What comes after a delay: the work proper.
impl WorkItem<2> for Sizing {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.wake();
    }
}
