// SPDX-License-Identifier: GPL-2.0

//! Page migration: compaction moves a page of the balloon.
//!
//! The task that migrates a page sends the requests and waits for the device. It owns the slot of
//! its request until the request is idle again. After a timeout no task waits, and
//! [`BalloonQueues::reap_used`] completes the request.

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::super::page_counts::Step;
use super::super::page_geometry::GuestGeometry;
use super::super::request::{AnyRequest, PageMigrationRequest};
use super::super::timeout;
use super::in_flight::PageMigration;
use super::{BalloonQueues, Pages, SendError};
use crate::mm::{MigrateMode, MigratePages, Migrated, PageRef};
use crate::shared_abi::queue::Queue;
use crate::virtio::{AddError, AddFailure};

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
        if !this.must_tell_host {
            this.skip_deflate_interrupt();
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

    /// Asks the device for no interrupt of the deflate queue, if no task waits and the resize worker
    /// has no request there.
    ///
    /// The next task that reaps the queues completes the requests of page migrations. The resize
    /// worker enables the interrupt again after it has sent a request.
    fn skip_deflate_interrupt(&self) {
        let in_flight = self.in_flight.lock();
        if in_flight.page_counts.deflating() == 0 && !self.has_waiters() {
            self.deflate.disable_callback();
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

#[kunit_tests(virtio_balloon_rs_page_migration)]
mod tests {
    use super::super::in_flight::MAX_PAGE_MIGRATIONS;
    use super::super::tests_rig::*;
    use super::*;
    use crate::virtio::kunit_device::BoundTestDevice;

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
}
