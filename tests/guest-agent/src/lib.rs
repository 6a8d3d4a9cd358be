// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The protocol between the host and the guest agent, which is the first process of a test guest.
//!
//! The agent sends one [`protocol::Hello`] when the guest is up. After that the host sends calls and the agent answers
//! them, one JSON value a line, one call at a time. [`protocol::Request`] carries a number that [`protocol::Response`]
//! repeats. [`calls`] defines the calls, each with the type of its reply.
#![forbid(unsafe_code)]

pub mod calls;
pub mod pattern;
pub mod protocol;
pub mod ranges;
