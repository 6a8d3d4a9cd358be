// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The distribution of pages over channels.

use super::format::RECORD_PAGES;
use crate::PageRun;

/// Splits a run at multiples of [`RECORD_PAGES`]. Each part fits into one record and is sent on one channel.
pub(super) fn stripes(run: PageRun) -> impl Iterator<Item = PageRun> {
    let end = run.end();
    std::iter::successors(Some(run.first), move |at| {
        (at / RECORD_PAGES + 1).checked_mul(RECORD_PAGES)
    })
    .take_while(move |at| *at < end)
    .map(move |first| {
        let next = (first / RECORD_PAGES + 1).saturating_mul(RECORD_PAGES);
        PageRun {
            block: run.block,
            first,
            pages: next.min(end) - first,
        }
    })
}

/// Returns the index of the channel, out of `channels`, on which a [stripe](stripes) is sent.
pub(super) fn channel_of(run: PageRun, channels: usize) -> usize {
    let stripe = (run.first / RECORD_PAGES).wrapping_add(run.block as u64);
    usize::try_from(stripe % channels.max(1) as u64).unwrap_or(0)
}
