// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands, one module each, and the display of progress.

pub mod discard;
pub mod hint;
pub mod migrate;
pub mod progress;
pub mod receive;
pub mod status;
pub mod target;
