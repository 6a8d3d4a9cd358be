// SPDX-License-Identifier: GPL-2.0

//! Balloons on a test device, for the tests of the queues and of page migration.

use kernel::prelude::*;
use kernel::sync::Arc;

use super::super::counters::Counters;
use super::super::page_geometry::GuestGeometry;
use super::super::request::Request;
use super::{BalloonQueues, Pages, SendError};
use crate::mm::{
    BalloonPage, BalloonPages, BlockList, MigrateMode, MigratePages, Migrated, PageRef,
};
use crate::shared_abi::page::PFN_SHIFT;
use crate::virtio::kunit_device::{BoundTestDevice, CountingHandler};

pub(super) const INFLATE: usize = 0;
pub(super) const DEFLATE: usize = 1;

impl From<SendError> for Error {
    fn from(error: SendError) -> Self {
        pr_err!("not sent: {:?}\n", error);
        EIO
    }
}

/// Creates an empty balloon with `MUST_TELL_HOST`, and its device.
pub(super) fn balloon() -> Result<(BoundTestDevice, Pin<KBox<Pages>>)> {
    balloon_of(true)
}

pub(super) fn balloon_of(must_tell_host: bool) -> Result<(BoundTestDevice, Pin<KBox<Pages>>)> {
    balloon_on(BoundTestDevice::new()?, must_tell_host)
}

pub(super) fn balloon_on(
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

pub(super) fn number(address: u64) -> u32 {
    (address >> PFN_SHIFT) as u32
}

/// Returns a request with `count` new pages, and the page frame number of the first one.
pub(super) fn request(queues: &BalloonQueues, count: usize) -> Result<(Request, u32)> {
    let mut request = queues.take_spare().ok_or(ENOENT)?;
    let mut first = None;
    for _ in 0..count {
        let page = BalloonPage::alloc().ok_or(ENOMEM)?;
        first = first.or(Some(number(page.address())));
        request.push(page).map_err(|_| EINVAL)?;
    }
    Ok((request, first.ok_or(EINVAL)?))
}

pub(super) fn inflate(bound: &BoundTestDevice, pages: &Pages, count: usize) -> Result {
    let queues = pages.migrator();
    let (request, first) = request(queues, count)?;
    queues.send_inflate(request)?;
    assert_eq!(queues.page_counts().inflated(), 0);
    assert_eq!(bound.device.use_buffer(INFLATE), Some(first));
    BalloonQueues::reap_used(pages);
    assert_eq!(queues.page_counts().inflated(), GuestGeometry::pfns(count));
    Ok(())
}

pub(super) fn migrate(pages: &Pages, new: &BalloonPage, old: &BalloonPage) -> Result<Migrated> {
    let (new, old) = (
        PageRef::from_balloon_page(new),
        PageRef::from_balloon_page(old),
    );
    BalloonQueues::migrate(pages, new, old, MigrateMode::Sync)
}

pub(super) fn two_pages() -> Result<(BalloonPage, BalloonPage)> {
    let mut pages: BlockList<BalloonPage> = BlockList::new();
    for _ in 0..2 {
        pages.push(BalloonPage::alloc().ok_or(ENOMEM)?);
    }
    Ok((pages.pop().ok_or(ENOMEM)?, pages.pop().ok_or(ENOMEM)?))
}
