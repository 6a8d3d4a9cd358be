// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far a receiver has come, for those who look on.

use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::sync::Arc;

/// What a receiver does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceivePhase {
    /// Waits for a sender.
    Waiting,
    /// Takes a stream in.
    Receiving,
    /// Has all of it, and compares it with the sender's digest.
    Checking,
    /// Has ended, well or not.
    Ended,
}

/// How far a receiver has come. Copies show the same receiver.
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
    /// What it does.
    pub fn phase(&self) -> ReceivePhase {
        match self.0.phase.load(Ordering::Relaxed) {
            0 => ReceivePhase::Waiting,
            1 => ReceivePhase::Receiving,
            2 => ReceivePhase::Checking,
            _ => ReceivePhase::Ended,
        }
    }

    /// Bytes of the stream that were taken in, of all channels.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Pages with content that were written, each as often as it was.
    pub fn pages(&self) -> u64 {
        self.0.pages.load(Ordering::Relaxed)
    }

    /// Pages of zeros, each as often as they came.
    pub fn zeros(&self) -> u64 {
        self.0.zeros.load(Ordering::Relaxed)
    }

    /// Rounds that have ended.
    pub fn iterations(&self) -> u64 {
        self.0.iterations.load(Ordering::Relaxed)
    }

    /// Pages of all blocks; 0 until a sender has said it.
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
