// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The messages of the protocol: one JSON value a line, in both directions.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::calls::AnyCall;

/// The version of the protocol. Host and guest are built from one tree, so a difference means a stale initramfs.
pub const VERSION: u32 = 1;

/// The name of the virtio-serial port that the agent uses, if the VMM has one.
pub const PORT_NAME: &str = "org.virtio-balloon-rs.agent";

/// The environment variable, set on the kernel's command line, that names a serial device to use instead of the port.
pub const PORT_VARIABLE: &str = "AGENT_PORT";

/// The environment variable that pins all processes and the kernel's compaction threads to the first processor.
///
/// User-mode Linux (7.3) does not notify other processors when it changes a page table: `flush_tlb_page` only marks the
/// page. During a page migration, a process on another processor can still write to the old page, and the write is
/// lost.
pub const ONE_PROCESSOR_VARIABLE: &str = "AGENT_ONE_PROCESSOR";

/// The folder of the modules that the connection to the host needs. The agent loads them in the order of their names.
pub const EARLY_MODULES: &str = "/early";

/// The first message. The agent sends it without a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The [`VERSION`] of the agent.
    pub version: u32,
    /// The release of the guest kernel.
    pub release: String,
    /// The size of a guest page, in bytes.
    pub page_size: u64,
}

/// A call from the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// The request's number. The response repeats it.
    pub id: u64,
    /// The call.
    pub call: AnyCall,
}

/// The agent's answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Response {
    /// The number of the request.
    pub id: u64,
    /// The result of the call.
    #[serde(flatten)]
    pub result: CallResult,
}

/// The result of a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallResult {
    /// The call succeeded, with its [`crate::calls::Call::Reply`].
    Done(Value),
    /// The call failed, with a message for people.
    Failed(String),
}
