// SPDX-License-Identifier: GPL-2.0

//! What is on its way between guest and balloon.
//!
//! Whoever needs an answer of the device takes it from the queues himself, and does for all others
//! what their answers are for: the work item that steers the balloon's size, a task that has found
//! no memory and wants some back, a task that moves pages. So none of them waits for another, and
//! none needs a work item to run.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, AtomicFlag, Relaxed};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::{Delta, Instant, Monotonic, Msecs};

use super::balance::{Balance, Step};
use super::counters::Counters;
use super::request::{Guest, MoveRequest, PageBuffer, Request, Returned};
use super::timeout;
use crate::mm::{BalloonPages, MigrateMode, MigratePages, Migrated, PageRef, ShortNodes};
use crate::shared_abi::queue::Queue;
use crate::virtio::{AddError, AddFailure, Signal, Virtqueue};

/// How many requests there are. The next ones are filled while the device works on the last.
pub(crate) const REQUESTS: usize = 16;
/// How many of them are left to a task that has found no memory.
const RESERVED: usize = 2;
/// How many pages can be on their way for page migration at a time.
const MOVES: usize = 8;
/// How long to wait for an interrupt before looking without one.
pub(crate) const LOOK: Msecs = 50;

/// The entries of a ring that inflation and deflation leave to the others who share it, a task that has
/// found no memory and page migration: half of a small ring.
const RESERVED_ENTRIES: usize = RESERVED + MOVES;

/// Why nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendError {
    /// The ring has no room: the device has to use a buffer first.
    RingFull,
    /// Memory is short.
    NoMemory,
    /// The kernel has isolated all pages of the balloon to migrate them.
    Isolated,
    /// The device is gone or broken, or the balloon is [closed](Traffic::close).
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

/// What a deflation is for.
#[derive(Clone, Copy)]
pub(crate) enum Purpose<'a> {
    /// The host wants a smaller balloon. The pages are freed when the device has answered.
    Resize,
    /// A task has found no memory: pages on these nodes, which are short of it. They are freed when the
    /// device has been told of them, or with `MUST_TELL_HOST` when it has answered.
    Oom(&'a ShortNodes),
}

/// The pages in the balloon, and those on their way.
pub(crate) type Pages = BalloonPages<Traffic>;

/// The queues, what is in flight on them, and the account of all pages.
///
/// Its lock is held for moments only; nobody allocates, waits or reaches for the host under it. So it
/// may be taken where memory is short.
#[pin_data]
pub(crate) struct Traffic {
    inflate: Virtqueue<PageBuffer>,
    deflate: Virtqueue<PageBuffer>,
    counters: Arc<Counters>,
    /// Raised when the device may have used something, and when it is not worth waiting any more.
    #[pin]
    pub(crate) signal: Signal,
    /// How many wait for the next answer, whichever it is.
    waiting: Atomic<i32>,
    /// Nothing new is begun, and nobody waits.
    closed: AtomicFlag,
    /// No page is used before the device has given it back (`MUST_TELL_HOST`).
    must_tell_host: bool,
    /// How many balloon pages the host wants.
    target: Atomic<u64>,
    #[pin]
    state: Mutex<State>,
}

struct State {
    balance: Balance,
    /// The requests that are not in flight. Has room for all.
    spare: KVec<Request>,
    moves: [Move; MOVES],
    /// How many pages came out of the balloon and were freed, ever.
    released: u64,
    /// How many buffers the device has used, ever.
    answers: u64,
    /// The number of answers when a page migration last timed out without room on a ring.
    in_vain_at: Option<u64>,
}

/// Where a request about a page that is moved is.
enum Move {
    /// Here, and about no page.
    Idle(MoveRequest),
    /// With the device, or with the task that moves the page and will wait for it.
    Awaited,
    /// Back, for the task that waits for it.
    Back(MoveRequest),
    /// With the device, about a page that the guest has already. Nobody waits.
    Leaving,
    /// With the device. Nobody waits any more.
    Forgotten,
    /// About a page that the device has to give back, and is to be told of.
    Unsent(MoveRequest),
    /// Taken from the queue when that ended; for the task that waits for it.
    Lost(MoveRequest),
}

impl Traffic {
    /// Nothing is on its way. With `must_tell_host`, no page is used before the device has given it back.
    ///
    /// May sleep. Fails with `ENOMEM`.
    pub(crate) fn new(counters: Arc<Counters>, must_tell_host: bool) -> Result<impl PinInit<Self>> {
        let mut spare = KVec::with_capacity(REQUESTS, GFP_KERNEL)?;
        for _ in 0..REQUESTS {
            spare.push(Request::new()?, GFP_KERNEL)?;
        }
        let [a, b, c, d, e, f, g, h] = [0, 1, 2, 3, 4, 5, 6, 7].map(MoveRequest::new);
        let state = State {
            balance: Balance::default(),
            spare,
            moves: [a?, b?, c?, d?, e?, f?, g?, h?].map(Move::Idle),
            released: 0,
            answers: 0,
            in_vain_at: None,
        };
        let (inflate, deflate) = (Virtqueue::new(c"inflate")?, Virtqueue::new(c"deflate")?);
        Ok(pin_init!(Self {
            inflate,
            deflate,
            counters,
            signal <- Signal::new(),
            waiting: Atomic::new(0),
            closed: AtomicFlag::new(false),
            must_tell_host,
            target: Atomic::new(0),
            state <- new_mutex!(state, "Traffic::state"),
        }))
    }

    /// The queue of pages that go into the balloon.
    pub(crate) fn inflate_queue(&self) -> &Virtqueue<PageBuffer> {
        &self.inflate
    }

    /// The queue of pages that come out of the balloon.
    pub(crate) fn deflate_queue(&self) -> &Virtqueue<PageBuffer> {
        &self.deflate
    }

    /// Where the balloon's pages are.
    pub(crate) fn balance(&self) -> Balance {
        self.state.lock().balance
    }

    /// Whether no page is in the balloon, and nothing on its way.
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.balance.is_empty() && state.moves.iter().all(|it| matches!(it, Move::Idle(_)))
    }

    /// How many pages came out of the balloon and were freed, ever.
    pub(crate) fn released(&self) -> u64 {
        self.state.lock().released
    }

    /// The host wants so many balloon pages. Page migration heeds it, too.
    pub(crate) fn set_target(&self, pages: u64) {
        self.target.store(pages, Relaxed);
    }

    /// What to do next to get to the target.
    pub(crate) fn next(&self) -> Step {
        self.state.lock().balance.next(self.target.load(Relaxed))
    }

    /// Whether the queues can move nothing any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.inflate.is_broken() || self.deflate.is_broken()
    }

    /// Nothing new is begun, and who waits gives up. Any context.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        self.signal.raise();
    }

    /// The opposite of [`close`](Self::close). Any context.
    pub(crate) fn open(&self) {
        self.closed.store(false, Relaxed);
    }

    /// Whether it is closed. Any context.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Whether the inflate queue takes a request of the resize worker.
    pub(crate) fn room_to_inflate(&self) -> Result<(), SendError> {
        Self::room(&self.inflate)
    }

    /// Whether the deflate queue takes a request of the resize worker.
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

    /// A request that is not in flight, for the one who steers.
    pub(crate) fn take_spare(&self) -> Option<Request> {
        let mut state = self.state.lock();
        (state.spare.len() > RESERVED)
            .then(|| state.spare.pop())
            .flatten()
    }

    /// A request that is not in flight, for a task that has found no memory, if the deflate queue has
    /// room for it.
    pub(crate) fn take_reserved(&self) -> Option<Request> {
        let mut state = self.state.lock();
        (self.deflate.free_entries() > 0)
            .then(|| state.spare.pop())
            .flatten()
    }

    /// Puts a request that is not in flight away, for the next use. Its pages are freed.
    pub(crate) fn put(&self, mut request: Request) {
        drop(request.take());
        self.state.lock().put(request);
    }

    /// Takes back what the device has used, and does what it was for.
    pub(crate) fn collect(pages: &Pages) {
        let this = pages.migrator();
        let mut state = this.state.lock();
        while let Some((buffer, _)) = this.inflate.pop() {
            state.answers = state.answers.wrapping_add(1);
            match Returned::from(buffer) {
                Returned::Request(mut request) => {
                    this.counters.acknowledged(Queue::Inflate, request.pfns());
                    state.balance.arrived(request.pfns());
                    pages.enqueue(request.take());
                    state.put(request);
                }
                Returned::Move(request) => {
                    let place = &mut state.moves[request.slot()];
                    *place = match place {
                        // Nobody wants the page in the balloon any more.
                        Move::Forgotten => Move::Unsent(request),
                        _ => Move::Back(request),
                    };
                }
            }
        }
        while let Some((buffer, _)) = this.deflate.pop() {
            state.answers = state.answers.wrapping_add(1);
            match Returned::from(buffer) {
                Returned::Request(mut request) => {
                    this.counters.acknowledged(Queue::Deflate, request.pfns());
                    state.balance.left(request.pfns());
                    // The device has let go of the pages: only now are they the guest's again.
                    let for_oom = request.is_for_oom();
                    let released = state.release(&mut request);
                    if for_oom {
                        this.counters.oom_deflated_pages.add(Guest::pfns(released));
                    }
                    state.put(request);
                }
                Returned::Move(mut request) => {
                    let deflates = request.deflates();
                    let page = request.take();
                    if deflates {
                        this.counters.acknowledged(Queue::Deflate, Guest::pfns(1));
                        state.balance.left(Guest::pfns(1));
                        state.released += u64::from(page.is_some());
                    }
                    drop(page);
                    let place = &mut state.moves[request.slot()];
                    *place = match place {
                        Move::Leaving | Move::Forgotten => Move::Idle(request),
                        _ => Move::Back(request),
                    };
                }
            }
        }
        this.send_unsent(&mut state);
        drop(state);
        this.notify();
    }

    /// Sends the requests about pages that the device has to give back.
    fn send_unsent(&self, state: &mut State) {
        for place in &mut state.moves {
            *place = match core::mem::replace(place, Move::Forgotten) {
                Move::Unsent(request) => match self.deflate.add(request.into_buffer()) {
                    Ok(()) => Move::Forgotten,
                    Err(AddError { buffer, .. }) => match Returned::from(buffer) {
                        Returned::Move(request) => Move::Unsent(request),
                        Returned::Request(_) => Move::Forgotten,
                    },
                },
                other => other,
            };
        }
    }

    /// Offers the pages of `request` to the device.
    ///
    /// On failure the pages are freed.
    pub(crate) fn send_in(&self, mut request: Request) -> Result<(), SendError> {
        let pfns = request.pfns();
        let mut state = self.state.lock();
        if self.is_closed() {
            drop(request.take());
            state.put(request);
            return Err(SendError::Gone);
        }
        match self.inflate.add(request.into_buffer()) {
            Ok(()) => {
                state.balance.send_in(pfns);
                self.counters.requested(Queue::Inflate, pfns);
                Ok(())
            }
            Err(AddError { buffer, failure }) => {
                if let Returned::Request(mut request) = buffer.into() {
                    drop(request.take());
                    state.put(request);
                }
                Err(failure.into())
            }
        }
    }

    /// Fills `request` with up to `pfns` balloon pages from the balloon, and asks the device for
    /// them. Returns how many of the guest's pages they are.
    ///
    /// For [`Purpose::Oom`] that may be 0: then no page would help.
    pub(crate) fn send_out(
        pages: &Pages,
        mut request: Request,
        pfns: u64,
        purpose: Purpose<'_>,
    ) -> Result<usize, SendError> {
        let this = pages.migrator();
        let mut state = this.state.lock();
        if this.is_closed() {
            // `recover` would miss pages that were put back now.
            state.put(request);
            return Err(SendError::Gone);
        }
        let pfns = pfns.min(state.balance.inside());
        let wanted = (Guest::guest_pages(pfns) as usize).min(Guest::CAPACITY);
        let mut out = match purpose {
            Purpose::Resize => pages.dequeue(wanted),
            Purpose::Oom(nodes) => match pages.dequeue_on(nodes, wanted) {
                Some(out) => out,
                None => {
                    state.put(request);
                    return Ok(0);
                }
            },
        };
        let count = out.len();
        while let Some(page) = out.pop() {
            // There is room, and the number did fit on the way in.
            let _ = request.push(page);
        }
        if request.is_empty() {
            state.put(request);
            return Err(SendError::Isolated);
        }
        let at_once = match purpose {
            Purpose::Resize => false,
            Purpose::Oom(_) => {
                request.set_for_oom();
                !this.must_tell_host
            }
        };
        let free = if at_once { request.let_go() } else { out };
        let pfns = request.pfns();
        match this.deflate.add(request.into_buffer()) {
            Ok(()) => {
                state.balance.send_out(pfns);
                this.counters.requested(Queue::Deflate, pfns);
                state.released += free.len() as u64;
                drop(state);
                if at_once {
                    // The device learns of it before the pages are used.
                    this.notify();
                    this.counters
                        .oom_deflated_pages
                        .add(Guest::pfns(free.len()));
                }
                drop(free);
                Ok(count)
            }
            Err(AddError { buffer, failure }) => {
                pages.enqueue(free);
                if let Returned::Request(mut request) = buffer.into() {
                    pages.enqueue(request.take());
                    state.put(request);
                }
                Err(failure.into())
            }
        }
    }

    /// Lets the device know of all requests that it does not know of.
    pub(crate) fn notify(&self) {
        let queues = [
            (Queue::Inflate, &self.inflate),
            (Queue::Deflate, &self.deflate),
        ];
        for (name, queue) in queues {
            self.counters.kicked(name, queue.kick());
        }
    }

    /// Asks for interrupts. Returns `false` if there is something to collect already.
    pub(crate) fn listen(&self) -> bool {
        // Both, lest an interrupt is lost: the one may be asked for while the other is late.
        if self.waiting.load(Relaxed) > 0 {
            self.inflate.enable_callback() & self.deflate.enable_callback()
        } else {
            self.inflate.enable_callback_delayed() & self.deflate.enable_callback_delayed()
        }
    }

    /// Waits until `done` returns `Some`, and reaps both virtqueues meanwhile. Returns `None` after
    /// `timeout`, or if the device is broken or this is closed. Uninterruptible.
    pub(crate) fn wait<T>(
        pages: &Pages,
        timeout: Delta,
        mut done: impl FnMut(&Self) -> Option<T>,
    ) -> Option<T> {
        let this = pages.migrator();
        let since: Instant<Monotonic> = Instant::now();
        this.waiting.add(1, Relaxed);
        let result = loop {
            let seen = this.signal.count();
            Self::collect(pages);
            if let Some(result) = done(this) {
                break Some(result);
            }
            if this.is_closed() || this.is_broken() || since.elapsed() > timeout {
                break None;
            }
            if this.listen() {
                this.signal.wait(seen, LOOK);
            }
        };
        this.waiting.add(-1, Relaxed);
        result
    }

    /// Takes everything back after the device's reset: it holds no page any more. All pages are
    /// freed, in the balloon or on their way.
    ///
    /// May sleep. To be called while this is [closed](Self::close).
    pub(crate) fn recover(pages: &Pages) {
        let this = pages.migrator();
        let mut state = this.state.lock();
        while let Some(buffer) = this.inflate.detach().or_else(|| this.deflate.detach()) {
            match Returned::from(buffer) {
                Returned::Request(mut request) => {
                    drop(request.take());
                    state.put(request);
                }
                Returned::Move(mut request) => {
                    drop(request.take());
                    let place = &mut state.moves[request.slot()];
                    *place = match place {
                        Move::Leaving | Move::Forgotten => Move::Idle(request),
                        _ => Move::Lost(request),
                    };
                }
            }
        }
        drop(state);
        this.signal.raise();
        // Waits for page migrations under way.
        pages.drain();
        let mut state = this.state.lock();
        for place in &mut state.moves {
            *place = match core::mem::replace(place, Move::Forgotten) {
                Move::Unsent(mut request) => {
                    drop(request.take());
                    Move::Idle(request)
                }
                other => other,
            };
        }
        state.balance = Balance::default();
    }

    /// Waits until the device has used the request of `slot`.
    fn wait_for_move(pages: &Pages, slot: usize) -> Option<MoveRequest> {
        let back = Self::wait(pages, timeout::page_migration(), |this| {
            let mut state = this.state.lock();
            match core::mem::replace(&mut state.moves[slot], Move::Awaited) {
                Move::Back(request) => Some(Some(request)),
                Move::Lost(request) => {
                    state.moves[slot] = Move::Idle(request);
                    Some(None)
                }
                other => {
                    state.moves[slot] = other;
                    None
                }
            }
        });
        if let Some(back) = back {
            return back;
        }
        let this = pages.migrator();
        let mut state = this.state.lock();
        match core::mem::replace(&mut state.moves[slot], Move::Forgotten) {
            // In the last moment.
            Move::Back(request) => {
                state.moves[slot] = Move::Awaited;
                Some(request)
            }
            Move::Lost(request) => {
                state.moves[slot] = Move::Idle(request);
                None
            }
            _ => None,
        }
    }

    /// Tells the device that `old` has left the balloon, and waits for its answer where no page may be
    /// used before. What it has not heard of, or has to answer, keeps the page.
    fn give_up(pages: &Pages, mut request: MoveRequest, old: PageRef) {
        let slot = request.slot();
        // Its number did fit on the way in.
        let _ = request.set(old);
        let (mut unsent, mut free) = (Some(request), None);
        let sent = Self::wait(pages, timeout::page_migration(), |this| {
            this.send_old(&mut unsent, &mut free)
        });
        let this = pages.migrator();
        if let Some(request) = unsent {
            // The ring had no room all the time, or is broken: until a reset the device holds the page.
            this.state.lock().moves[slot] = Move::Unsent(request);
        }
        if sent != Some(true) {
            return;
        }
        this.notify();
        // The device has been told of it.
        drop(free);
        if this.must_tell_host {
            if let Some(request) = Self::wait_for_move(pages, slot) {
                this.state.lock().moves[slot] = Move::Idle(request);
            }
        }
    }

    /// Sends `request`, which becomes `None`, and takes the page out of it if it need not be kept.
    /// Returns `None` if the ring has no room, else whether the device was given it.
    fn send_old(
        &self,
        request: &mut Option<MoveRequest>,
        free: &mut Option<PageRef>,
    ) -> Option<bool> {
        let mut state = self.state.lock();
        let mut taken = request.take()?;
        let slot = taken.slot();
        if !self.must_tell_host {
            *free = taken.let_go();
        }
        let Err(AddError { buffer, failure }) = self.deflate.add(taken.into_buffer()) else {
            if !self.must_tell_host {
                state.moves[slot] = Move::Leaving;
            }
            return Some(true);
        };
        let Returned::Move(mut taken) = buffer.into() else {
            return Some(false);
        };
        if failure == AddFailure::Gone {
            // After a reset the device holds no page.
            drop((free.take(), taken.take()));
            state.moves[slot] = Move::Idle(taken);
            return Some(false);
        }
        if let Some(page) = free.take() {
            // Its number did fit just now.
            let _ = taken.set(page);
        }
        *request = Some(taken);
        match SendError::from(failure) {
            SendError::Gone => Some(false),
            _ => None,
        }
    }
}

impl State {
    fn put(&mut self, request: Request) {
        // Its room is still there: requests are only ever taken and put back.
        let _ = self.spare.push_within_capacity(request);
    }

    /// Frees the pages of a request that is done. Returns how many they are; none, if they were let go
    /// before.
    fn release(&mut self, request: &mut Request) -> usize {
        let pages = request.take();
        self.released += pages.len() as u64;
        pages.len()
    }

    /// Takes a request for a page that the kernel migrates. `None` if all are in use.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if one is overdue: a device that does not answer is not asked for more.
    fn begin_move(&mut self) -> Result<Option<MoveRequest>> {
        let overdue = |place: &Move| matches!(place, Move::Forgotten | Move::Unsent(_));
        if self.moves.iter().any(overdue) {
            return Err(EBUSY);
        }
        for place in &mut self.moves {
            match core::mem::replace(place, Move::Awaited) {
                Move::Idle(request) => return Ok(Some(request)),
                other => *place = other,
            }
        }
        Ok(None)
    }
}

/// What page migration has begun, with the slot of its request.
enum Begun {
    /// The device was offered the new page.
    Replacing(usize),
    /// The device was told that the old page leaves the balloon.
    Removing(usize),
}

impl Traffic {
    /// Begins the migration of a page: where the host wants a smaller balloon the page leaves it, and no
    /// other comes. Takes the page that is sent; leaves `old` if it is free once the device is notified.
    /// Returns `None` if there is no request or no room for it now.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if the device cannot take it.
    fn begin(&self, new: &mut Option<PageRef>, old: &mut Option<PageRef>) -> Result<Option<Begun>> {
        let mut state = self.state.lock();
        if self.is_closed() {
            return Err(EBUSY);
        }
        let target = self.target.load(Relaxed);
        let removes = matches!(state.balance.next(target), Step::Deflate(_));
        let (queue, page) = if removes {
            (&self.deflate, old)
        } else {
            (&self.inflate, new)
        };
        if queue.free_entries() == 0 && !queue.is_broken() {
            let in_vain = state.in_vain_at == Some(state.answers);
            return if in_vain { Err(EBUSY) } else { Ok(None) };
        }
        let Some(mut request) = state.begin_move()? else {
            return Ok(None);
        };
        let slot = request.slot();
        if page.take().is_none_or(|page| request.set(page).is_err()) {
            // The device cannot read a number of so many bits.
            state.moves[slot] = Move::Idle(request);
            return Err(EBUSY);
        }
        if removes {
            request.set_deflates();
            if !self.must_tell_host {
                *page = request.let_go();
            }
        }
        if let Err(AddError { buffer, .. }) = queue.add(request.into_buffer()) {
            if let Returned::Move(mut request) = buffer.into() {
                drop(request.take());
                state.moves[slot] = Move::Idle(request);
            }
            return Err(EBUSY);
        }
        if !removes {
            return Ok(Some(Begun::Replacing(slot)));
        }
        state.balance.send_out(Guest::pfns(1));
        self.counters.requested(Queue::Deflate, Guest::pfns(1));
        if !self.must_tell_host {
            state.released += 1;
            state.moves[slot] = Move::Leaving;
        }
        Ok(Some(Begun::Removing(slot)))
    }

    /// The device does not answer: nobody relies on it any more, nor waits again before it has answered.
    fn give_up_waiting(&self) {
        let mut state = self.state.lock();
        state.in_vain_at = Some(state.answers);
        for place in &mut state.moves {
            if matches!(place, Move::Leaving) {
                *place = Move::Forgotten;
            }
        }
    }
}

/// First the device takes the new page, then it gives the old one back. A page that it does not
/// answer for stays what it is to the device, and is used for nothing else: the request keeps it.
///
/// While the balloon deflates, the page leaves it instead: the kernel gets what it wants with one request,
/// and the host, too.
impl MigratePages for Traffic {
    fn migrate(pages: &Pages, new: PageRef, old: PageRef, mode: MigrateMode) -> Result<Migrated> {
        if mode == MigrateMode::Async {
            // The device's answer has to be waited for.
            return Err(EBUSY);
        }
        let this = pages.migrator();
        let (mut new, mut old) = (Some(new), Some(old));
        let begun = Self::wait(pages, timeout::page_migration(), |this| {
            this.begin(&mut new, &mut old).transpose()
        });
        let Some(begun) = begun else {
            this.give_up_waiting();
            return Err(EBUSY);
        };
        let begun = begun?;
        this.notify();
        match begun {
            Begun::Removing(slot) => {
                if this.must_tell_host {
                    if let Some(request) = Self::wait_for_move(pages, slot) {
                        this.state.lock().moves[slot] = Move::Idle(request);
                    }
                }
                Ok(Migrated::Removed)
            }
            Begun::Replacing(slot) => {
                let mut request = Self::wait_for_move(pages, slot).ok_or(EBUSY)?;
                drop(request.take());
                if let Some(old) = old {
                    Self::give_up(pages, request, old);
                }
                this.counters.migrated_pages.add(1);
                Ok(Migrated::Replaced)
            }
        }
    }
}

#[kunit_tests(virtio_balloon_rs_traffic)]
mod tests {
    use super::*;
    use crate::mm::{BalloonPage, BlockList};
    use crate::shared_abi::page::PFN_SHIFT;
    use crate::virtio::kunit_device::{Bound, Counter};

    const INFLATE: usize = 0;
    const DEFLATE: usize = 1;

    impl From<SendError> for Error {
        fn from(error: SendError) -> Self {
            pr_err!("not sent: {:?}\n", error);
            EIO
        }
    }

    /// An empty balloon whose host must be told, and its device.
    fn balloon() -> Result<(Bound, Pin<KBox<Pages>>)> {
        balloon_of(true)
    }

    fn balloon_of(must_tell_host: bool) -> Result<(Bound, Pin<KBox<Pages>>)> {
        balloon_on(Bound::new()?, must_tell_host)
    }

    fn balloon_on(bound: Bound, must_tell_host: bool) -> Result<(Bound, Pin<KBox<Pages>>)> {
        let counters = Arc::new(Counters::new(None), GFP_KERNEL)?;
        let pages = BalloonPages::new(false, Traffic::new(counters, must_tell_host)?);
        let pages = KBox::pin_init(pages, GFP_KERNEL)?;
        let traffic = pages.migrator();
        let queues: [&dyn crate::virtio::AnyQueue; 2] =
            [traffic.inflate_queue(), traffic.deflate_queue()];
        bound.find_queues(&queues, Counter::new()?)?;
        traffic.set_target(u64::MAX);
        Ok((bound, pages))
    }

    fn oom(nodes: &ShortNodes) -> Purpose<'_> {
        Purpose::Oom(nodes)
    }

    fn number(address: u64) -> u32 {
        (address >> PFN_SHIFT) as u32
    }

    /// A request about new pages, and the number of the first.
    fn request(traffic: &Traffic, count: usize) -> Result<(Request, u32)> {
        let mut request = traffic.take_spare().ok_or(ENOENT)?;
        let mut first = None;
        for _ in 0..count {
            let page = BalloonPage::alloc().ok_or(ENOMEM)?;
            first = first.or(Some(number(page.address())));
            request.push(page).map_err(|_| EINVAL)?;
        }
        Ok((request, first.ok_or(EINVAL)?))
    }

    fn inflate(bound: &Bound, pages: &Pages, count: usize) -> Result {
        let traffic = pages.migrator();
        let (request, first) = request(traffic, count)?;
        traffic.send_in(request)?;
        assert_eq!(traffic.balance().inside(), 0);
        assert_eq!(bound.device.answer(INFLATE), Some(first));
        Traffic::collect(pages);
        assert_eq!(traffic.balance().inside(), Guest::pfns(count));
        Ok(())
    }

    #[test]
    fn pages_go_in_and_come_out_when_the_device_says_so() -> Result {
        let (bound, pages) = balloon()?;
        let traffic = pages.migrator();
        inflate(&bound, &pages, 5)?;
        let request = traffic.take_spare().ok_or(ENOENT)?;
        let sent = Traffic::send_out(&pages, request, Guest::pfns(3), Purpose::Resize)?;
        assert_eq!((sent, traffic.released()), (3, 0));
        assert_eq!(traffic.balance().actual(), Guest::pfns(5));
        assert!(bound.device.answer(DEFLATE).is_some());
        Traffic::collect(&pages);
        assert_eq!(traffic.released(), 3);
        assert_eq!(traffic.balance().actual(), Guest::pfns(2));
        Ok(())
    }

    #[test]
    fn pages_that_need_no_answer_are_free_at_once() -> Result {
        let (bound, pages) = balloon_of(false)?;
        let traffic = pages.migrator();
        inflate(&bound, &pages, 4)?;
        let request = traffic.take_reserved().ok_or(ENOENT)?;
        let notifications = bound.device.notifications();
        let nodes = ShortNodes::all();
        let sent = Traffic::send_out(&pages, request, u64::MAX, oom(&nodes));
        assert_eq!(sent, Ok(4));
        assert_eq!(traffic.released(), 4);
        // The device was told before.
        assert_eq!(bound.device.notifications(), notifications + 1);
        assert!(!traffic.is_idle());
        assert!(bound.device.answer(DEFLATE).is_some());
        Traffic::collect(&pages);
        assert_eq!(traffic.released(), 4);
        assert!(traffic.is_idle());
        Ok(())
    }

    #[test]
    fn what_a_full_ring_does_not_take_stays_in_the_balloon() -> Result {
        let (bound, pages) = balloon()?;
        let traffic = pages.migrator();
        inflate(&bound, &pages, 6)?;
        for _ in 0..traffic.deflate_queue().entries() {
            let request = traffic.take_spare().ok_or(ENOENT)?;
            Traffic::send_out(&pages, request, Guest::pfns(1), Purpose::Resize)?;
        }
        let inside = traffic.balance();
        let nodes = ShortNodes::all();
        for purpose in [Purpose::Resize, oom(&nodes)] {
            let request = traffic.take_spare().ok_or(ENOENT)?;
            let sent = Traffic::send_out(&pages, request, Guest::pfns(1), purpose);
            assert_eq!(sent, Err(SendError::RingFull));
            assert_eq!((traffic.balance(), traffic.released()), (inside, 0));
        }
        assert_eq!(Guest::pfns(pages.count()), inside.inside());
        Ok(())
    }

    #[test]
    fn the_last_requests_are_left_to_those_without_memory() -> Result {
        let (_bound, pages) = balloon()?;
        let traffic = pages.migrator();
        let mut taken = KVec::with_capacity(REQUESTS, GFP_KERNEL)?;
        while let Some(request) = traffic.take_spare() {
            taken.push(request, GFP_KERNEL)?;
        }
        assert_eq!(taken.len(), REQUESTS - RESERVED);
        for _ in 0..RESERVED {
            taken.push(traffic.take_reserved().ok_or(ENOENT)?, GFP_KERNEL)?;
        }
        assert!(traffic.take_reserved().is_none());
        for request in taken {
            traffic.put(request);
        }
        assert!(traffic.take_spare().is_some());
        Ok(())
    }

    #[test]
    fn a_page_is_moved_in_two_steps() -> Result {
        let (bound, pages) = balloon()?;
        let (new, old) = two_pages()?;
        bound.device.answer_at_once(true);
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Ok(Migrated::Replaced));
        assert_eq!(
            &bound.device.take_answered()?[..],
            &[
                (INFLATE, number(new.address())),
                (DEFLATE, number(old.address()))
            ]
        );
        assert!(pages.migrator().is_idle());
        // Each of the requests can be used any number of times.
        for _ in 0..2 * MOVES {
            let moved = migrate(&pages, &new, &old);
            assert_eq!(moved, Ok(Migrated::Replaced));
        }
        Ok(())
    }

    /// The host wants a smaller balloon: one request does for the kernel and the host.
    #[test]
    fn a_page_that_is_to_leave_anyway_leaves_when_it_is_migrated() -> Result {
        for must_tell_host in [false, true] {
            let (bound, pages) = balloon_of(must_tell_host)?;
            let traffic = pages.migrator();
            inflate(&bound, &pages, 2 * MOVES)?;
            traffic.set_target(Guest::pfns(1));
            bound.device.answer_at_once(must_tell_host);
            for left in (1..2 * MOVES).rev() {
                // As the kernel isolates it.
                let old = pages.dequeue(1).pop().ok_or(ENOENT)?;
                let (new, _) = two_pages()?;
                let moved = migrate(&pages, &new, &old);
                assert_eq!(moved, Ok(Migrated::Removed));
                assert_eq!(traffic.balance().inside(), Guest::pfns(left));
                if !must_tell_host {
                    // Nobody waits for the answer, which comes later.
                    assert_eq!(traffic.balance().coming_out(), Guest::pfns(1));
                    assert_eq!(bound.device.answer(DEFLATE), Some(number(old.address())));
                    Traffic::collect(&pages);
                }
                assert_eq!(traffic.balance().coming_out(), 0);
            }
            // No more than the host wants.
            let (new, old) = two_pages()?;
            bound.device.answer_at_once(true);
            let moved = migrate(&pages, &new, &old);
            assert_eq!(moved, Ok(Migrated::Replaced));
            Traffic::collect(&pages);
            assert_eq!(traffic.released(), 2 * MOVES as u64 - 1);
            traffic.close();
            bound.reset();
            Traffic::recover(&pages);
            assert!(traffic.is_idle());
        }
        Ok(())
    }

    #[test]
    fn a_migration_that_must_not_block_asks_the_device_for_nothing() -> Result {
        let (bound, pages) = balloon()?;
        let (new, old) = two_pages()?;
        let moved = Traffic::migrate(
            &pages,
            PageRef::of(&new),
            PageRef::of(&old),
            MigrateMode::Async,
        );
        assert_eq!(moved, Err(EBUSY));
        assert_eq!(bound.device.notifications(), 0);
        assert!(bound.device.take(INFLATE).is_none());
        Ok(())
    }

    #[test]
    fn a_page_that_the_device_does_not_answer_for_is_asked_back() -> Result {
        let (bound, pages) = balloon()?;
        let traffic = pages.migrator();
        let (new, old) = two_pages()?;
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));
        // The next one is not kept waiting.
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));
        assert!(bound.device.take(DEFLATE).is_none());
        assert!(!traffic.is_idle());

        assert_eq!(bound.device.answer(INFLATE), Some(number(new.address())));
        assert_eq!(bound.device.answer(INFLATE), None);
        Traffic::collect(&pages);
        assert!(!traffic.is_idle());
        assert_eq!(bound.device.answer(DEFLATE), Some(number(new.address())));
        Traffic::collect(&pages);
        assert!(traffic.is_idle());
        bound.device.answer_at_once(true);
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Ok(Migrated::Replaced));
        Ok(())
    }

    #[test]
    fn a_ring_that_stays_full_keeps_one_migration_waiting_and_not_the_next() -> Result {
        let (bound, pages) = balloon_on(Bound::with_entries(1)?, true)?;
        let traffic = pages.migrator();
        let (full, first) = request(traffic, 1)?;
        traffic.send_in(full)?;
        let (new, old) = two_pages()?;
        assert_eq!(migrate(&pages, &new, &old), Err(EBUSY));
        let (mut next, mut previous) = (None, None);
        let begun = traffic.begin(&mut next, &mut previous);
        assert!(matches!(begun, Err(error) if error == EBUSY));
        assert_eq!(bound.device.answer(INFLATE), Some(first));
        bound.device.answer_at_once(true);
        assert_eq!(migrate(&pages, &new, &old), Ok(Migrated::Replaced));
        Ok(())
    }

    #[test]
    fn after_a_reset_nothing_is_missing_and_all_begins_anew() -> Result {
        let (bound, pages) = balloon()?;
        let traffic = pages.migrator();
        inflate(&bound, &pages, 3)?;
        let (request, _) = request(traffic, 2)?;
        traffic.send_in(request)?;
        let request = traffic.take_spare().ok_or(ENOENT)?;
        Traffic::send_out(&pages, request, Guest::pfns(1), Purpose::Resize)?;
        let (new, old) = two_pages()?;
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));

        traffic.close();
        bound.reset();
        Traffic::recover(&pages);
        assert!(traffic.is_idle());
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Err(EBUSY));
        let state = traffic.state.lock();
        assert_eq!(state.spare.len(), REQUESTS);
        drop(state);

        let queues: [&dyn crate::virtio::AnyQueue; 2] =
            [traffic.inflate_queue(), traffic.deflate_queue()];
        bound.find_queues(&queues, Counter::new()?)?;
        traffic.open();
        inflate(&bound, &pages, 3)?;
        bound.device.answer_at_once(true);
        let moved = migrate(&pages, &new, &old);
        assert_eq!(moved, Ok(Migrated::Replaced));
        Ok(())
    }

    #[test]
    fn a_wait_ends_when_the_ring_breaks_or_this_is_closed() -> Result {
        let (bound, pages) = balloon()?;
        let traffic = pages.migrator();
        let since: Instant<Monotonic> = Instant::now();
        let long = Delta::from_secs(60);
        let (request, _) = request(traffic, 1)?;
        traffic.send_in(request)?;
        bound.device.give_back(INFLATE, 1000, 0);
        assert_eq!(Traffic::wait(&pages, long, |_| None::<()>), None);
        assert!(traffic.is_broken());
        let (_bound, pages) = balloon()?;
        pages.migrator().close();
        assert_eq!(Traffic::wait(&pages, long, |_| None::<()>), None);
        assert!(since.elapsed() < long);
        Ok(())
    }

    fn migrate(pages: &Pages, new: &BalloonPage, old: &BalloonPage) -> Result<Migrated> {
        let (new, old) = (PageRef::of(new), PageRef::of(old));
        Traffic::migrate(pages, new, old, MigrateMode::Sync)
    }

    fn two_pages() -> Result<(BalloonPage, BalloonPage)> {
        let mut pages: BlockList<BalloonPage> = BlockList::new();
        for _ in 0..2 {
            pages.push(BalloonPage::alloc().ok_or(ENOMEM)?);
        }
        Ok((pages.pop().ok_or(ENOMEM)?, pages.pop().ok_or(ENOMEM)?))
    }
}
