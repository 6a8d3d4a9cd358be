// SPDX-License-Identifier: GPL-2.0

//! The inflate and deflate queues, and the requests in flight on them.
//!
//! Three kinds of tasks share the queues: the resize worker, OOM deflation and page migration. Each
//! waiter reaps both virtqueues and completes every used buffer, its own or not. So no waiter
//! depends on another one, or on a work item that has to run.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, AtomicFlag, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::{Delta, Instant, Monotonic, Msecs};

use super::counters::Counters;
use super::page_counts::{PageCounts, Step};
use super::request::{AnyRequest, GuestGeometry, PageBuffer, PageMigrationRequest, Request};
use super::timeout;
use crate::mm::{BalloonPages, MigrateMode, MigratePages, Migrated, NodesBelowWatermark, PageRef};
use crate::shared_abi::queue::Queue;
use crate::virtio::{AddError, AddFailure, Virtqueue, WaitQueue};

/// The number of requests: the driver fills some while the device works on others.
pub(crate) const REQUESTS: usize = 16;
/// The number of requests that are reserved for OOM deflation.
const RESERVED: usize = 2;
/// The number of page migrations that can be in flight.
const MAX_PAGE_MIGRATIONS: usize = 8;
/// The interval at which a waiter polls the queues if no interrupt arrives.
pub(crate) const WAIT_POLL_INTERVAL: Msecs = 50;

/// The number of ring entries that the resize worker leaves to OOM deflation and page migration. On
/// a small ring it leaves half.
const RESERVED_ENTRIES: usize = RESERVED + MAX_PAGE_MIGRATIONS;

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
    #[pin]
    in_flight: Mutex<InFlight>,
}

struct InFlight {
    page_counts: PageCounts,
    /// The requests that are not in flight. Has capacity for all.
    spare: KVec<Request>,
    page_migrations: [PageMigration; MAX_PAGE_MIGRATIONS],
    /// The number of guest pages that were deflated and freed since the driver was bound.
    released: u64,
    /// The number of used buffers since the driver was bound. Wraps.
    used_buffers: u64,
    /// The value of `used_buffers` when a page migration last timed out before it was sent.
    timed_out_at: Option<u64>,
}

/// The state of a page migration request.
enum PageMigration {
    /// Not in use.
    Idle(PageMigrationRequest),
    /// In flight, or owned by the task that migrates the page.
    InFlight,
    /// Used by the device, and kept for the task that waits.
    Completed(PageMigrationRequest),
    /// In flight on the deflate queue. The guest already has the page back, and no task waits.
    Deflating,
    /// In flight and overdue. No task waits.
    Abandoned,
    /// Not sent: the device must deflate the page, but the deflate queue has not accepted the
    /// request yet.
    DeflatePending(PageMigrationRequest),
    /// Recovered after the device reset, and kept for the task that waits.
    Detached(PageMigrationRequest),
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
            in_flight <- new_mutex!(in_flight, "BalloonQueues::in_flight"),
        }))
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

    /// Frees the pages of `request` and puts it back among the spare requests.
    pub(crate) fn put(&self, mut request: Request) {
        drop(request.take());
        self.in_flight.lock().put(request);
    }

    /// Takes back the used buffers of both queues and completes their requests.
    pub(crate) fn reap_used(pages: &Pages) {
        let this = pages.migrator();
        let mut in_flight = this.in_flight.lock();
        while let Some((buffer, _)) = this.inflate.get_buf() {
            in_flight.used_buffers = in_flight.used_buffers.wrapping_add(1);
            match AnyRequest::from(buffer) {
                AnyRequest::Request(mut request) => {
                    this.counters.acknowledged(Queue::Inflate, request.pfns());
                    in_flight.page_counts.complete_inflate(request.pfns());
                    pages.enqueue(request.take());
                    in_flight.put(request);
                }
                AnyRequest::PageMigration(request) => {
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

    /// Enables the interrupts of both queues. Returns `false` if a queue has used buffers already;
    /// the caller has to reap them.
    pub(crate) fn enable_callbacks(&self) -> bool {
        // `&`, not `&&`: the interrupts of both queues must be enabled, whatever the first call
        // returns. A task in `wait` needs an interrupt for the next used buffer.
        if self.waiting.load(Relaxed) > 0 {
            self.inflate.enable_callback() & self.deflate.enable_callback()
        } else {
            self.inflate.enable_callback_delayed() & self.deflate.enable_callback_delayed()
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
            Self::reap_used(pages);
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

    /// Waits until the device has used the request in `slot`, and returns the request.
    ///
    /// Returns `None` if the wait times out or the request was recovered after a device reset.
    fn wait_page_migration(pages: &Pages, slot: usize) -> Option<PageMigrationRequest> {
        let back = Self::wait(pages, timeout::page_migration(), |this| {
            let mut in_flight = this.in_flight.lock();
            match core::mem::replace(
                &mut in_flight.page_migrations[slot],
                PageMigration::InFlight,
            ) {
                PageMigration::Completed(request) => Some(Some(request)),
                PageMigration::Detached(request) => {
                    in_flight.page_migrations[slot] = PageMigration::Idle(request);
                    Some(None)
                }
                other => {
                    in_flight.page_migrations[slot] = other;
                    None
                }
            }
        });
        if let Some(back) = back {
            return back;
        }
        let this = pages.migrator();
        let mut in_flight = this.in_flight.lock();
        match core::mem::replace(
            &mut in_flight.page_migrations[slot],
            PageMigration::Abandoned,
        ) {
            // The device used the request after the wait ended.
            PageMigration::Completed(request) => {
                in_flight.page_migrations[slot] = PageMigration::InFlight;
                Some(request)
            }
            PageMigration::Detached(request) => {
                in_flight.page_migrations[slot] = PageMigration::Idle(request);
                None
            }
            _ => None,
        }
    }

    /// Tells the device that `old` has left the balloon. With `MUST_TELL_HOST`, waits until the
    /// device has used the request.
    ///
    /// The request keeps its reference to the page until the device is notified; with
    /// `MUST_TELL_HOST`, until the device has used the request.
    fn deflate_old_page(pages: &Pages, mut request: PageMigrationRequest, old: PageRef) {
        let slot = request.slot();
        // Cannot fail: the page frame number fitted at inflation.
        let _ = request.set(old);
        let (mut unsent, mut free) = (Some(request), None);
        let sent = Self::wait(pages, timeout::page_migration(), |this| {
            this.send_old(&mut unsent, &mut free)
        });
        let this = pages.migrator();
        if let Some(request) = unsent {
            // The ring stayed full, or is broken. `reap_used` sends the request when the ring has
            // room; after a reset, `detach_unused` frees the page.
            this.in_flight.lock().page_migrations[slot] = PageMigration::DeflatePending(request);
        }
        if sent != Some(true) {
            return;
        }
        this.notify();
        // The device is notified, so the guest may use the page.
        drop(free);
        if this.must_tell_host {
            if let Some(request) = Self::wait_page_migration(pages, slot) {
                this.in_flight.lock().page_migrations[slot] = PageMigration::Idle(request);
            }
        }
    }

    /// Sends `request` on the deflate queue and sets it to `None`.
    ///
    /// Without `MUST_TELL_HOST`, moves the page from the request to `free`. Returns `None` if the
    /// ring is full, otherwise whether the request was sent. An unsent request is put back with its
    /// page, unless the queue has no ring.
    fn send_old(
        &self,
        request: &mut Option<PageMigrationRequest>,
        free: &mut Option<PageRef>,
    ) -> Option<bool> {
        let mut in_flight = self.in_flight.lock();
        let mut taken = request.take()?;
        let slot = taken.slot();
        if !self.must_tell_host {
            *free = taken.take_unacked();
        }
        let Err(AddError { buffer, failure }) = self.deflate.add(taken.into_buffer()) else {
            if !self.must_tell_host {
                in_flight.page_migrations[slot] = PageMigration::Deflating;
            }
            return Some(true);
        };
        let AnyRequest::PageMigration(mut taken) = buffer.into() else {
            return Some(false);
        };
        if failure == AddFailure::Gone {
            // After a reset the device has no page.
            drop((free.take(), taken.take()));
            in_flight.page_migrations[slot] = PageMigration::Idle(taken);
            return Some(false);
        }
        if let Some(page) = free.take() {
            // Cannot fail: the page frame number fitted before.
            let _ = taken.set(page);
        }
        *request = Some(taken);
        match SendError::from(failure) {
            SendError::Gone => Some(false),
            _ => None,
        }
    }
}

impl InFlight {
    fn put(&mut self, request: Request) {
        // Cannot fail: `spare` has capacity for all requests.
        let _ = self.spare.push_within_capacity(request);
    }

    /// Frees the pages of a completed request. Returns the number of guest pages: 0 if they were
    /// freed when the request was sent.
    fn release(&mut self, request: &mut Request) -> usize {
        let pages = request.take();
        self.released += pages.len() as u64;
        pages.len()
    }

    /// Takes an idle page migration request. Returns `None` if all are in use.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if a request is overdue: the device gets no further request until it has used that
    /// one.
    fn take_page_migration(&mut self) -> Result<Option<PageMigrationRequest>> {
        let overdue = |place: &PageMigration| {
            matches!(
                place,
                PageMigration::Abandoned | PageMigration::DeflatePending(_)
            )
        };
        if self.page_migrations.iter().any(overdue) {
            return Err(EBUSY);
        }
        for place in &mut self.page_migrations {
            match core::mem::replace(place, PageMigration::InFlight) {
                PageMigration::Idle(request) => return Ok(Some(request)),
                other => *place = other,
            }
        }
        Ok(None)
    }
}

/// A page migration in progress, with the slot of its request.
enum Begun {
    /// The new page was sent on the inflate queue.
    Replacing(usize),
    /// The old page was sent on the deflate queue, and no page replaces it.
    Removing(usize),
}

impl BalloonQueues {
    /// Sends the first request of a page migration.
    ///
    /// If the balloon is larger than the target, the old page is deflated and no page replaces it.
    /// The page that is sent moves from `new` or `old` into the request. Without `MUST_TELL_HOST`,
    /// a deflated page stays in `old`: the caller frees it after it has notified the device.
    ///
    /// Returns `None` if no request is idle or the ring is full.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if the balloon is closed, a page migration is overdue, the ring is still full
    /// since the last timeout, or the queue cannot accept the page.
    fn begin_page_migration(
        &self,
        new: &mut Option<PageRef>,
        old: &mut Option<PageRef>,
    ) -> Result<Option<Begun>> {
        let mut in_flight = self.in_flight.lock();
        if self.is_closed() {
            return Err(EBUSY);
        }
        let target = self.target.load(Relaxed);
        let removes = matches!(in_flight.page_counts.next(target), Step::Deflate(_));
        let (queue, page) = if removes {
            (&self.deflate, old)
        } else {
            (&self.inflate, new)
        };
        if queue.free_entries() == 0 && !queue.is_broken() {
            let has_timed_out = in_flight.timed_out_at == Some(in_flight.used_buffers);
            return if has_timed_out { Err(EBUSY) } else { Ok(None) };
        }
        let Some(mut request) = in_flight.take_page_migration()? else {
            return Ok(None);
        };
        let slot = request.slot();
        if page.take().is_none_or(|page| request.set(page).is_err()) {
            // The page frame number has more than 32 bits.
            in_flight.page_migrations[slot] = PageMigration::Idle(request);
            return Err(EBUSY);
        }
        if removes {
            request.set_deflate();
            if !self.must_tell_host {
                *page = request.take_unacked();
            }
        }
        if let Err(AddError { buffer, .. }) = queue.add(request.into_buffer()) {
            if let AnyRequest::PageMigration(mut request) = buffer.into() {
                drop(request.take());
                in_flight.page_migrations[slot] = PageMigration::Idle(request);
            }
            return Err(EBUSY);
        }
        if !removes {
            return Ok(Some(Begun::Replacing(slot)));
        }
        in_flight.page_counts.send_deflate(GuestGeometry::pfns(1));
        self.counters
            .requested(Queue::Deflate, GuestGeometry::pfns(1));
        if !self.must_tell_host {
            in_flight.released += 1;
            in_flight.page_migrations[slot] = PageMigration::Deflating;
        }
        Ok(Some(Begun::Removing(slot)))
    }

    /// Marks page migrations that no task waits for as overdue, after a page migration has timed
    /// out before it was sent.
    ///
    /// New ones fail with [`EBUSY`] while one is overdue, or while the ring stays full and the
    /// device uses no buffer.
    fn abandon_page_migrations(&self) {
        let mut in_flight = self.in_flight.lock();
        in_flight.timed_out_at = Some(in_flight.used_buffers);
        for place in &mut in_flight.page_migrations {
            if matches!(place, PageMigration::Deflating) {
                *place = PageMigration::Abandoned;
            }
        }
    }
}

/// Replaces a page in two steps: inflates the new page, then deflates the old one.
///
/// While the balloon is larger than the target, only deflates the old page: one request serves the
/// kernel and the host. If the device does not use a request, the request keeps its reference to
/// the page, so the guest does not reuse the page.
impl MigratePages for BalloonQueues {
    fn migrate(pages: &Pages, new: PageRef, old: PageRef, mode: MigrateMode) -> Result<Migrated> {
        if mode == MigrateMode::Async {
            // Waiting for the device may sleep.
            return Err(EBUSY);
        }
        let this = pages.migrator();
        let (mut new, mut old) = (Some(new), Some(old));
        let begun = Self::wait(pages, timeout::page_migration(), |this| {
            this.begin_page_migration(&mut new, &mut old).transpose()
        });
        let Some(begun) = begun else {
            this.abandon_page_migrations();
            return Err(EBUSY);
        };
        let begun = begun?;
        this.notify();
        match begun {
            Begun::Removing(slot) => {
                if this.must_tell_host {
                    if let Some(request) = Self::wait_page_migration(pages, slot) {
                        this.in_flight.lock().page_migrations[slot] = PageMigration::Idle(request);
                    }
                }
                Ok(Migrated::Deflated)
            }
            Begun::Replacing(slot) => {
                let mut request = Self::wait_page_migration(pages, slot).ok_or(EBUSY)?;
                drop(request.take());
                if let Some(old) = old {
                    Self::deflate_old_page(pages, request, old);
                }
                this.counters.migrated_pages.add(1);
                Ok(Migrated::Replaced)
            }
        }
    }
}

#[kunit_tests(virtio_balloon_rs_balloon_queues)]
mod tests {
    use super::*;
    use crate::mm::{BalloonPage, BlockList};
    use crate::shared_abi::page::PFN_SHIFT;
    use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};

    const INFLATE: usize = 0;
    const DEFLATE: usize = 1;

    impl From<SendError> for Error {
        fn from(error: SendError) -> Self {
            pr_err!("not sent: {:?}\n", error);
            EIO
        }
    }

    /// Creates an empty balloon with `MUST_TELL_HOST`, and its device.
    fn balloon() -> Result<(BoundTestDevice, Pin<KBox<Pages>>)> {
        balloon_of(true)
    }

    fn balloon_of(must_tell_host: bool) -> Result<(BoundTestDevice, Pin<KBox<Pages>>)> {
        balloon_on(BoundTestDevice::new()?, must_tell_host)
    }

    fn balloon_on(
        bound: BoundTestDevice,
        must_tell_host: bool,
    ) -> Result<(BoundTestDevice, Pin<KBox<Pages>>)> {
        let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
        let pages = BalloonPages::new(false, BalloonQueues::new(counters, must_tell_host)?);
        let pages = KBox::pin_init(pages, GFP_KERNEL)?;
        let queues = pages.migrator();
        let virtqueues: [&dyn crate::virtio::AnyQueue; 2] =
            [queues.inflate_queue(), queues.deflate_queue()];
        bound.find_queues(&virtqueues, CountingHandler::new()?)?;
        queues.set_target(u64::MAX);
        Ok((bound, pages))
    }

    fn oom(nodes: &NodesBelowWatermark) -> Purpose<'_> {
        Purpose::Oom(nodes)
    }

    fn number(address: u64) -> u32 {
        (address >> PFN_SHIFT) as u32
    }

    /// Returns a request with `count` new pages, and the page frame number of the first one.
    fn request(queues: &BalloonQueues, count: usize) -> Result<(Request, u32)> {
        let mut request = queues.take_spare().ok_or(ENOENT)?;
        let mut first = None;
        for _ in 0..count {
            let page = BalloonPage::alloc().ok_or(ENOMEM)?;
            first = first.or(Some(number(page.address())));
            request.push(page).map_err(|_| EINVAL)?;
        }
        Ok((request, first.ok_or(EINVAL)?))
    }

    fn inflate(bound: &BoundTestDevice, pages: &Pages, count: usize) -> Result {
        let queues = pages.migrator();
        let (request, first) = request(queues, count)?;
        queues.send_inflate(request)?;
        assert_eq!(queues.page_counts().inflated(), 0);
        assert_eq!(bound.device.use_buffer(INFLATE), Some(first));
        BalloonQueues::reap_used(pages);
        assert_eq!(queues.page_counts().inflated(), GuestGeometry::pfns(count));
        Ok(())
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
    fn a_page_is_migrated_in_two_steps() -> Result {
        let (bound, pages) = balloon()?;
        let (new, old) = two_pages()?;
        bound.device.set_use_on_notify(true);
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Ok(Migrated::Replaced));
        assert_eq!(
            &bound.device.take_used_log()?[..],
            &[
                (INFLATE, number(new.address())),
                (DEFLATE, number(old.address()))
            ]
        );
        assert!(pages.migrator().is_idle());
        // A request can be used more than once.
        for _ in 0..2 * MAX_PAGE_MIGRATIONS {
            let moved = migrate(&pages, &new, &old);
            assert_eq!(moved, Ok(Migrated::Replaced));
        }
        Ok(())
    }

    /// The target is smaller: one request serves the kernel and the host.
    #[test]
    fn a_page_that_is_to_leave_anyway_leaves_when_it_is_migrated() -> Result {
        for must_tell_host in [false, true] {
            let (bound, pages) = balloon_of(must_tell_host)?;
            let queues = pages.migrator();
            inflate(&bound, &pages, 2 * MAX_PAGE_MIGRATIONS)?;
            queues.set_target(GuestGeometry::pfns(1));
            bound.device.set_use_on_notify(must_tell_host);
            for left in (1..2 * MAX_PAGE_MIGRATIONS).rev() {
                // Takes the page off the balloon's list, as isolation does.
                let old = pages.dequeue(1).pop().ok_or(ENOENT)?;
                let (new, _) = two_pages()?;
                let moved = migrate(&pages, &new, &old);
                assert_eq!(moved, Ok(Migrated::Deflated));
                assert_eq!(queues.page_counts().inflated(), GuestGeometry::pfns(left));
                if !must_tell_host {
                    // No task waits; the device uses the request later.
                    assert_eq!(queues.page_counts().deflating(), GuestGeometry::pfns(1));
                    assert_eq!(
                        bound.device.use_buffer(DEFLATE),
                        Some(number(old.address()))
                    );
                    BalloonQueues::reap_used(&pages);
                }
                assert_eq!(queues.page_counts().deflating(), 0);
            }
            // The balloon has the target size now, so the page is replaced.
            let (new, old) = two_pages()?;
            bound.device.set_use_on_notify(true);
            let moved = migrate(&pages, &new, &old);
            assert_eq!(moved, Ok(Migrated::Replaced));
            BalloonQueues::reap_used(&pages);
            assert_eq!(queues.released(), 2 * MAX_PAGE_MIGRATIONS as u64 - 1);
            queues.close();
            bound.reset();
            BalloonQueues::detach_unused(&pages);
            assert!(queues.is_idle());
        }
        Ok(())
    }

    #[test]
    fn a_migration_that_must_not_block_asks_the_device_for_nothing() -> Result {
        let (bound, pages) = balloon()?;
        let (new, old) = two_pages()?;
        let moved = BalloonQueues::migrate(
            &pages,
            PageRef::from_balloon_page(&new),
            PageRef::from_balloon_page(&old),
            MigrateMode::Async,
        );
        assert_eq!(moved, Err(EBUSY));
        assert_eq!(bound.device.notifications(), 0);
        assert!(bound.device.pop_descriptor_chain(INFLATE).is_none());
        Ok(())
    }

    #[test]
    fn a_page_that_the_device_does_not_answer_for_is_asked_back() -> Result {
        let (bound, pages) = balloon()?;
        let queues = pages.migrator();
        let (new, old) = two_pages()?;
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));
        // The next page migration fails without waiting.
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));
        assert!(bound.device.pop_descriptor_chain(DEFLATE).is_none());
        assert!(!queues.is_idle());

        assert_eq!(
            bound.device.use_buffer(INFLATE),
            Some(number(new.address()))
        );
        assert_eq!(bound.device.use_buffer(INFLATE), None);
        BalloonQueues::reap_used(&pages);
        assert!(!queues.is_idle());
        assert_eq!(
            bound.device.use_buffer(DEFLATE),
            Some(number(new.address()))
        );
        BalloonQueues::reap_used(&pages);
        assert!(queues.is_idle());
        bound.device.set_use_on_notify(true);
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Ok(Migrated::Replaced));
        Ok(())
    }

    #[test]
    fn a_ring_that_stays_full_keeps_one_migration_waiting_and_not_the_next() -> Result {
        let (bound, pages) = balloon_on(BoundTestDevice::with_entries(1)?, true)?;
        let queues = pages.migrator();
        let (full, first) = request(queues, 1)?;
        queues.send_inflate(full)?;
        let (new, old) = two_pages()?;
        assert_eq!(migrate(&pages, &new, &old), Err(EBUSY));
        let (mut next, mut previous) = (None, None);
        let begun = queues.begin_page_migration(&mut next, &mut previous);
        assert!(matches!(begun, Err(error) if error == EBUSY));
        assert_eq!(bound.device.use_buffer(INFLATE), Some(first));
        bound.device.set_use_on_notify(true);
        assert_eq!(migrate(&pages, &new, &old), Ok(Migrated::Replaced));
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

    fn migrate(pages: &Pages, new: &BalloonPage, old: &BalloonPage) -> Result<Migrated> {
        let (new, old) = (
            PageRef::from_balloon_page(new),
            PageRef::from_balloon_page(old),
        );
        BalloonQueues::migrate(pages, new, old, MigrateMode::Sync)
    }

    fn two_pages() -> Result<(BalloonPage, BalloonPage)> {
        let mut pages: BlockList<BalloonPage> = BlockList::new();
        for _ in 0..2 {
            pages.push(BalloonPage::alloc().ok_or(ENOMEM)?);
        }
        Ok((pages.pop().ok_or(ENOMEM)?, pages.pop().ok_or(ENOMEM)?))
    }
}
