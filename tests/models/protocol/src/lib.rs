// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest, balloon device and migration in small, for a model checker: every order in which their steps can
//! follow one another.
//!
//! The two state machines of hinting are the real ones, [`shared_abi::hinting`]; around them stands a model of
//! what they work with:
//!
//! - a guest of a few pages, whose kernel allocates, writes and frees them, and whose driver offers free ones,
//!   holds them and gives them back ([`guest`]);
//! - config space, one word that may change several times before the driver looks at it, and the free page
//!   queue, bounded and in order;
//! - the device, which takes from the queue ([`device`]);
//! - the migration: rounds of taking, reading and sending pages, dirty syncs with hints dead in between, the
//!   pause, the last sync, the rest; cancelled at any moment, and perhaps followed by another one
//!   ([`migration`]).
//!
//! [`Instance`] says which driver, which way of tracking writes, and what of it all is *broken on purpose*: a
//! model is worth as much as the mistakes that it finds.
//!
//! What it does not model: several processors inside one step (the bitmap's atomics have a model of their
//! own, in the crate `guest_migration`), the stream, and time.

#![forbid(unsafe_code)]

pub mod device;
pub mod guest;
pub mod instance;
pub mod migration;
pub mod properties;
pub mod state;

pub use instance::{Driver, Instance, Mutation, Step, Tracking};
pub use state::{ModelState, Page, PageState};
