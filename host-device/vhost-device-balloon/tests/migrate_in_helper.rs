// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tests of `migrate.rs`, with a confined daemon whose migrations run in a helper process.

#[path = "migrate.rs"]
mod migrate;
