// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The packets between the device process and the broker process. There are two connections, so that no request that
//! takes little time waits for one that takes long.

use std::path::PathBuf;

use guest_migration::{FileId, Pinning};
use serde::{Deserialize, Serialize};

use crate::device::saved_state::SavedState;
use crate::socket::SocketFiles;

/// A request of the device process on the first connection. None of them takes long.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// Remembers the files of a listening socket. Accepted before [`Request::Confined`] only.
    KeepSocket(SocketFiles),
    /// The device process gives up its rights now.
    Confined,
    /// Removes the files of the socket with this index, in the order in which they were kept.
    RemoveSocket(usize),
    /// Creates a connection for the crate `vhost-user-backend`. The answer carries the listener and the other end.
    PrivateConnection,
}

/// A request of the device process on the second connection.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum SlowRequest {
    /// Searches for devices that pin these memory files.
    FindPinning(Vec<FileId>),
    /// Starts the helper process of a migration. Carries its standard input and output.
    StartHelper,
    /// Writes a saved state to a file.
    SaveState {
        filename: PathBuf,
        state: Box<SavedState>,
    },
}

/// The answer to a request.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Answer {
    Done,
    Pinning(Pinning),
    /// The reason why the request failed, for the user.
    Failed(String),
}
