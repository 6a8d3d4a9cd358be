// SPDX-License-Identifier: GPL-2.0

//! Requests on the inflate and deflate queues.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;

use crate::mm::{BalloonPage, BlockList};
use crate::shared_abi::page::{self, Pfn};
use crate::virtio::Accompanied;

/// How many page numbers a request has at most: as many as in the kernel's own balloon driver,
/// which is what devices know.
const PFNS_MAX: usize = 256;

/// How many balloon pages one page of the guest is.
const PFNS_PER_PAGE: usize = match page::balloon_pages_per(PAGE_SHIFT as u32) {
    Some(pfns) => pfns as usize,
    None => panic!("a page of the guest is smaller than a balloon page"),
};

const _: () = assert!(PFNS_PER_PAGE <= PFNS_MAX);

/// Page numbers as the device reads them.
type PfnArray = [[u8; 4]; PFNS_MAX];

/// An array of page numbers and the pages that it is about.
///
/// The pages go where the request goes: while it is in flight, nobody can use or free them.
pub(crate) struct Request(Accompanied<PfnArray, BlockList<BalloonPage>>);

/// What travels on the inflate and deflate queues.
pub(crate) type RequestBuffer = Accompanied<PfnArray, BlockList<BalloonPage>>;

impl Request {
    /// Allocates a request without pages. May sleep.
    pub(crate) fn new() -> Result<Self> {
        let array = [[0; 4]; PFNS_MAX];
        Ok(Self(Accompanied::new(array, BlockList::new(), GFP_KERNEL)?))
    }

    /// How many of the guest's pages a request has room for.
    pub(crate) const fn capacity() -> usize {
        PFNS_MAX / PFNS_PER_PAGE
    }

    /// How many balloon pages the request is about.
    pub(crate) fn pfns(&self) -> u64 {
        (self.0.companion().len() * PFNS_PER_PAGE) as u64
    }

    /// Whether the request is about no page.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.companion().is_empty()
    }

    /// Adds a page. Gives it back if there is no room for it, or if its number has more than the 32
    /// bits that the device can read.
    pub(crate) fn push(&mut self, page: BalloonPage) -> Result<(), BalloonPage> {
        let (array, pages) = self.0.parts();
        let from = pages.len() * PFNS_PER_PAGE;
        let room = array.iter_mut().skip(from).take(PFNS_PER_PAGE);
        if room.len() < PFNS_PER_PAGE || encode(room, page.address()).is_none() {
            return Err(page);
        }
        pages.push(page);
        self.0
            .set_length((from + PFNS_PER_PAGE) * size_of::<[u8; 4]>());
        Ok(())
    }

    /// Takes the pages out, and leaves the request empty.
    pub(crate) fn take(&mut self) -> BlockList<BalloonPage> {
        self.0.set_length(0);
        self.0.parts().1.take()
    }

    /// The request as a buffer for a queue.
    pub(crate) fn into_buffer(self) -> RequestBuffer {
        self.0
    }

    /// The request that a queue gave back.
    pub(crate) fn from_buffer(buffer: RequestBuffer) -> Self {
        Self(buffer)
    }
}

/// How many pages of the guest `pfns` balloon pages are, rounded up.
pub(crate) const fn guest_pages(pfns: u64) -> u64 {
    pfns.div_ceil(PFNS_PER_PAGE as u64)
}

/// Writes into `room` the numbers of the balloon pages from `address` on. `None`, and nothing of
/// use written, if one of them does not fit.
fn encode<'a>(room: impl Iterator<Item = &'a mut [u8; 4]>, address: u64) -> Option<()> {
    for (slot, nth) in room.zip(0u64..) {
        let address = address.checked_add(nth << page::PFN_SHIFT)?;
        *slot = Pfn::containing(address)?.to_le_bytes();
    }
    Some(())
}

#[kunit_tests(virtio_balloon_rs_request)]
mod tests {
    use super::*;

    #[test]
    fn page_numbers_count_on_from_the_first_and_are_little_endian() {
        let mut room = [[0xff; 4]; 3];
        assert_eq!(
            encode(room.iter_mut(), 0x0102_0304 << page::PFN_SHIFT),
            Some(())
        );
        assert_eq!(room, [[4, 3, 2, 1], [5, 3, 2, 1], [6, 3, 2, 1]]);
    }

    #[test]
    fn a_number_beyond_32_bits_is_refused() {
        let mut room = [[0; 4]; 2];
        assert_eq!(encode(room.iter_mut().take(1), 0xfff_ffff_f000), Some(()));
        assert_eq!(encode(room.iter_mut(), 0xfff_ffff_f000), None);
        assert_eq!(encode(room.iter_mut(), u64::MAX), None);
    }

    #[test]
    fn a_request_takes_pages_until_it_is_full_and_gives_them_back() -> Result {
        let mut request = Request::new()?;
        assert!(request.is_empty());
        for _ in 0..Request::capacity() {
            let page = BalloonPage::alloc().ok_or(ENOMEM)?;
            assert!(request.push(page).is_ok());
        }
        assert_eq!(request.pfns(), PFNS_MAX as u64);
        let page = BalloonPage::alloc().ok_or(ENOMEM)?;
        assert!(request.push(page).is_err());
        assert_eq!(request.take().len(), Request::capacity());
        assert!(request.is_empty());
        assert_eq!(request.pfns(), 0);
        Ok(())
    }
}
