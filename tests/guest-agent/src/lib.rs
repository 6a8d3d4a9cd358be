// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host and the first process of a test guest say to each other.
//!
//! The guest writes one [`protocol::Hello`] when it is up. From then on the host asks and the guest answers, one JSON
//! value a line, one call at a time: [`protocol::Request`] carries a number that [`protocol::Response`] repeats.
//! [`calls`] holds the calls, each with the type of its answer.
#![forbid(unsafe_code)]

pub mod calls;
pub mod pattern;
pub mod protocol;
pub mod ranges;
