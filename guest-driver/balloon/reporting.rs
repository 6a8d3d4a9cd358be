// SPDX-License-Identifier: GPL-2.0

//! Free page reporting.
//!
//! The kernel reports blocks of free pages; they go to the device as one buffer, and back to the
//! free lists when the buffer has come back, whichever way. Until then the kernel's work item
//! waits, and nothing else does. A queue without a ring takes no buffer: while the system sleeps,
//! and once the device is gone, reports fail at once.

use kernel::device;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::atomic::{AtomicFlag, Relaxed};
use kernel::sync::Arc;
use kernel::{dev_info, dev_warn};

use super::counters::Counters;
use super::timeout;
use crate::mm::{FreePages, PageReporting, ReportPages};
use crate::shared_abi::queue::Queue;
use crate::virtio::{AddError, AddFailure, Virtqueue};

/// The driver's side of free page reporting.
pub(crate) struct Reporting {
    dev: ARef<device::Device>,
    queue: Virtqueue<FreePages>,
    counters: Arc<Counters>,
    /// There was a line in the log about reports that the queue does not take.
    has_logged: AtomicFlag,
}

/// The registration, which takes the reports for as long as it lives.
///
/// To be dropped after the device's reset and [`Reporting::detach_unused`], or it may wait for the device.
pub(crate) type ReportingRegistration = Pin<KBox<PageReporting<Reporting>>>;

impl Reporting {
    /// Takes no reports yet. May sleep. Fails with `ENOMEM`.
    pub(crate) fn new(dev: ARef<device::Device>, counters: Arc<Counters>) -> Result<Arc<Self>> {
        let reporting = Self {
            dev,
            queue: Virtqueue::new(c"reporting")?,
            counters,
            has_logged: AtomicFlag::new(false),
        };
        Ok(Arc::new(reporting, GFP_KERNEL)?)
    }

    /// The reporting queue.
    pub(crate) fn queue(&self) -> &Virtqueue<FreePages> {
        &self.queue
    }

    /// Begins to take reports. The device must be ready, and nothing may fail after this. `None` if
    /// another device has them already: the balloon works without.
    ///
    /// May sleep. Fails with `ENOMEM`.
    pub(crate) fn register(self: &Arc<Self>) -> Result<Option<ReportingRegistration>> {
        // A report must fit into the ring: it has no indirect descriptors, which would have to be
        // allocated while free pages are out of reach.
        let registration = PageReporting::register(self.clone(), self.queue.entries());
        match KBox::pin_init(registration, GFP_KERNEL) {
            Ok(registration) => Ok(Some(registration)),
            Err(error) if error == ENOMEM => Err(error),
            Err(error) => {
                if error == EBUSY {
                    dev_warn!(
                        self.dev,
                        "another device has the reports of free pages; going on without\n"
                    );
                } else {
                    dev_warn!(
                        self.dev,
                        "cannot report free pages ({:?}); going on without\n",
                        error
                    );
                }
                Ok(None)
            }
        }
    }

    /// The device has used buffers. Any context but NMI.
    pub(crate) fn used(&self) {
        while let Some((pages, _)) = self.queue.get_buf() {
            self.end(pages, true);
        }
    }

    /// Gives back, as not reported, the pages that the device had when it was reset. To be called
    /// after each reset.
    pub(crate) fn detach_unused(&self) {
        while let Some(pages) = self.queue.detach_unused_buf() {
            self.end(pages, false);
        }
        self.has_logged.store(false, Relaxed);
    }
}

impl Reporting {
    fn end(&self, pages: FreePages, acknowledged: bool) {
        self.counters
            .reported(pages.blocks(), pages.pages(), acknowledged);
        if acknowledged {
            pages.acknowledge();
        }
    }
}

impl ReportPages for Reporting {
    fn report(&self, pages: FreePages) {
        if let Err(AddError { buffer, failure }) = self.queue.add(pages) {
            match failure {
                // Reports are one at a time, and the kernel comes again: when there is room or memory.
                AddFailure::Full | AddFailure::NoMemory | AddFailure::Gone => {}
                // It comes again for ever.
                AddFailure::Broken | AddFailure::Malformed => {
                    if !self.has_logged.xchg(true, Relaxed) {
                        dev_info!(
                            self.dev,
                            "reporting queue: free pages are not reported ({failure:?})\n"
                        );
                    }
                }
            }
            self.end(buffer, false);
            return;
        }
        self.counters.kicked(Queue::Reporting, self.queue.kick());
    }

    fn overdue(&self, seconds: u32) {
        // An interrupt may have got lost.
        self.used();
        if seconds == timeout::total_seconds() {
            let why = if self.queue.is_broken() {
                "the queue is broken"
            } else {
                "the device does not answer"
            };
            dev_warn!(
                self.dev,
                "{}: the free pages that were reported last stay with the device until it is reset\n",
                why
            );
        }
    }
}
