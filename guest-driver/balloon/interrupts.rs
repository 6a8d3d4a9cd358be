// SPDX-License-Identifier: GPL-2.0

//! The interrupt handler of the virtqueues.

use kernel::sync::Arc;

use super::counters::Counters;
use super::hinting::Hinting;
use super::reporting::Reporting;
use super::resizer::Resizer;
use super::statistics::Statistics;
use crate::shared_abi::features::Features;
use crate::shared_abi::queue::Queue;
use crate::virtio::QueueHandler;

/// A handler that starts the work item of the queue that interrupts.
///
/// It disables further interrupts of the queue; the work item enables them again. The reporting
/// queue has no work item, so the handler completes its reports.
pub(crate) struct Interrupts {
    resizer: Arc<Resizer>,
    hinting: Option<Arc<Hinting>>,
    statistics: Option<Arc<Statistics>>,
    reporting: Option<Arc<Reporting>>,
    counters: Arc<Counters>,
    features: Features,
}

impl Interrupts {
    pub(crate) fn new(
        resizer: Arc<Resizer>,
        hinting: Option<Arc<Hinting>>,
        statistics: Option<Arc<Statistics>>,
        reporting: Option<Arc<Reporting>>,
        counters: Arc<Counters>,
        features: Features,
    ) -> Self {
        Self {
            resizer,
            hinting,
            statistics,
            reporting,
            counters,
            features,
        }
    }
}

impl QueueHandler for Interrupts {
    fn used(&self, queue: u16) {
        let queue = Queue::from_index(usize::from(queue), self.features);
        if let Some(queue) = queue {
            self.counters.interrupted(queue);
        }
        match queue {
            Some(Queue::Inflate) => {
                self.resizer.inflate_queue().disable_callback();
                self.resizer.used();
            }
            Some(Queue::Deflate) => {
                self.resizer.deflate_queue().disable_callback();
                self.resizer.used();
            }
            Some(Queue::FreePage) => {
                if let Some(hinting) = &self.hinting {
                    hinting.queue().disable_callback();
                    hinting.used();
                }
            }
            Some(Queue::Stats) => {
                if let Some(statistics) = &self.statistics {
                    statistics.queue().disable_callback();
                    statistics.stats_requested();
                }
            }
            Some(Queue::Reporting) => {
                if let Some(reporting) = &self.reporting {
                    reporting.used();
                }
            }
            None => {}
        }
    }
}
