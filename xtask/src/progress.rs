// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Progress messages on the terminal.

use std::fmt::Display;
use std::sync::OnceLock;
use std::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

/// Prints a line with the seconds since the first one.
pub fn say(text: impl Display) {
    let start = START.get_or_init(Instant::now);
    println!("[{:>6.1}s] {text}", start.elapsed().as_secs_f64());
}
