// SPDX-License-Identifier: GPL-2.0

//! The inflate and deflate queues, and the requests in flight on them.
//!
//! Three kinds of tasks share the queues: the resize worker, OOM deflation and
//! [page migration](self::page_migration). Each waiter reaps both virtqueues and completes every
//! used buffer, its own or not. So no waiter depends on another one, or on a work item that has to
//! run.

mod in_flight;
mod page_migration;
#[cfg(CONFIG_KUNIT = "y")]
mod tests_rig;

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, AtomicFlag, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::{Delta, Instant, Monotonic, Msecs};

use self::in_flight::{InFlight, PageMigration, MAX_PAGE_MIGRATIONS};
use super::counters::Counters;
use super::page_counts::{PageCounts, Step};
use super::page_geometry::GuestGeometry;
use super::request::{AnyRequest, PageBuffer, PageMigrationRequest, Request};
use crate::mm::{BalloonPages, NodesBelowWatermark};
use crate::shared_abi::queue::Queue;
use crate::virtio::{AddError, AddFailure, Virtqueue, WaitQueue};

/// The number of requests: the driver fills some while the device works on others.
pub(crate) const REQUESTS: usize = 16;
/// The number of requests that are reserved for OOM deflation.
const RESERVED: usize = 2;
/// The interval at which a waiter polls the queues if no interrupt arrives.
pub(crate) const WAIT_POLL_INTERVAL: Msecs = 50;

/// The number of ring entries that the resize worker leaves to OOM deflation and page migration. On
/// a small ring it leaves half.
const RESERVED_ENTRIES: usize = RESERVED + MAX_PAGE_MIGRATIONS;

/// The number of used buffers that a task has reaped, by what they were.
#[derive(Clone, Copy, Default)]
struct Reaped {
    /// Requests of the resize worker and of OOM deflation.
    requests: usize,
    page_migrations: usize,
}

impl Reaped {
    fn any(self) -> bool {
        self.requests + self.page_migrations > 0
    }
}

/// The reason why a request was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendError {
    /// The ring is full. The device has to use a buffer first.
    RingFull,
    /// Memory is short.
    NoMemory,
    /// The kernel has isolated the balloon's pages for page migration.
    Isolated,
    /// The queue is broken or has no ring, or the balloon is [closed](BalloonQueues::close).
    Gone,
}

impl From<AddFailure> for SendError {
    fn from(failure: AddFailure) -> Self {
        match failure {
            AddFailure::Full => Self::RingFull,
            AddFailure::NoMemory => Self::NoMemory,
            AddFailure::Broken | AddFailure::Gone | AddFailure::Malformed => Self::Gone,
        }
    }
}

/// The purpose of a deflation.
#[derive(Clone, Copy)]
pub(crate) enum Purpose<'a> {
    /// The host's target is smaller. The pages are freed when the device has used the request.
    Resize,
    /// OOM deflation, with pages on these nodes only. The pages are freed when the device has been
    /// notified; with `MUST_TELL_HOST`, when the device has used the request.
    Oom(&'a NodesBelowWatermark),
}

/// The resize worker, as the queues see it.
pub(crate) trait ResizeWorker: Send + Sync {
    /// Queues the worker, because another task has reaped its requests. Any context but NMI.
    fn requests_reaped(&self);
}

/// The pages in the balloon, and the queues of their requests.
pub(crate) type Pages = BalloonPages<BalloonQueues>;

/// The inflate and deflate queues, the requests in flight, and the page counts.
///
/// The lock `in_flight` protects the requests and the counts. Under it no task allocates with
/// reclaim, waits for the device or notifies the device. So OOM deflation and page migration, which
/// run within allocations, may take it. OOM deflation holds it while it searches the balloon for
/// pages on the short nodes.
#[pin_data]
pub(crate) struct BalloonQueues {
    inflate: Virtqueue<PageBuffer>,
    deflate: Virtqueue<PageBuffer>,
    counters: Arc<Counters>,
    /// Woken when the device may have used buffers, and when waits have to end.
    #[pin]
    pub(crate) wait_queue: WaitQueue,
    /// The number of tasks in [`wait`](Self::wait).
    waiting: Atomic<i32>,
    /// Whether new requests and waits fail.
    closed: AtomicFlag,
    /// Whether the guest may use a deflated page only after the device has used its request
    /// (`MUST_TELL_HOST`).
    must_tell_host: bool,
    /// The host's target in balloon pages.
    target: Atomic<u64>,
    /// `None` until the worker exists, and after it has ended. Taken within allocations, as
    /// `in_flight`.
    #[pin]
    worker: Mutex<Option<Arc<dyn ResizeWorker>>>,
    #[pin]
    in_flight: Mutex<InFlight>,
}

impl BalloonQueues {
    /// Creates queues with no request in flight.
    ///
    /// With `must_tell_host`, the guest uses a deflated page only after the device has used its
    /// request. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(counters: Arc<Counters>, must_tell_host: bool) -> Result<impl PinInit<Self>> {
        let mut spare = KVec::with_capacity(REQUESTS, GFP_KERNEL)?;
        for _ in 0..REQUESTS {
            spare.push(Request::new()?, GFP_KERNEL)?;
        }
        let [a, b, c, d, e, f, g, h] = [0, 1, 2, 3, 4, 5, 6, 7].map(PageMigrationRequest::new);
        let in_flight = InFlight {
            page_counts: PageCounts::default(),
            spare,
            page_migrations: [a?, b?, c?, d?, e?, f?, g?, h?].map(PageMigration::Idle),
            released: 0,
            used_buffers: 0,
            timed_out_at: None,
        };
        let (inflate, deflate) = (Virtqueue::new(c"inflate")?, Virtqueue::new(c"deflate")?);
        Ok(pin_init!(Self {
            inflate,
            deflate,
            counters,
            wait_queue <- WaitQueue::new(),
            waiting: Atomic::new(0),
            closed: AtomicFlag::new(false),
            must_tell_host,
            target: Atomic::new(0),
            worker <- new_mutex!(None, "BalloonQueues::worker"),
            in_flight <- new_mutex!(in_flight, "BalloonQueues::in_flight"),
        }))
    }

    /// Sets the resize worker. It usually has a reference to these queues, so `None` must follow.
    /// May sleep.
    pub(crate) fn set_worker(&self, worker: Option<Arc<dyn ResizeWorker>>) {
        let last = core::mem::replace(&mut *self.worker.lock(), worker);
        drop(last);
    }

    /// Returns the inflate queue.
    pub(crate) fn inflate_queue(&self) -> &Virtqueue<PageBuffer> {
        &self.inflate
    }

    /// Returns the deflate queue.
    pub(crate) fn deflate_queue(&self) -> &Virtqueue<PageBuffer> {
        &self.deflate
    }

    /// Returns the page counts.
    pub(crate) fn page_counts(&self) -> PageCounts {
        self.in_flight.lock().page_counts
    }

    /// Returns whether the balloon is empty and nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        let in_flight = self.in_flight.lock();
        in_flight.page_counts.is_empty()
            && in_flight
                .page_migrations
                .iter()
                .all(|it| matches!(it, PageMigration::Idle(_)))
    }

    /// Returns the number of guest pages that were deflated and freed since the driver was bound.
    pub(crate) fn released(&self) -> u64 {
        self.in_flight.lock().released
    }

    /// Sets the host's target in balloon pages. Page migration deflates instead of replacing a page
    /// while the balloon is larger.
    pub(crate) fn set_target(&self, pages: u64) {
        self.target.store(pages, Relaxed);
    }

    /// Returns the next step towards the target.
    pub(crate) fn next(&self) -> Step {
        self.in_flight
            .lock()
            .page_counts
            .next(self.target.load(Relaxed))
    }

    /// Returns whether a queue is broken or has no ring.
    pub(crate) fn is_broken(&self) -> bool {
        self.inflate.is_broken() || self.deflate.is_broken()
    }

    /// Makes new requests fail and ends all waits. Any context but NMI.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        self.wait_queue.wake_up_all();
    }

    /// Allows requests and waits again after [`close`](Self::close). Any context.
    pub(crate) fn open(&self) {
        self.closed.store(false, Relaxed);
    }

    /// Returns whether the balloon is [closed](Self::close). Any context.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Checks that the inflate queue has room for a request of the resize worker.
    pub(crate) fn room_to_inflate(&self) -> Result<(), SendError> {
        Self::room(&self.inflate)
    }

    /// Checks that the deflate queue has room for a request of the resize worker.
    pub(crate) fn room_to_deflate(&self) -> Result<(), SendError> {
        Self::room(&self.deflate)
    }

    fn room(queue: &Virtqueue<PageBuffer>) -> Result<(), SendError> {
        let reserved = RESERVED_ENTRIES.min(queue.entries() / 2);
        if queue.free_entries() > reserved {
            Ok(())
        } else if queue.is_broken() {
            Err(SendError::Gone)
        } else {
            Err(SendError::RingFull)
        }
    }

    /// Takes a spare request for the resize worker. Returns `None` if only the reserved ones are
    /// left.
    pub(crate) fn take_spare(&self) -> Option<Request> {
        let mut in_flight = self.in_flight.lock();
        (in_flight.spare.len() > RESERVED)
            .then(|| in_flight.spare.pop())
            .flatten()
    }

    /// Takes a spare or reserved request for OOM deflation. Returns `None` if no request is left or
    /// the deflate queue is full.
    pub(crate) fn take_reserved(&self) -> Option<Request> {
        let mut in_flight = self.in_flight.lock();
        (self.deflate.free_entries() > 0)
            .then(|| in_flight.spare.pop())
            .flatten()
    }

    /// Returns whether [`take_reserved`](Self::take_reserved) has a request now.
    pub(crate) fn has_reserved(&self) -> bool {
        !self.in_flight.lock().spare.is_empty() && self.deflate.free_entries() > 0
    }

    /// Frees the pages of `request` and puts it back among the spare requests.
    pub(crate) fn put(&self, mut request: Request) {
        drop(request.take());
        self.in_flight.lock().put(request);
    }

    /// Takes back the used buffers of both queues, completes their requests, and wakes the tasks
    /// that wait for them.
    pub(crate) fn reap_used(pages: &Pages) {
        if Self::reap(pages).any() {
            pages.migrator().wait_queue.wake_up_all();
        }
    }

    /// Takes back the used buffers of both queues and completes their requests.
    ///
    /// The kernel does not call the interrupt handler for a used buffer that was reaped before. So
    /// the caller wakes the tasks whose requests were among them.
    fn reap(pages: &Pages) -> Reaped {
        let this = pages.migrator();
        let mut reaped = Reaped::default();
        let mut in_flight = this.in_flight.lock();
        while let Some((buffer, _)) = this.inflate.get_buf() {
            in_flight.used_buffers = in_flight.used_buffers.wrapping_add(1);
            match AnyRequest::from(buffer) {
                AnyRequest::Request(mut request) => {
                    reaped.requests += 1;
                    this.counters.acknowledged(Queue::Inflate, request.pfns());
                    in_flight.page_counts.complete_inflate(request.pfns());
                    pages.enqueue(request.take());
                    in_flight.put(request);
                }
                AnyRequest::PageMigration(request) => {
                    reaped.page_migrations += 1;
                    let place = &mut in_flight.page_migrations[request.slot()];
                    *place = match place {
                        // No task waits to put the page into the balloon, so the device has to
                        // deflate it.
                        PageMigration::Abandoned => PageMigration::DeflatePending(request),
                        _ => PageMigration::Completed(request),
                    };
                }
            }
        }
        while let Some((buffer, _)) = this.deflate.get_buf() {
            in_flight.used_buffers = in_flight.used_buffers.wrapping_add(1);
            match AnyRequest::from(buffer) {
                AnyRequest::Request(mut request) => {
                    reaped.requests += 1;
                    this.counters.acknowledged(Queue::Deflate, request.pfns());
                    in_flight.page_counts.complete_deflate(request.pfns());
                    // The device has used the request, so the guest may use the pages now.
                    let for_oom = request.is_for_oom();
                    let released = in_flight.release(&mut request);
                    if for_oom {
                        this.counters
                            .oom_deflated_pages
                            .add(GuestGeometry::pfns(released));
                    }
                    in_flight.put(request);
                }
                AnyRequest::PageMigration(mut request) => {
                    reaped.page_migrations += 1;
                    let is_deflate = request.is_deflate();
                    let page = request.take();
                    if is_deflate {
                        this.counters
                            .acknowledged(Queue::Deflate, GuestGeometry::pfns(1));
                        in_flight
                            .page_counts
                            .complete_deflate(GuestGeometry::pfns(1));
                        in_flight.released += u64::from(page.is_some());
                    }
                    drop(page);
                    let place = &mut in_flight.page_migrations[request.slot()];
                    *place = match place {
                        PageMigration::Deflating | PageMigration::Abandoned => {
                            PageMigration::Idle(request)
                        }
                        _ => PageMigration::Completed(request),
                    };
                }
            }
        }
        this.send_pending_deflates(&mut in_flight);
        drop(in_flight);
        this.notify();
        reaped
    }

    /// Sends the page migration requests that are
    /// [`DeflatePending`](PageMigration::DeflatePending).
    fn send_pending_deflates(&self, in_flight: &mut InFlight) {
        for place in &mut in_flight.page_migrations {
            *place = match core::mem::replace(place, PageMigration::Abandoned) {
                PageMigration::DeflatePending(request) => {
                    match self.deflate.add(request.into_buffer()) {
                        Ok(()) => PageMigration::Abandoned,
                        Err(AddError { buffer, .. }) => match AnyRequest::from(buffer) {
                            AnyRequest::PageMigration(request) => {
                                PageMigration::DeflatePending(request)
                            }
                            AnyRequest::Request(_) => PageMigration::Abandoned,
                        },
                    }
                }
                other => other,
            };
        }
    }

    /// Sends `request` on the inflate queue. The caller notifies the device.
    ///
    /// On failure the pages are freed.
    pub(crate) fn send_inflate(&self, mut request: Request) -> Result<(), SendError> {
        let pfns = request.pfns();
        let mut in_flight = self.in_flight.lock();
        if self.is_closed() {
            drop(request.take());
            in_flight.put(request);
            return Err(SendError::Gone);
        }
        match self.inflate.add(request.into_buffer()) {
            Ok(()) => {
                in_flight.page_counts.send_inflate(pfns);
                self.counters.requested(Queue::Inflate, pfns);
                Ok(())
            }
            Err(AddError { buffer, failure }) => {
                if let AnyRequest::Request(mut request) = buffer.into() {
                    drop(request.take());
                    in_flight.put(request);
                }
                Err(failure.into())
            }
        }
    }

    /// Fills `request` with up to `pfns` balloon pages and sends it on the deflate queue. Returns
    /// the number of guest pages in it.
    ///
    /// For [`Purpose::Oom`] the number is 0 if no balloon page is on the short nodes. The caller
    /// notifies the device; for [`Purpose::Oom`] without `MUST_TELL_HOST` this function does. On
    /// failure the pages stay in the balloon.
    pub(crate) fn send_deflate(
        pages: &Pages,
        mut request: Request,
        pfns: u64,
        purpose: Purpose<'_>,
    ) -> Result<usize, SendError> {
        let this = pages.migrator();
        let mut in_flight = this.in_flight.lock();
        if this.is_closed() {
            // A failed `add` would put pages back into the balloon after `detach_unused` has freed
            // all.
            in_flight.put(request);
            return Err(SendError::Gone);
        }
        let pfns = pfns.min(in_flight.page_counts.inflated());
        let wanted = (GuestGeometry::guest_pages(pfns) as usize).min(GuestGeometry::CAPACITY);
        let mut out = match purpose {
            Purpose::Resize => pages.dequeue(wanted),
            Purpose::Oom(nodes) => match pages.dequeue_on(nodes, wanted) {
                Some(out) => out,
                None => {
                    in_flight.put(request);
                    return Ok(0);
                }
            },
        };
        let count = out.len();
        while let Some(page) = out.pop() {
            // Cannot fail: `wanted` is at most the capacity, and the page frame number fitted at
            // inflation.
            let _ = request.push(page);
        }
        if request.is_empty() {
            in_flight.put(request);
            return Err(SendError::Isolated);
        }
        let at_once = match purpose {
            Purpose::Resize => false,
            Purpose::Oom(_) => {
                request.set_for_oom();
                !this.must_tell_host
            }
        };
        let free = if at_once { request.take_unacked() } else { out };
        let pfns = request.pfns();
        match this.deflate.add(request.into_buffer()) {
            Ok(()) => {
                in_flight.page_counts.send_deflate(pfns);
                this.counters.requested(Queue::Deflate, pfns);
                in_flight.released += free.len() as u64;
                drop(in_flight);
                if at_once {
                    // The device is notified before the guest uses the pages.
                    this.notify();
                    this.counters
                        .oom_deflated_pages
                        .add(GuestGeometry::pfns(free.len()));
                }
                drop(free);
                Ok(count)
            }
            Err(AddError { buffer, failure }) => {
                pages.enqueue(free);
                if let AnyRequest::Request(mut request) = buffer.into() {
                    pages.enqueue(request.take());
                    in_flight.put(request);
                }
                Err(failure.into())
            }
        }
    }

    /// Notifies the device of all pending requests.
    pub(crate) fn notify(&self) {
        let virtqueues = [
            (Queue::Inflate, &self.inflate),
            (Queue::Deflate, &self.deflate),
        ];
        for (name, queue) in virtqueues {
            self.counters.kicked(name, queue.kick());
        }
    }

    /// Returns whether a task is in [`wait`](Self::wait). Any context.
    pub(crate) fn has_waiters(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }

    /// Enables the interrupts of both queues. Returns `false` if a queue has used buffers already;
    /// the caller has to reap them.
    pub(crate) fn enable_callbacks(&self) -> bool {
        // `&`, not `&&`: the interrupts of both queues must be enabled, whatever the first call
        // returns. A task in `wait` needs an interrupt for the next used buffer.
        if self.has_waiters() {
            self.inflate.enable_callback() & self.deflate.enable_callback()
        } else {
            self.inflate.enable_callback_delayed() & self.deflate.enable_callback_delayed()
        }
    }

    /// Wakes the tasks whose requests a waiting task has reaped: other waiting tasks and the resize
    /// worker.
    fn wake_others(&self, reaped: Reaped) {
        // A task that is missed here takes `in_flight` after `reap` has released it, and then finds
        // its request complete.
        let has_others = reaped.requests > 0 || self.waiting.load(Relaxed) > 1;
        if reaped.any() && has_others {
            self.wait_queue.wake_up_all();
        }
        if reaped.requests > 0 {
            if let Some(worker) = &*self.worker.lock() {
                worker.requests_reaped();
            }
        }
    }

    /// Waits until `done` returns `Some`, and reaps both virtqueues meanwhile.
    ///
    /// Returns `None` after `timeout`, or if a queue is broken or the balloon is
    /// [closed](Self::close). Sleeps uninterruptibly.
    pub(crate) fn wait<T>(
        pages: &Pages,
        timeout: Delta,
        mut done: impl FnMut(&Self) -> Option<T>,
    ) -> Option<T> {
        let this = pages.migrator();
        let since: Instant<Monotonic> = Instant::now();
        this.waiting.add(1, Relaxed);
        let result = loop {
            let seen = this.wait_queue.wakeups();
            this.wake_others(Self::reap(pages));
            if let Some(result) = done(this) {
                break Some(result);
            }
            if this.is_closed() || this.is_broken() || since.elapsed() > timeout {
                break None;
            }
            if this.enable_callbacks() {
                this.wait_queue.wait_timeout(seen, WAIT_POLL_INTERVAL);
            }
        };
        this.waiting.add(-1, Relaxed);
        result
    }

    /// Recovers all requests after the device reset, and frees all pages: those in the balloon and
    /// those in flight.
    ///
    /// The balloon must be [closed](Self::close). May sleep.
    pub(crate) fn detach_unused(pages: &Pages) {
        let this = pages.migrator();
        let mut in_flight = this.in_flight.lock();
        while let Some(buffer) = this
            .inflate
            .detach_unused_buf()
            .or_else(|| this.deflate.detach_unused_buf())
        {
            match AnyRequest::from(buffer) {
                AnyRequest::Request(mut request) => {
                    drop(request.take());
                    in_flight.put(request);
                }
                AnyRequest::PageMigration(mut request) => {
                    drop(request.take());
                    let place = &mut in_flight.page_migrations[request.slot()];
                    *place = match place {
                        PageMigration::Deflating | PageMigration::Abandoned => {
                            PageMigration::Idle(request)
                        }
                        _ => PageMigration::Detached(request),
                    };
                }
            }
        }
        drop(in_flight);
        this.wait_queue.wake_up_all();
        // Waits for page migrations in progress.
        pages.drain();
        let mut in_flight = this.in_flight.lock();
        for place in &mut in_flight.page_migrations {
            *place = match core::mem::replace(place, PageMigration::Abandoned) {
                PageMigration::DeflatePending(mut request) => {
                    drop(request.take());
                    PageMigration::Idle(request)
                }
                other => other,
            };
        }
        in_flight.page_counts = PageCounts::default();
    }
}

#[kunit_tests(virtio_balloon_rs_balloon_queues)]
mod tests {
    use super::tests_rig::*;
    use super::*;
    use crate::mm::Migrated;
    use crate::virtio::kunit_device::CountingHandler;

    fn oom(nodes: &NodesBelowWatermark) -> Purpose<'_> {
        Purpose::Oom(nodes)
    }

    #[test]
    fn pages_go_in_and_come_out_when_the_device_says_so() -> Result {
        let (bound, pages) = balloon()?;
        let queues = pages.migrator();
        inflate(&bound, &pages, 5)?;
        let request = queues.take_spare().ok_or(ENOENT)?;
        let sent =
            BalloonQueues::send_deflate(&pages, request, GuestGeometry::pfns(3), Purpose::Resize)?;
        assert_eq!((sent, queues.released()), (3, 0));
        assert_eq!(queues.page_counts().actual(), GuestGeometry::pfns(5));
        assert!(bound.device.use_buffer(DEFLATE).is_some());
        BalloonQueues::reap_used(&pages);
        assert_eq!(queues.released(), 3);
        assert_eq!(queues.page_counts().actual(), GuestGeometry::pfns(2));
        Ok(())
    }

    #[test]
    fn pages_that_need_no_answer_are_free_at_once() -> Result {
        let (bound, pages) = balloon_of(false)?;
        let queues = pages.migrator();
        inflate(&bound, &pages, 4)?;
        let request = queues.take_reserved().ok_or(ENOENT)?;
        let notifications = bound.device.notifications();
        let nodes = NodesBelowWatermark::all();
        let sent = BalloonQueues::send_deflate(&pages, request, u64::MAX, oom(&nodes));
        assert_eq!(sent, Ok(4));
        assert_eq!(queues.released(), 4);
        // The device was notified first.
        assert_eq!(bound.device.notifications(), notifications + 1);
        assert!(!queues.is_idle());
        assert!(bound.device.use_buffer(DEFLATE).is_some());
        BalloonQueues::reap_used(&pages);
        assert_eq!(queues.released(), 4);
        assert!(queues.is_idle());
        Ok(())
    }

    #[test]
    fn what_a_full_ring_does_not_take_stays_in_the_balloon() -> Result {
        let (bound, pages) = balloon()?;
        let queues = pages.migrator();
        inflate(&bound, &pages, 6)?;
        for _ in 0..queues.deflate_queue().entries() {
            let request = queues.take_spare().ok_or(ENOENT)?;
            BalloonQueues::send_deflate(&pages, request, GuestGeometry::pfns(1), Purpose::Resize)?;
        }
        let inflated = queues.page_counts();
        let nodes = NodesBelowWatermark::all();
        for purpose in [Purpose::Resize, oom(&nodes)] {
            let request = queues.take_spare().ok_or(ENOENT)?;
            let sent =
                BalloonQueues::send_deflate(&pages, request, GuestGeometry::pfns(1), purpose);
            assert_eq!(sent, Err(SendError::RingFull));
            assert_eq!((queues.page_counts(), queues.released()), (inflated, 0));
        }
        assert_eq!(GuestGeometry::pfns(pages.count()), inflated.inflated());
        Ok(())
    }

    #[test]
    fn the_last_requests_are_left_to_those_without_memory() -> Result {
        let (_bound, pages) = balloon()?;
        let queues = pages.migrator();
        let mut taken = KVec::with_capacity(REQUESTS, GFP_KERNEL)?;
        while let Some(request) = queues.take_spare() {
            taken.push(request, GFP_KERNEL)?;
        }
        assert_eq!(taken.len(), REQUESTS - RESERVED);
        for _ in 0..RESERVED {
            taken.push(queues.take_reserved().ok_or(ENOENT)?, GFP_KERNEL)?;
        }
        assert!(queues.take_reserved().is_none());
        for request in taken {
            queues.put(request);
        }
        assert!(queues.take_spare().is_some());
        Ok(())
    }

    #[test]
    fn after_a_reset_nothing_is_missing_and_all_begins_anew() -> Result {
        let (bound, pages) = balloon()?;
        let queues = pages.migrator();
        inflate(&bound, &pages, 3)?;
        let (request, _) = request(queues, 2)?;
        queues.send_inflate(request)?;
        let request = queues.take_spare().ok_or(ENOENT)?;
        BalloonQueues::send_deflate(&pages, request, GuestGeometry::pfns(1), Purpose::Resize)?;
        let (new, old) = two_pages()?;
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));

        queues.close();
        bound.reset();
        BalloonQueues::detach_unused(&pages);
        assert!(queues.is_idle());
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));
        let in_flight = queues.in_flight.lock();
        assert_eq!(in_flight.spare.len(), REQUESTS);
        drop(in_flight);

        let virtqueues: [&dyn crate::virtio::AnyQueue; 2] =
            [queues.inflate_queue(), queues.deflate_queue()];
        bound.find_queues(&virtqueues, CountingHandler::new()?)?;
        queues.open();
        inflate(&bound, &pages, 3)?;
        bound.device.set_use_on_notify(true);
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Ok(Migrated::Replaced));
        Ok(())
    }

    #[test]
    fn whoever_reaps_a_request_wakes_the_tasks_that_wait() -> Result {
        let (bound, pages) = balloon()?;
        let queues = pages.migrator();
        let before = queues.wait_queue.wakeups();
        BalloonQueues::reap_used(&pages);
        assert_eq!(queues.wait_queue.wakeups(), before);
        inflate(&bound, &pages, 1)?;
        assert_eq!(queues.wait_queue.wakeups(), before + 1);
        Ok(())
    }

    struct CountingWorker(Atomic<i32>);

    impl ResizeWorker for CountingWorker {
        fn requests_reaped(&self) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    /// No interrupt follows for a request that was reaped before.
    #[test]
    fn a_waiting_task_that_reaps_requests_of_the_worker_wakes_it() -> Result {
        let (bound, pages) = balloon()?;
        let queues = pages.migrator();
        let worker = Arc::new(CountingWorker(Atomic::new(0)), GFP_KERNEL)?;
        queues.set_worker(Some(worker.clone()));
        let (full, _) = request(queues, 1)?;
        queues.send_inflate(full)?;
        assert!(bound.device.use_buffer(INFLATE).is_some());
        let waited = BalloonQueues::wait(&pages, Delta::from_secs(60), |this| {
            (this.page_counts().inflated() > 0).then_some(())
        });
        assert_eq!(waited, Some(()));
        assert_eq!(worker.0.load(Relaxed), 1);
        // A page migration is of no interest to the worker.
        bound.device.set_use_on_notify(true);
        let (new, old) = two_pages()?;
        assert_eq!(migrate(&pages, &new, &old), Ok(Migrated::Replaced));
        assert_eq!(worker.0.load(Relaxed), 1);
        queues.set_worker(None);
        Ok(())
    }

    #[test]
    fn a_wait_ends_when_the_ring_breaks_or_this_is_closed() -> Result {
        let (bound, pages) = balloon()?;
        let queues = pages.migrator();
        let since: Instant<Monotonic> = Instant::now();
        let long = Delta::from_secs(60);
        let (request, _) = request(queues, 1)?;
        queues.send_inflate(request)?;
        bound.device.add_used(INFLATE, 1000, 0);
        assert_eq!(BalloonQueues::wait(&pages, long, |_| None::<()>), None);
        assert!(queues.is_broken());
        let (_bound, pages) = balloon()?;
        pages.migrator().close();
        assert_eq!(BalloonQueues::wait(&pages, long, |_| None::<()>), None);
        assert!(since.elapsed() < long);
        Ok(())
    }
}
