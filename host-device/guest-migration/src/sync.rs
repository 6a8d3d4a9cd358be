// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The atomics that the bitmap is made of: a model of them takes their place in the crate `bitmap-model`.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
