// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The progress of a receiver, for other threads.
//!
//! All counters are atomics with relaxed ordering: each is exact, but several of them are not read as one snapshot.

use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::sync::Arc;

/// The phase of a receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceivePhase {
    /// The receiver waits for the channels of a sender.
    Waiting,
    /// The receiver receives records.
    Receiving,
    /// The receiver has the whole stream and verifies it.
    Checking,
    /// The receiver has succeeded or failed.
    Ended,
}

/// The progress of a receiver. Clones show the same receiver.
#[derive(Debug, Clone, Default)]
pub struct ReceiveProgress(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    phase: AtomicU8,
    bytes: AtomicU64,
    pages: AtomicU64,
    zeros: AtomicU64,
    iterations: AtomicU64,
    total: AtomicU64,
}

impl ReceiveProgress {
    /// Returns the current phase.
    pub fn phase(&self) -> ReceivePhase {
        match self.0.phase.load(Ordering::Relaxed) {
            0 => ReceivePhase::Waiting,
            1 => ReceivePhase::Receiving,
            2 => ReceivePhase::Checking,
            _ => ReceivePhase::Ended,
        }
    }

    /// Returns the number of bytes received, of all channels.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Returns the number of pages with content. A page that is received several times counts each time.
    pub fn pages(&self) -> u64 {
        self.0.pages.load(Ordering::Relaxed)
    }

    /// Returns the number of zero pages. A page that is received several times counts each time.
    pub fn zeros(&self) -> u64 {
        self.0.zeros.load(Ordering::Relaxed)
    }

    /// Returns how many iterations have ended.
    pub fn iterations(&self) -> u64 {
        self.0.iterations.load(Ordering::Relaxed)
    }

    /// Returns the number of pages of all RAM blocks, or 0 before the headers of all channels are read.
    pub fn total(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }

    pub(super) fn set_phase(&self, phase: ReceivePhase) {
        let number = match phase {
            ReceivePhase::Waiting => 0,
            ReceivePhase::Receiving => 1,
            ReceivePhase::Checking => 2,
            ReceivePhase::Ended => 3,
        };
        self.0.phase.store(number, Ordering::Relaxed);
    }

    pub(super) fn set_total(&self, pages: u64) {
        self.0.total.store(pages, Ordering::Relaxed);
    }

    pub(super) fn set_iterations(&self, iterations: u64) {
        self.0.iterations.store(iterations, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64, pages: u64, zeros: u64) {
        self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.0.pages.fetch_add(pages, Ordering::Relaxed);
        self.0.zeros.fetch_add(zeros, Ordering::Relaxed);
    }
}
