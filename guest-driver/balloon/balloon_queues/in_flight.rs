// SPDX-License-Identifier: GPL-2.0

//! The state of all requests of a balloon: spare, in flight, and in page migration.
//!
//! The lock of [`BalloonQueues`](super::BalloonQueues) protects it. A buffer in flight belongs to
//! its virtqueue; this state owns the other requests.

use kernel::prelude::*;

use super::super::page_counts::PageCounts;
use super::super::request::{PageMigrationRequest, Request};

/// The number of page migrations that can be in flight.
pub(super) const MAX_PAGE_MIGRATIONS: usize = 8;

pub(super) struct InFlight {
    pub(super) page_counts: PageCounts,
    /// The requests that are not in flight. Has capacity for all.
    pub(super) spare: KVec<Request>,
    pub(super) page_migrations: [PageMigration; MAX_PAGE_MIGRATIONS],
    /// The number of guest pages that were deflated and freed since the driver was bound.
    pub(super) released: u64,
    /// The number of used buffers since the driver was bound. Wraps.
    pub(super) used_buffers: u64,
    /// The value of `used_buffers` when a page migration last timed out before it was sent.
    pub(super) timed_out_at: Option<u64>,
}

/// The state of a page migration request.
pub(super) enum PageMigration {
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

impl InFlight {
    pub(super) fn put(&mut self, request: Request) {
        // Cannot fail: `spare` has capacity for all requests.
        let _ = self.spare.push_within_capacity(request);
    }

    /// Frees the pages of a completed request. Returns the number of guest pages: 0 if they were
    /// freed when the request was sent.
    pub(super) fn release(&mut self, request: &mut Request) -> usize {
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
    pub(super) fn take_page_migration(&mut self) -> Result<Option<PageMigrationRequest>> {
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
