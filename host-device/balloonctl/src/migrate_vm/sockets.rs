// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The QMP sockets of the peers.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The QMP sockets of the peers.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Sockets {
    /// That of the QEMU that runs the guest.
    pub source: PathBuf,
    /// That of the QEMU that waits for the guest.
    pub destination: PathBuf,
    /// That of the daemon at the source.
    pub daemon: PathBuf,
    /// Timeout for connecting, and for each answer.
    pub timeout: Duration,
}
