// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far a receiver has come, for those who look on.

use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::sync::Arc;

/// What a receiver does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
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
pub struct Progress(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    phase: AtomicU8,
    bytes: AtomicU64,
    pages: AtomicU64,
    zeros: AtomicU64,
    rounds: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// What it does.
    pub fn phase(&self) -> Phase {
        match self.0.phase.load(Ordering::Relaxed) {
            0 => Phase::Waiting,
            1 => Phase::Receiving,
            2 => Phase::Checking,
            _ => Phase::Ended,
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
    pub fn rounds(&self) -> u64 {
        self.0.rounds.load(Ordering::Relaxed)
    }

    /// Pages of all blocks; 0 until a sender has said it.
    pub fn total(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        let number = match phase {
            Phase::Waiting => 0,
            Phase::Receiving => 1,
            Phase::Checking => 2,
            Phase::Ended => 3,
        };
        self.0.phase.store(number, Ordering::Relaxed);
    }

    pub(super) fn set_total(&self, pages: u64) {
        self.0.total.store(pages, Ordering::Relaxed);
    }

    pub(super) fn set_rounds(&self, rounds: u64) {
        self.0.rounds.store(rounds, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64, pages: u64, zeros: u64) {
        self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.0.pages.fetch_add(pages, Ordering::Relaxed);
        self.0.zeros.fetch_add(zeros, Ordering::Relaxed);
    }
}
