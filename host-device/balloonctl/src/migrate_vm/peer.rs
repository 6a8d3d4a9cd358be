// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The peers of a migration: who executes a command.

use serde::{Deserialize, Serialize};

/// The peer that executes a command.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// The QEMU that runs the guest.
    Source,
    /// The QEMU that waits for the guest.
    Destination,
    /// Our daemon at the source.
    Daemon,
    /// This program.
    Here,
}

impl Peer {
    /// Returns the name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Daemon => "daemon",
            Self::Here => "here",
        }
    }
}
