// SPDX-License-Identifier: GPL-2.0

//! Requests on the inflate and deflate queues: arrays of page frame numbers, and the pages that
//! they name.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;

use crate::mm::{BalloonPage, BlockList, PageRef};
use crate::shared_abi::page::{self, Pfn};
use crate::virtio::{Either, OutgoingWithContext};

/// The largest number of page frame numbers in a request. Same as in the kernel's C driver
/// (`VIRTIO_BALLOON_ARRAY_PFNS_MAX`), which devices expect.
const PFNS_MAX: usize = 256;

/// Conversions between guest pages of `2^SHIFT` bytes and balloon pages of 4 KiB.
pub(crate) struct PageGeometry<const SHIFT: u32>;

/// The conversions for this guest.
pub(crate) type GuestGeometry = PageGeometry<{ PAGE_SHIFT as u32 }>;

impl<const SHIFT: u32> PageGeometry<SHIFT> {
    /// The number of balloon pages per guest page.
    pub(crate) const PFNS_PER_PAGE: usize = match page::balloon_pages_per_guest_page(SHIFT) {
        Some(pfns) => {
            assert!(
                pfns as usize <= PFNS_MAX,
                "a request has no room for a page"
            );
            pfns as usize
        }
        None => panic!("a page of the guest is smaller than a balloon page"),
    };

    /// The number of guest pages that fit into a request.
    pub(crate) const CAPACITY: usize = PFNS_MAX / Self::PFNS_PER_PAGE;

    /// Converts balloon pages to guest pages, rounded up.
    pub(crate) const fn guest_pages(pfns: u64) -> u64 {
        pfns.div_ceil(Self::PFNS_PER_PAGE as u64)
    }

    /// Converts guest pages to balloon pages.
    pub(crate) const fn pfns(pages: usize) -> u64 {
        (pages * Self::PFNS_PER_PAGE) as u64
    }

    /// Writes the page frame numbers of the guest page at `address` into `array`, at the position
    /// of the request's guest page number `nth`.
    ///
    /// Returns the number of bytes of the array that are valid then. Returns `None` if the array is
    /// full or a number has more than 32 bits; the numbers of other guest pages stay valid.
    fn encode(array: &mut [[u8; 4]], nth: usize, address: u64) -> Option<usize> {
        let from = nth.checked_mul(Self::PFNS_PER_PAGE)?;
        let to = from.checked_add(Self::PFNS_PER_PAGE)?;
        for (slot, part) in array.get_mut(from..to)?.iter_mut().zip(0u64..) {
            let address = address.checked_add(part << page::PFN_SHIFT)?;
            *slot = Pfn::from_address(address)?.to_le_bytes();
        }
        Some(to * size_of::<[u8; 4]>())
    }
}

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

    const EMPTY: [u8; 4] = [0xff; 4];

    #[test]
    fn page_numbers_are_little_endian() {
        let mut array = [EMPTY; 2];
        let address = 0x0102_0304 << page::PFN_SHIFT;
        assert_eq!(PageGeometry::<12>::encode(&mut array, 1, address), Some(8));
        assert_eq!(array, [EMPTY, [4, 3, 2, 1]]);
    }

    #[test]
    fn a_large_page_has_a_number_for_each_4_kib() {
        let mut array = [EMPTY; 9];
        assert_eq!(
            PageGeometry::<14>::encode(&mut array, 1, 0x10_c000),
            Some(32)
        );
        let numbers = array.map(u32::from_le_bytes);
        assert_eq!(numbers[3..], [!0, 0x10c, 0x10d, 0x10e, 0x10f, !0]);

        let mut array = [EMPTY; PFNS_MAX];
        let last = PageGeometry::<16>::CAPACITY - 1;
        assert_eq!(
            PageGeometry::<16>::encode(&mut array, last, 0x7f_0000),
            Some(1024)
        );
        let numbers = array.map(u32::from_le_bytes);
        assert_eq!(numbers[PFNS_MAX - 17..][..2], [!0, 0x7f0]);
        assert_eq!(numbers[PFNS_MAX - 1], 0x7ff);
    }

    #[test]
    fn a_guest_counts_in_its_own_pages() {
        assert_eq!(PageGeometry::<12>::PFNS_PER_PAGE, 1);
        assert_eq!(PageGeometry::<14>::PFNS_PER_PAGE, 4);
        assert_eq!(PageGeometry::<16>::PFNS_PER_PAGE, 16);
        assert_eq!(PageGeometry::<12>::CAPACITY, 256);
        assert_eq!(PageGeometry::<14>::CAPACITY, 64);
        assert_eq!(PageGeometry::<16>::CAPACITY, 16);
        for pfns in [0, 1, 15, 16, 17, 256] {
            assert_eq!(PageGeometry::<12>::guest_pages(pfns), pfns);
            assert_eq!(PageGeometry::<14>::guest_pages(pfns), (pfns + 3) / 4);
            assert_eq!(PageGeometry::<16>::guest_pages(pfns), (pfns + 15) / 16);
        }
        assert_eq!(PageGeometry::<14>::pfns(3), 12);
        assert_eq!(PageGeometry::<16>::pfns(256), 4096);
    }

    #[test]
    fn a_number_beyond_32_bits_is_refused() {
        let mut array = [EMPTY; 16];
        let last = 0xfff_ffff_f000;
        assert_eq!(PageGeometry::<12>::encode(&mut array, 0, last), Some(4));
        assert_eq!(PageGeometry::<14>::encode(&mut array, 0, last), None);
        assert_eq!(
            PageGeometry::<16>::encode(&mut array, 0, last - 0xe000),
            None
        );
        assert_eq!(
            PageGeometry::<16>::encode(&mut array, 0, last - 0xf000),
            Some(64)
        );
        assert_eq!(PageGeometry::<12>::encode(&mut array, 0, u64::MAX), None);
        assert_eq!(PageGeometry::<12>::encode(&mut array, 16, 0), None);
        assert_eq!(PageGeometry::<16>::encode(&mut array, usize::MAX, 0), None);
    }

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
