// SPDX-License-Identifier: GPL-2.0

//! OOM deflation: an OOM notifier deflates the balloon in the task that needs memory.
//!
//! The [`Resizer`] owns the balloon. The task shares the queues with the resize worker, but not the
//! worker's lock: see [`OnOutOfMemory`].

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;
use kernel::sync::Arc;

use super::super::balloon_queues::{BalloonQueues, Purpose};
use super::super::timeout;
use super::{Resizer, OOM_INFLATE_PAUSE};
use crate::mm::{any_node_is_below_watermark, has_one_node, NodesBelowWatermark, OnOutOfMemory};

/// The number of balloon pages of one OOM deflation. Same as in the kernel's C driver
/// (`VIRTIO_BALLOON_OOM_NR_PAGES`).
const OOM_NR_PAGES: u64 = 256;

/// Deflates the balloon before the kernel kills a process.
///
/// It runs within an allocation. So it takes only the lock of [`BalloonQueues`], allocates nothing,
/// and does not access config space, for which some transports allocate; the work item writes the
/// new size. Without `MUST_TELL_HOST`, the pages are free when the device has been notified. With
/// it, the task waits until the device has used the request or the wait times out. It also waits if
/// all requests are in flight. After a timeout, later calls neither deflate nor wait until a request
/// has released pages or can be sent again.
impl OnOutOfMemory for Resizer {
    fn oom_notify(self: &Arc<Self>, already_freed: usize) -> usize {
        self.oom_deflate_on(&NodesBelowWatermark::now(), already_freed)
    }
}

impl Resizer {
    /// Implements [`oom_notify`](OnOutOfMemory::oom_notify) for `nodes`: the nodes that are short
    /// of memory and have balloon pages.
    ///
    /// If `already_freed > 0`, the balloon does not deflate on a machine with one node, or if no
    /// node is short. With several nodes, the freed pages may be on a node that the allocating task
    /// cannot use.
    ///
    /// If no node is short and nothing was freed, see [`may_be_short`](Self::may_be_short).
    fn oom_deflate_on(
        self: &Arc<Self>,
        nodes: &NodesBelowWatermark,
        already_freed: usize,
    ) -> usize {
        let queues = self.queues();
        if queues.is_closed() || self.emptying.load(Relaxed) || queues.page_counts().is_empty() {
            return 0;
        }
        let before = queues.released();
        let freed = |queues: &BalloonQueues| {
            let freed = queues.released().wrapping_sub(before) as usize;
            Some(freed).filter(|freed| *freed > 0)
        };
        if !nodes.is_empty() {
            // Balloon pages would help, so pause inflation.
            self.oom_seen.store(true, Relaxed);
        }
        if already_freed > 0 && (nodes.is_empty() || has_one_node()) {
            return 0;
        }
        let all = NodesBelowWatermark::all();
        let is_unexplained = nodes.is_empty() && self.may_be_short(has_one_node());
        let nodes = if is_unexplained {
            self.oom_seen.store(true, Relaxed);
            &all
        } else {
            nodes
        };
        BalloonQueues::reap_used(&self.pages);
        if freed(queues).is_none() && !self.has_timed_out(before) {
            let has_request = nodes.is_empty() || self.send_oom_deflate(nodes);
            if !has_request {
                self.timed_out_at.store(before, Relaxed);
            } else if self.must_tell_host && queues.page_counts().deflating() > 0 {
                let answered = BalloonQueues::wait(&self.pages, timeout::host(), freed);
                if answered.is_none() {
                    self.timed_out_at.store(before, Relaxed);
                }
            }
        }
        let freed = freed(queues).unwrap_or(0);
        if is_unexplained && freed > 0 {
            let now = self.created.elapsed().as_millis() as u64;
            self.unexplained_oom_at.store(now, Relaxed);
        }
        // The work item writes the new size to config space.
        self.wake();
        freed
    }

    /// Returns whether an OOM deflation has timed out, no page was released since, and deflate or
    /// all requests are still in flight. `released` is the current value of
    /// [`BalloonQueues::released`].
    fn has_timed_out(&self, released: u64) -> bool {
        let queues = self.queues();
        let must_wait = queues.page_counts().deflating() > 0 || !queues.has_reserved();
        must_wait && self.timed_out_at.load(Relaxed) == released
    }

    /// Sends an OOM deflation with pages on `nodes`. Without `MUST_TELL_HOST` the pages are free on
    /// return. Returns `false` if the wait for a request has timed out.
    fn send_oom_deflate(&self, nodes: &NodesBelowWatermark) -> bool {
        let request =
            BalloonQueues::wait(&self.pages, timeout::host(), BalloonQueues::take_reserved);
        let Some(request) = request else {
            return false;
        };
        let sent =
            BalloonQueues::send_deflate(&self.pages, request, OOM_NR_PAGES, Purpose::Oom(nodes));
        if sent.is_ok_and(|pages| pages > 0) {
            self.counters.oom_deflations.add(1);
        }
        self.queues().notify();
        true
    }

    /// Returns whether the balloon deflates for an allocating task although no node is short.
    ///
    /// Other tasks may have freed pages since the allocation failed, or the task needs a larger
    /// free block. Without any page from the balloon, the kernel kills a process. With several
    /// nodes, the task may also be bound to a node that balloon pages cannot help. So the answer is
    /// no if a node without balloon pages is short, and until [`OOM_INFLATE_PAUSE`] has passed since
    /// such a task last got pages.
    fn may_be_short(&self, one_node: bool) -> bool {
        if one_node {
            return true;
        }
        let now = self.created.elapsed().as_millis() as u64;
        let last = self.unexplained_oom_at.load(Relaxed);
        let pause = OOM_INFLATE_PAUSE.as_millis() as u64;
        let is_due = last == u64::MAX || now.saturating_sub(last) >= pause;
        is_due && !any_node_is_below_watermark()
    }
}

#[kunit_tests(virtio_balloon_rs_oom_deflation)]
mod tests {
    use super::super::tests_rig::Rig;
    use super::super::GuestGeometry;
    use super::*;

    #[test]
    fn pages_that_others_release_are_not_counted_as_oom_deflation() -> Result {
        let rig = Rig::new(4, true)?;
        let resizer = &rig.resizer;
        rig.set_target(600);
        rig.settle();
        let nodes = NodesBelowWatermark::all();
        for purpose in [Purpose::Resize, Purpose::Oom(&nodes)] {
            let request = resizer.queues().take_reserved().ok_or(ENOENT)?;
            let sent = BalloonQueues::send_deflate(
                &resizer.pages,
                request,
                GuestGeometry::pfns(100),
                purpose,
            );
            assert_eq!(sent, Ok(100));
        }
        assert_eq!(rig.counters.oom_deflated_pages.get(), 0);
        resizer.queues().notify();
        assert!(rig.answer() && rig.answer());
        BalloonQueues::reap_used(&resizer.pages);
        assert_eq!(resizer.queues().released(), 200);
        assert_eq!(
            rig.counters.oom_deflated_pages.get(),
            GuestGeometry::pfns(100)
        );
        Ok(())
    }

    /// The host is stopped and has all requests. The first task waits for one, the next do not.
    #[test]
    fn one_task_without_memory_waits_for_a_host_that_has_all_requests() -> Result {
        let rig = Rig::new(4, false)?;
        let resizer = &rig.resizer;
        rig.set_target(300);
        rig.settle();
        let mut in_flight = KVec::new();
        while let Some(request) = resizer.queues().take_reserved() {
            in_flight.push(request, GFP_KERNEL)?;
        }
        let nodes = NodesBelowWatermark::all();
        assert!(!resizer.has_timed_out(resizer.queues().released()));
        assert_eq!(resizer.oom_deflate_on(&nodes, 0), 0);
        assert!(resizer.has_timed_out(resizer.queues().released()));
        assert_eq!(resizer.oom_deflate_on(&nodes, 0), 0);
        for request in in_flight {
            resizer.queues().put(request);
        }
        assert!(!resizer.has_timed_out(resizer.queues().released()));
        assert!(resizer.oom_deflate_on(&nodes, 0) > 0);
        Ok(())
    }

    /// Pages that another task frees in the meantime do not lead to an OOM kill.
    #[test]
    fn a_task_without_memory_gets_pages_although_no_node_is_short() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(300);
        rig.settle();
        assert!(rig.resizer.oom_deflate_on(&NodesBelowWatermark::none(), 0) > 0);
        assert!(rig.inflated() < 300);
        Ok(())
    }

    /// The task may be bound to a node without balloon pages.
    #[test]
    fn with_several_nodes_the_balloon_is_not_emptied_while_none_is_short() -> Result {
        let rig = Rig::new(4, false)?;
        assert!(rig.resizer.may_be_short(false));
        rig.resizer.unexplained_oom_at.store(0, Relaxed);
        assert!(!rig.resizer.may_be_short(false));
        assert!(rig.resizer.may_be_short(true));
        Ok(())
    }

    /// An empty balloon has nothing to give. A later target is not delayed.
    #[test]
    fn a_task_without_memory_does_not_pause_the_inflation_of_an_empty_balloon() -> Result {
        let rig = Rig::new(4, false)?;
        assert_eq!(
            rig.resizer.oom_deflate_on(&NodesBelowWatermark::none(), 0),
            0
        );
        rig.set_target(300);
        rig.settle();
        assert_eq!(rig.inflated(), 300);
        Ok(())
    }

    /// OOM deflation is skipped, and inflation pauses: it would compete with the same task.
    #[test]
    fn a_task_that_has_got_hinted_blocks_needs_no_balloon_pages() -> Result {
        let rig = Rig::new(4, false)?;
        rig.set_target(300);
        rig.settle();
        let given = rig.resizer.oom_deflate_on(&NodesBelowWatermark::all(), 4);
        if has_one_node() {
            assert_eq!((given, rig.inflated()), (0, 300));
        } else {
            assert!(given > 0);
        }
        let before = rig.inflated();
        rig.set_target(400);
        rig.settle();
        assert_eq!(rig.inflated(), before);
        Ok(())
    }
}
