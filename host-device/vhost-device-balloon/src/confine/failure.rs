// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages for errors of the host.

use std::fmt::Display;

/// Returns a message for an error of one step.
pub(super) fn at<E: Display>(step: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("{step}: {error}")
}
