// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A model of guest, balloon device and migration. A model checker explores every interleaving of their steps.
//!
//! The two state machines of hinting are the real ones, [`shared_abi::hinting`]. The model adds their environment:
//!
//! - a guest of a few pages: its kernel allocates, writes and frees pages, and its driver offers free pages, keeps them
//!   and releases them ([`guest`]);
//! - config space: one command id, which may change several times before the driver reads it;
//! - the free page queue, which is bounded and in order;
//! - the device, which processes the messages on the queue ([`device`]);
//! - the migration: iterations, dirty syncs during which hints are invalid, switchover and the final iteration. A
//!   migration can be cancelled at any step, and another can follow ([`migration`]).
//!
//! [`Instance`] selects the driver, the write tracking and optionally one deliberate fault, a [`Mutation`]. The tests
//! show that the model finds each fault.
//!
//! The model does not cover concurrency inside one step, the stream, and time. The atomics of the dirty bitmap have
//! their own model, `tests/models/bitmap`.

#![forbid(unsafe_code)]

pub mod device;
pub mod guest;
pub mod instance;
pub mod migration;
pub mod properties;
pub mod state;

pub use instance::{Driver, Instance, Mutation, Step, Tracking};
pub use state::{ModelState, Page, PageState};
