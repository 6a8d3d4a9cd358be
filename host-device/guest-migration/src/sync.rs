// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The atomics of the dirty bitmap. The crate `bitmap-model` compiles the bitmap with modelled atomics instead.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
