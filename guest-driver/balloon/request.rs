// SPDX-License-Identifier: GPL-2.0

//! Requests on the inflate and deflate queues: arrays of page frame numbers, and the pages that
//! they name.
//!
//! A request owns its pages, or a reference to its page, until they are taken.

use kernel::prelude::*;

use super::page_geometry::{GuestGeometry, PFNS_MAX};
use crate::mm::{BalloonPage, BlockList, PageRef};
use crate::virtio::{Either, OutgoingWithContext};

/// A buffer on the inflate or deflate queue.
pub(crate) type PageBuffer = Either<RequestBuffer, PageMigrationBuffer>;

type RequestBuffer = OutgoingWithContext<[[u8; 4]; PFNS_MAX], RequestPages>;
type PageMigrationBuffer =
    OutgoingWithContext<[[u8; 4]; GuestGeometry::PFNS_PER_PAGE], MigratingPage>;

/// The pages of a request.
pub(crate) struct RequestPages {
    pages: BlockList<BalloonPage>,
    /// The number of guest pages that the array names, including those that were taken
    /// unacknowledged.
    count: usize,
    /// Whether the request is an OOM deflation.
    for_oom: bool,
}

/// A request with an array of page frame numbers and the pages that they name.
///
/// The request owns the pages: while it is in flight, no other code can use or free them, unless
/// they were [taken unacknowledged](Self::take_unacked).
pub(crate) struct Request(RequestBuffer);

impl Request {
    /// Allocates a request without pages. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Self> {
        let request_pages = RequestPages {
            pages: BlockList::new(),
            count: 0,
            for_oom: false,
        };
        Ok(Self(OutgoingWithContext::new(
            [[0; 4]; PFNS_MAX],
            request_pages,
            GFP_KERNEL,
        )?))
    }

    /// Returns the number of balloon pages that the request names.
    pub(crate) fn pfns(&self) -> u64 {
        GuestGeometry::pfns(self.0.context().count)
    }

    /// Returns whether the request names no page.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.context().count == 0
    }

    /// Adds a page.
    ///
    /// # Errors
    ///
    /// Returns the page if the request is full, or if its page frame number has more than the 32
    /// bits of the format.
    pub(crate) fn push(&mut self, page: BalloonPage) -> Result<(), BalloonPage> {
        let (array, request_pages) = self.0.parts_mut();
        match GuestGeometry::encode(array, request_pages.count, page.address()) {
            Some(length) => {
                request_pages.pages.push(page);
                request_pages.count += 1;
                self.0.set_length(length);
                Ok(())
            }
            None => Err(page),
        }
    }

    /// Marks the request as an OOM deflation until its pages are [taken](Self::take).
    pub(crate) fn set_for_oom(&mut self) {
        self.0.parts_mut().1.for_oom = true;
    }

    /// Returns whether the request is an OOM deflation.
    pub(crate) fn is_for_oom(&self) -> bool {
        self.0.context().for_oom
    }

    /// Takes the pages and empties the request.
    pub(crate) fn take(&mut self) -> BlockList<BalloonPage> {
        self.0.set_length(0);
        let (_, request_pages) = self.0.parts_mut();
        request_pages.count = 0;
        request_pages.for_oom = false;
        request_pages.pages.take()
    }

    /// Takes the pages, but keeps their page frame numbers in the request: the guest uses the pages
    /// without waiting until the device has used the request.
    pub(crate) fn take_unacked(&mut self) -> BlockList<BalloonPage> {
        self.0.parts_mut().1.pages.take()
    }

    /// Converts the request to a buffer.
    pub(crate) fn into_buffer(self) -> PageBuffer {
        Either::Left(self.0)
    }
}

/// The page of a page migration request.
pub(crate) struct MigratingPage {
    slot: usize,
    page: Option<PageRef>,
    /// Whether the page is deflated and no page replaces it.
    is_deflate: bool,
}

/// A request for page migration: one page, with a reference to it, so that the page is not freed
/// while the request is in flight.
pub(crate) struct PageMigrationRequest(PageMigrationBuffer);

impl PageMigrationRequest {
    /// Allocates a request without a page. `slot` identifies the request. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(slot: usize) -> Result<Self> {
        let array = [[0; 4]; GuestGeometry::PFNS_PER_PAGE];
        let migrating_page = MigratingPage {
            slot,
            page: None,
            is_deflate: false,
        };
        Ok(Self(OutgoingWithContext::new(
            array,
            migrating_page,
            GFP_KERNEL,
        )?))
    }

    /// Returns the slot that identifies the request.
    pub(crate) fn slot(&self) -> usize {
        self.0.context().slot
    }

    /// Sets the page.
    ///
    /// # Errors
    ///
    /// Returns the page if its page frame number has more than the 32 bits of the format.
    pub(crate) fn set(&mut self, page: PageRef) -> Result<(), PageRef> {
        let (array, migrating_page) = self.0.parts_mut();
        match GuestGeometry::encode(array, 0, page.address()) {
            Some(length) => {
                migrating_page.page = Some(page);
                self.0.set_length(length);
                Ok(())
            }
            None => Err(page),
        }
    }

    /// Takes the page and empties the request.
    pub(crate) fn take(&mut self) -> Option<PageRef> {
        self.0.set_length(0);
        let (_, migrating_page) = self.0.parts_mut();
        migrating_page.is_deflate = false;
        migrating_page.page.take()
    }

    /// Takes the page, but keeps its page frame numbers in the request: see
    /// [`Request::take_unacked`].
    pub(crate) fn take_unacked(&mut self) -> Option<PageRef> {
        self.0.parts_mut().1.page.take()
    }

    /// Marks the page as deflated without a replacement, until it is [taken](Self::take).
    pub(crate) fn set_deflate(&mut self) {
        self.0.parts_mut().1.is_deflate = true;
    }

    /// Returns whether the page is deflated without a replacement.
    pub(crate) fn is_deflate(&self) -> bool {
        self.0.context().is_deflate
    }

    /// Converts the request to a buffer.
    pub(crate) fn into_buffer(self) -> PageBuffer {
        Either::Right(self.0)
    }
}

/// A request from a used or recovered buffer.
pub(crate) enum AnyRequest {
    /// A request to inflate or deflate.
    Request(Request),
    /// A request for page migration.
    PageMigration(PageMigrationRequest),
}

impl From<PageBuffer> for AnyRequest {
    fn from(buffer: PageBuffer) -> Self {
        match buffer {
            Either::Left(buffer) => Self::Request(Request(buffer)),
            Either::Right(buffer) => Self::PageMigration(PageMigrationRequest(buffer)),
        }
    }
}

#[kunit_tests(virtio_balloon_rs_request)]
mod tests {
    use super::*;

    #[test]
    fn a_request_takes_pages_until_it_is_full_and_gives_them_back() -> Result {
        let mut request = Request::new()?;
        assert!(request.is_empty());
        for _ in 0..GuestGeometry::CAPACITY {
            let page = BalloonPage::alloc().ok_or(ENOMEM)?;
            assert!(request.push(page).is_ok());
        }
        assert_eq!(request.pfns(), PFNS_MAX as u64);
        let page = BalloonPage::alloc().ok_or(ENOMEM)?;
        assert!(request.push(page).is_err());
        assert_eq!(request.take().len(), GuestGeometry::CAPACITY);
        assert!(request.is_empty());
        assert_eq!(request.pfns(), 0);
        Ok(())
    }

    #[test]
    fn a_request_counts_pages_that_were_taken_unacked() -> Result {
        let mut request = Request::new()?;
        for _ in 0..3 {
            let page = BalloonPage::alloc().ok_or(ENOMEM)?;
            assert!(request.push(page).is_ok());
        }
        assert_eq!(request.take_unacked().len(), 3);
        assert_eq!(request.pfns(), GuestGeometry::pfns(3));
        assert!(!request.is_empty());
        assert!(request.take().is_empty());
        assert!(request.is_empty());
        Ok(())
    }
}
