// SPDX-License-Identifier: GPL-2.0

//! Free page reporting.
//!
//! The kernel reports batches of free blocks (`mm/page_reporting.c`). The driver sends each batch
//! as one buffer. The kernel takes the pages back when the device has used the buffer, or when the
//! buffer is recovered or refused. Only the kernel's work item waits for that. A queue without a
//! ring accepts no buffer: while the system sleeps, and after the device is unbound, reports fail
//! at once.

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

/// Free page reporting of one device.
pub(crate) struct Reporting {
    dev: ARef<device::Device>,
    queue: Virtqueue<FreePages>,
    counters: Arc<Counters>,
    /// Whether the driver has logged that the queue does not accept reports.
    has_logged: AtomicFlag,
}

/// The registration with the kernel. Dropping it ends the reports.
///
/// It must be dropped after the device reset and [`Reporting::detach_unused`]; otherwise the drop
/// may wait for the device.
pub(crate) type ReportingRegistration = Pin<KBox<PageReporting<Reporting>>>;

impl Reporting {
    /// Creates the reporting queue, without a registration. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(dev: ARef<device::Device>, counters: Arc<Counters>) -> Result<Arc<Self>> {
        let reporting = Self {
            dev,
            queue: Virtqueue::new(c"reporting")?,
            counters,
            has_logged: AtomicFlag::new(false),
        };
        Ok(Arc::new(reporting, GFP_KERNEL)?)
    }

    /// Returns the reporting queue.
    pub(crate) fn queue(&self) -> &Virtqueue<FreePages> {
        &self.queue
    }

    /// Registers with the kernel, which then reports free pages.
    ///
    /// The device must be ready, and no later step of the probe may fail. Returns `None` and logs a
    /// warning if the kernel refuses, for instance because another device is registered. The
    /// balloon works without reporting. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn register(self: &Arc<Self>) -> Result<Option<ReportingRegistration>> {
        // A report must fit into the ring. Indirect descriptors, which the driver declines, would
        // have to be allocated while the reported pages are unavailable.
        let registration = PageReporting::register(self.clone(), self.queue.entries());
        match KBox::pin_init(registration, GFP_KERNEL) {
            Ok(registration) => Ok(Some(registration)),
            Err(error) if error == ENOMEM => Err(error),
            Err(error) => {
                if error == EBUSY {
                    dev_warn!(
                        self.dev,
                        "free page reporting: another device is registered; continuing without it\n"
                    );
                } else {
                    dev_warn!(
                        self.dev,
                        "free page reporting: registration failed ({:?}); continuing without it\n",
                        error
                    );
                }
                Ok(None)
            }
        }
    }

    /// Handles used buffers: completes their reports. Any context but NMI.
    pub(crate) fn used(&self) {
        while let Some((pages, _)) = self.queue.get_buf() {
            self.end(pages, true);
        }
    }

    /// Recovers the reports in flight after a device reset. Their pages count as not reported.
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
                // The kernel reports one batch at a time and retries later.
                AddFailure::Full | AddFailure::NoMemory | AddFailure::Gone => {}
                // The kernel retries forever, so log this once.
                AddFailure::Broken | AddFailure::Malformed => {
                    if !self.has_logged.xchg(true, Relaxed) {
                        dev_info!(
                            self.dev,
                            "reporting queue: cannot add a buffer ({failure:?}); free pages are not reported\n"
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
        // An interrupt may be lost.
        self.used();
        if seconds == timeout::total_seconds() {
            let why = if self.queue.is_broken() {
                "the queue is broken"
            } else {
                "the device does not answer"
            };
            dev_warn!(
                self.dev,
                "{}: the free pages of the last report stay with the device until its reset\n",
                why
            );
        }
    }
}
