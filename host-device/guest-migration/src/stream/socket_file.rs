// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file of a listening Unix socket.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The file of a listening Unix socket. Drop removes it, unless another socket has replaced it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    pub(super) fn bind(path: &Path) -> io::Result<(OwnedFd, Self)> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Self::remove_stale(path)?;
                UnixListener::bind(path)?
            }
            other => other?,
        };
        let file = Self {
            path: path.to_owned(),
            identity: Self::identity(path),
        };
        Ok((listener.into(), file))
    }

    fn remove_stale(path: &Path) -> io::Result<()> {
        if !fs::symlink_metadata(path)?.file_type().is_socket() {
            return Err(io::Error::other(
                "path exists and is not a socket: remove it, or choose another path",
            ));
        }
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            _ => Err(io::Error::other(
                "path is in use by a running process: end it, or choose another path",
            )),
        }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        let metadata = fs::symlink_metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == Self::identity(&self.path) {
            // Ignored: the next listener replaces a stale socket.
            let _ = fs::remove_file(&self.path);
        }
    }
}
