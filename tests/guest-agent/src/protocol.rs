// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The envelope: one JSON value a line, in both directions.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::calls::AnyCall;

/// The version of the protocol; host and guest are built from one tree, so a difference means a stale initramfs.
pub const VERSION: u32 = 1;

/// The virtio-serial port on which the guest speaks, where the VMM has one.
pub const PORT_NAME: &str = "org.virtio-balloon-rs.agent";

/// The environment variable (given on the kernel's command line) that names a serial device to speak on instead.
pub const PORT_VARIABLE: &str = "AGENT_PORT";

/// The environment variable that, if it is set, keeps all processes, and the kernel's thread that moves their pages, on the first
/// processor.
///
/// User-mode Linux (7.3) does not tell other processors when it changes a page table (`flush_tlb_page` only marks it): a process that
/// runs on another one while its page is moved still writes to the old place, and what it writes is lost.
pub const ONE_PROCESSOR_VARIABLE: &str = "AGENT_ONE_PROCESSOR";

/// The folder of modules that the guest needs before it can speak; it loads them in the order of their names.
pub const EARLY_MODULES: &str = "/early";

/// The first line, sent by the guest unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the guest's side.
    pub version: u32,
    /// The guest kernel's release.
    pub release: String,
    /// Bytes in a page of the guest.
    pub page_size: u64,
}

/// A call from the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Repeated by the response.
    pub id: u64,
    /// What to do.
    pub call: AnyCall,
}

/// The guest's answer to one [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Response {
    /// The request's number.
    pub id: u64,
    /// The outcome.
    #[serde(flatten)]
    pub result: CallResult,
}

/// How a call ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallResult {
    /// The call's own answer, as [`crate::calls::Call::Reply`] says.
    Done(Value),
    /// The call failed; a sentence for people.
    Failed(String),
}
